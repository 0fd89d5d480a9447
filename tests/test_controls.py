"""The lab: boxes and joins make the plan, flips are answered, failures are said."""

import asyncio
import base64
import io
import random
import threading

import pytest
import torch
from PIL import Image
from torch import nn

from helpers.checkpointing import Plan
from helpers.controls import LayerLab
from helpers.findings import describe, finding
from helpers.measure import predict
from helpers.models import MLP, DocsMLP, uniform_mlp
from helpers.picture import HEIGHT, SCALE, WIDTH

WIDTHS = [64] * 5


def small_lab(**arguments) -> LayerLab:
    return LayerLab(lambda: MLP(WIDTHS, "gelu"), batch=256, **arguments)


def expected_finding(plan: Plan, rows: int = 256) -> str:
    x = torch.empty(rows, 64, device="meta")
    reports = [predict(lambda: MLP(WIDTHS, "gelu"), x, p) for p in (Plan(), plan)]
    return finding(*reports)


def picture_of(lab: LayerLab) -> Image.Image:
    source = lab.picture.value.split("base64,")[1].split('"')[0]
    return Image.open(io.BytesIO(base64.b64decode(source)))


def front_end_click(widget, **state) -> None:
    """Deliver a change as JupyterLab does: a message, on a thread of its own."""
    message = {"data": {"method": "update", "state": state, "buffer_paths": []}}
    arguments = ({"content": message, "buffers": []},)
    thread = threading.Thread(target=widget.comm.handle_msg, args=arguments)
    thread.start()
    thread.join()


def test_a_box_for_each_layer_and_a_join_for_each_but_the_first():
    lab = small_lab()
    assert list(lab.boxes) == ["layer1", "layer2", "layer3", "layer4"]
    assert list(lab.joins) == ["layer2", "layer3", "layer4"]
    assert lab.plan == Plan()
    assert not LayerLab(DocsMLP, 32).joins  # no Sequential, so no neighbours


def test_boxes_are_alone_until_they_are_joined():
    lab = small_lab()
    for name in ("layer2", "layer3", "layer4"):
        lab.boxes[name].value = True
    assert lab.plan == Plan.alone(["layer2", "layer3", "layer4"])
    lab.joins["layer3"].value = True
    assert lab.plan == Plan((("layer2", "layer3"), ("layer4",)))


def test_a_join_counts_only_when_both_layers_are_ticked():
    lab = small_lab()
    lab.joins["layer3"].value = True
    lab.boxes["layer3"].value = True
    assert lab.plan == Plan.alone(["layer3"])
    assert lab.joins["layer3"].disabled
    lab.boxes["layer2"].value = True
    assert lab.plan == Plan((("layer2", "layer3"),))
    assert not lab.joins["layer3"].disabled


def test_every_flip_says_what_predict_says():
    lab, chance = small_lab(), random.Random(0)
    for _ in range(20):
        switch = chance.choice([*lab.boxes.values(), *lab.joins.values()])
        switch.value = not switch.value
        assert lab.finding == expected_finding(lab.plan)
        assert lab.finding in lab.readout.value


