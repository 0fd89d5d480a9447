"""Any plan that was tried can be the one that others are compared with."""

import base64

import pytest
import torch

from helpers.checkpointing import Plan
from helpers.controls import LayerLab
from helpers.controls._findings import finding
from helpers.measure import predict
from helpers.models import MLP, uniform_mlp
from tests.controls.test_lab import is_a_full_picture, kept

WIDTHS, ROWS = [64] * 5, 256
TWO, PAIR = Plan.alone(["layer2", "layer4"]), Plan((("layer1", "layer2"),))


def make() -> MLP:
    return MLP(WIDTHS, "gelu")


def report(plan: Plan, rows: int = ROWS):
    return predict(make, torch.empty(rows, 64, device="meta"), plan)


def choose(lab: LayerLab, plan: Plan) -> None:
    """Take a plan to compare with, as the browser says it."""
    place = [*lab.state.tried].index(plan)
    lab.picture._handle_custom_msg({"compare": place}, [])


@pytest.fixture
def lab() -> LayerLab:
    """Show PAIR, after TWO."""
    made = LayerLab(make, ROWS)
    for plan in (TWO, PAIR):
        made.plan = plan
    return made


def test_sentence_picture_and_rings_are_against_the_plan_chosen(lab):
    choose(lab, TWO)
    said = finding(report(TWO), report(PAIR))
    assert said.endswith("FLOPs, against layers 2, 4 each alone")
    assert lab.finding == said and said in lab.readout.value and lab.plan == PAIR
    before, after, shown = lab.picture.before, lab.picture.after, lab.picture.shown
    assert before["title"] == "other plan: layers 2, 4 each alone"
    assert before["peak"]["bytes"] == report(TWO).peak_bytes
    assert after["title"] == "this plan"
    assert after["peak"]["bytes"] == report(PAIR).peak_bytes
    tried = {ring["about"] for ring in shown["tried"]}
    assert tried == {finding(report(TWO), report(p)) for p in (Plan(), TWO, PAIR)}
    assert shown["names"] == {0: "none", 1: "other", 2: "this plan"}
    assert shown["pair"] == ("other", "this plan")
    choose(lab, Plan())
    assert lab.finding == finding(report(Plan()), report(PAIR))
    assert lab.picture.before["title"] == "no checkpointing"


def test_flips_are_compared_with_it_too_until_it_is_given_back(lab):
    choose(lab, TWO)
    for name in ("layer3", "layer1"):
        lab.boxes[name].value = not lab.boxes[name].value
        assert lab.finding == finding(report(TWO), report(lab.plan))
    lab.shortcuts["none"].click()
    peaks = [report(plan).peak_bytes for plan in (Plan(), TWO)]
    assert lab.finding == finding(report(TWO), report(Plan()))
    assert peaks[0] > peaks[1] and "(+" in lab.finding and "step −" in lab.finding
    lab.plan = TWO
    assert lab.finding == finding(report(TWO), report(TWO))
    assert "against" not in lab.finding


def test_rows_mark_what_differs_from_it(lab):
    choose(lab, PAIR)
    assert "changed" not in kept(lab, "layer1")
    lab.boxes["layer3"].value = True
    marked = ["changed" in kept(lab, f"layer{i}") for i in range(1, 5)]
    assert marked == [False, False, True, False]


def test_the_picture_without_widgets_and_its_text_show_it(lab):
    plain = lab.picture.png
    choose(lab, TWO)
    bundle = lab._repr_mimebundle_()
    assert bundle["text/plain"] == lab.finding
    assert "against layers 2, 4 each alone" in lab.picture.value.partition("src=")[0]
    drawn = base64.b64decode(bundle["image/png"])
    assert is_a_full_picture(drawn) and drawn != plain


def test_it_may_be_set_and_one_that_does_not_fit_is_refused(lab):
    lab.against = other = Plan.alone(["layer3"])
    assert lab.against == other
    assert lab.finding == finding(report(other), report(PAIR))
    with pytest.raises(ValueError, match="layer9"):
        lab.against = Plan.alone(["layer9"])
    assert lab.against == other
    for nothing in (-1, 99, None, "1"):
        lab.picture._handle_custom_msg({"compare": nothing}, [])
    assert lab.finding == finding(report(other), report(PAIR))


def test_another_size_is_compared_with_the_same_plan_if_it_has_its_layers(lab):
    choose(lab, TWO)
    lab.controls["batch"].value = 2 * ROWS
    assert lab.finding == finding(report(TWO, 2 * ROWS), report(PAIR, 2 * ROWS))
    deep = LayerLab(uniform_mlp, 64, settings={"depth": 3, "width": 32})
    deep.against = Plan.alone(["layer4"])
    deep.controls["depth"].value = 2
    assert deep.against == Plan() and "against" not in deep.finding


def test_both_are_measured_in_one_run(lab):
    choose(lab, TWO)
    assert lab.picture.shown["times"] == [[], []]
    lab.measure()
    (one,), (other,) = lab.picture.shown["times"]
    pair = [lab.state.measured[plan] for plan in (TWO, PAIR)]
    assert [one["ms"], other["ms"]] == [report.step_ms for report, _ in pair]
    assert pair[0][1] is pair[1][1] and len(other["words"]) == 2
    assert f"({other['words'][1]})" in lab.readout.value
    lab.shortcuts["none"].click()
    times = lab.picture.shown["times"]
    assert [series[0]["ms"] for series in times] == [one["ms"], pair[0][1].step_ms]


def test_none_is_measured_beside_the_plan_it_is_compared_with(lab):
    lab.plan, lab.against = Plan(), TWO
    assert lab.measure().plan == Plan()


def test_times_of_two_runs_are_not_compared(lab):
    lab.measure()
    lab.plan = TWO
    lab.measure()
    choose(lab, PAIR)
    assert lab.picture.shown["times"] == [[], []]
    assert "median of 8 runs" in lab.readout.value
    assert "ms (" not in lab.readout.value
    assert lab.state.measured_unasked


def test_a_plan_that_was_only_measured_is_compared_once_it_ran_beside(monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no prediction of this")

    monkeypatch.setattr("helpers.controls.state.predict", fails)
    lab = LayerLab(make(), torch.randn(ROWS, 64))
    for name in ("layer2", "layer3"):
        lab.boxes[name].value = True
        lab.measure()
    choose(lab, Plan.alone(["layer2"]))
    assert "against" not in lab.finding and lab.picture.shown["pair"][0] == "none"
    lab.measure()
    assert lab.finding.endswith(", against layer 2 alone")