def test_the_plan_can_be_set_and_reads_back():
    lab = small_lab()
    for segments in ((("layer1", "layer2", "layer3"),), (("layer2",), ("layer3",)), ()):
        lab.plan = Plan(segments)
        assert lab.plan == Plan(segments)
        assert lab.finding == expected_finding(Plan(segments))


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (Plan.alone(["layer9"]), "layer1, layer2, layer3, layer4"),
        (Plan.alone(["layer1.0"]), "no box for 'layer1.0'"),
        (Plan((("layer1", "layer3"),)), "does not follow"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_and_nothing_changes(plan, reason):
    lab = small_lab()
    lab.plan = Plan.alone(["layer2"])
    with pytest.raises(ValueError, match=reason):
        lab.plan = plan
    assert lab.plan == Plan.alone(["layer2"])


def test_shortcuts_set_boxes_and_joins():
    lab = small_lab()
    lab.shortcuts["each alone"].click()
    assert lab.plan == Plan.alone(lab.boxes)
    lab.shortcuts["all joined"].click()
    assert lab.plan == Plan((tuple(lab.boxes),))
    lab.piece.value = 3
    lab.shortcuts["pieces"].click()
    assert lab.plan == Plan((("layer1", "layer2", "layer3"), ("layer4",)))
    lab.shortcuts["none"].click()
    assert lab.plan == Plan()


def test_the_picture_is_a_full_picture_with_the_finding_as_its_text():
    lab = small_lab()
    lab.plan = Plan.alone(["layer2"])
    image = picture_of(lab)
    assert image.size == (WIDTH * SCALE, HEIGHT * SCALE)
    assert len(image.convert("RGBA").getcolors(10**6)) > 10
    assert f'alt="{lab.finding}"' in lab.picture.value


def test_the_picture_does_not_depend_on_what_was_drawn_before():
    lab, other = small_lab(), small_lab()
    for name in ("layer1", "layer3", "layer2"):
        lab.boxes[name].value = True
    lab.boxes["layer2"].value = False
    lab._tried[lab._key()] = {p: lab._tried[lab._key()][p] for p in (Plan(), lab.plan)}
    lab._draw()
    other.plan = lab.plan
    assert picture_of(lab).tobytes() == picture_of(other).tobytes()


def test_rows_show_the_bytes_that_each_layer_keeps():
    lab = small_lab()  # GELU keeps its input and its output: 2 × 256 × 64 × 4 B
    assert "128.0 KiB" in lab._rows._kept["layer1"].value
    assert "64.0 KiB" in lab._rows._kept["layer4"].value
    lab.plan = Plan((("layer1", "layer2"),))
    assert "keeps 0 B" in lab._rows._kept["layer1"].value
    assert "64.0 KiB" in lab._rows._kept["layer2"].value


def test_settings_make_another_model_and_keep_the_ticks():
    lab = LayerLab(uniform_mlp, 64, settings={"depth": 3, "width": 32})
    lab.plan = Plan((("layer1", "layer2"), ("layer4",)))
    lab.controls["depth"].value = 2
    assert list(lab.boxes) == ["layer1", "layer2", "layer3"]
    assert lab.plan == Plan((("layer1", "layer2"),))
    report = predict(
        lambda: uniform_mlp(2, 32), torch.empty(64, 32, device="meta"), lab.plan
    )
    assert lab.history[-1] == report


@pytest.mark.parametrize(
    ("control", "value", "reason"),
    [
        ("depth", 0, "depth must be a whole number from 1 up, not 0"),
        ("batch", -3, "batch must be a whole number from 1 up, not -3"),
        ("width", 10**12, "width must be a whole number"),
        ("dropout", 1.5, "dropout must be at least 0 and below 1"),
    ],
)
def test_a_wrong_setting_is_said_and_taken_back(control, value, reason):
    settings = {"depth": 3, "width": 32, "dropout": 0.0}
    lab = LayerLab(uniform_mlp, 64, settings=settings)
    lab.controls[control].value = value
    assert reason in lab.readout.value
    assert lab.settings == settings and lab.controls["batch"].value == 64
    lab.boxes["layer2"].value = True
    assert lab.finding.startswith("layer 2 alone") and lab.finding in lab.readout.value


@pytest.mark.parametrize(
    ("model", "batch", "reason"),
    [
        (nn.Linear(4, 4), torch.ones(2, 4), "no layers to tick"),
        (DocsMLP(), torch.ones(2, 4), "does not fit this model at layer &#x27;layer1"),
        (nn.Sequential(nn.Conv1d(1, 1, 1)), 8, "give a tensor as batch"),
    ],
)
def test_a_model_or_batch_that_does_not_fit_is_said(model, batch, reason):
    assert reason in LayerLab(model, batch).readout.value


def test_a_model_and_a_batch_with_targets_may_be_given():
    model, batch = DocsMLP(), (torch.randn(32, 1024), torch.randint(10, (32,)))
    lab = LayerLab(model, batch)
    lab.boxes["layer2"].value = True
    assert lab.history[-1] == predict(model, batch, Plan.alone(["layer2"]))


def test_measure_lands_on_the_picture_and_in_the_history():
    lab = small_lab()
    lab.plan = Plan((("layer1", "layer2"),))
    predicted = lab.history[-1]
    report = lab.measure()
    assert report.source == "measured" and report.peak_bytes == predicted.peak_bytes
    assert lab.history[-1] is report
    assert "as predicted" in lab.readout.value
    assert f"median of {report.repeats} runs" in lab.readout.value


def test_a_step_too_large_for_this_cpu_is_refused_with_what_would_do():
    if torch.cuda.is_available():
        pytest.skip("a GPU measures it")
    lab = LayerLab(uniform_mlp, 8192)
    with pytest.raises(ValueError, match="take a batch or a width that needs at most"):
        lab.measure()
    assert lab.measure_button.description == "Measure"


def test_an_interrupted_measurement_leaves_model_and_lab_as_they_were(monkeypatch):
    model = MLP(WIDTHS, "gelu")
    lab = LayerLab(model, torch.randn(256, 64))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps = 0

    def interrupted(step, device):
        nonlocal steps
        steps += 1
        raise KeyboardInterrupt

    monkeypatch.setattr("helpers.measure.time_step_ms", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lab.measure()
    assert steps == 1
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert "forward" not in vars(model)
    lab.boxes["layer1"].value = True
    assert lab.finding.startswith("layer 1 alone")


def test_without_widgets_there_is_a_picture_and_a_sentence():
    lab = small_lab()
    bundle = lab._repr_mimebundle_()
    assert bundle["text/plain"] == lab.finding
    image = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert image.size == (WIDTH * SCALE, HEIGHT * SCALE)


def test_a_burst_of_clicks_from_other_threads_is_answered_once_with_the_last_state():
    async def burst() -> tuple[LayerLab, int]:
        lab = LayerLab(lambda: MLP(WIDTHS, "gelu"), batch=10**6)
        drawn = 0
        draw = lab._draw

        def counted() -> None:
            nonlocal drawn
            drawn += 1
            draw()

        lab._draw = counted
        for value in (True, False, True, False, True):
            front_end_click(lab.boxes["layer2"], value=value)
        front_end_click(lab.boxes["layer3"], value=True)
        assert drawn == 0  # the cell is still running
        await asyncio.sleep(0)
        return lab, drawn

    lab, drawn = asyncio.run(burst())
    assert drawn == 1
    assert lab.finding == expected_finding(Plan.alone(["layer2", "layer3"]), 10**6)


def test_the_measurement_follows_by_itself_and_a_flip_ends_it():
    async def flip_while_measuring() -> LayerLab:
        lab = small_lab()
        while lab.measure_button.description != "Stop":
            await asyncio.sleep(0.01)
        lab.boxes["layer2"].value = True
        assert lab.measure_button.description == "Measure"  # the flip comes first
        for _ in range(2000):
            await asyncio.sleep(0.01)
            if "measured on" in lab.readout.value:
                break
        return lab

    lab = asyncio.run(flip_while_measuring())
    assert "measured on" in lab.readout.value
    assert [report.source for report in lab.history] == ["predicted", "measured"]


def test_a_failure_in_a_measurement_is_said_in_the_panel(monkeypatch):
    def fails(step, device):
        raise torch.OutOfMemoryError("no room")

    async def measure() -> LayerLab:
        lab = small_lab()
        monkeypatch.setattr("helpers.measure.time_step_ms", fails)
        for _ in range(2000):
            await asyncio.sleep(0.01)
            if "does not fit" in lab.readout.value:
                break
        return lab

    lab = asyncio.run(measure())
    assert "the step needs" in lab.readout.value
    lab.boxes["layer2"].value = True
    assert lab.finding == expected_finding(Plan.alone(["layer2"]))


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ((("layer2",),), "layer 2 alone"),
        ((("layer2",), ("layer4",)), "layers 2, 4 each alone"),
        ((("layer2", "layer3"),), "layers 2–3 as one segment"),
        (
            (("layer1", "layer2"), ("layer3", "layer4"), ("layer6",)),
            "layers 1–2, 3–4 as segments; 6 alone",
        ),
        ((("stem",), ("block.conv",)), "stem, block.conv each alone"),
    ],
)
def test_plans_are_described_as_one_would_say_them(segments, words):
    assert describe(Plan(segments)) == words
