"""The lab's widgets: boxes and joins make the plan, clicks are answered, or refused."""

import asyncio
import base64
import io
import itertools
import json
import random
import re
import subprocess
import sys
import threading
import zlib

import ipywidgets as widgets
import pytest
import torch
from PIL import Image

from helpers.checkpointing import Plan
from helpers.controls import LayerLab
from helpers.controls._findings import finding
from helpers.inspection import kept_by_module
from helpers.measure import predict
from helpers.models import MLP, DocsMLP, uniform_mlp
from helpers.models.architectures import GPT, ResNet, UNet
from helpers.timeline import CATEGORIES
from helpers.units import format_bytes

WIDTHS = [64] * 5


def small_lab(**arguments) -> LayerLab:
    return LayerLab(lambda: MLP(WIDTHS, "gelu"), batch=256, **arguments)


def expected_finding(plan: Plan, rows: int = 256) -> str:
    x = torch.empty(rows, 64, device="meta")
    reports = [predict(lambda: MLP(WIDTHS, "gelu"), x, p) for p in (Plan(), plan)]
    return finding(*reports)


def is_a_full_picture(png: bytes) -> bool:
    image = Image.open(io.BytesIO(png))
    colors = image.convert("RGBA").getcolors(10**6)
    return min(image.size) > 700 and len(colors) > 10


def numbers(lab: LayerLab) -> dict:
    """Give what the browser draws."""
    picture = lab.picture
    return {"before": picture.before, "after": picture.after} | picture.shown


def kept(lab: LayerLab, key: str) -> str:
    """Read what a row says that its layers keep."""
    return next(row.kept.value for row in lab.rows.children if row.node.key == key)


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


@pytest.mark.parametrize("tree", [False, True])
def test_a_join_says_what_a_click_on_it_does(tree):
    lab = small_lab(tree=tree)
    assert lab.joins["layer3"].tooltip == "join layer3 to layer2"
    lab.plan = Plan((("layer2", "layer3"),))
    assert lab.joins["layer3"].tooltip == "part layer3 from layer2"
    assert lab.joins["layer2"].tooltip == "join layer2 to layer1"


def test_every_flip_says_what_predict_says():
    lab, chance = small_lab(), random.Random(0)
    for _ in range(20):
        switch = chance.choice([*lab.boxes.values(), *lab.joins.values()])
        switch.value = not switch.value
        assert lab.finding == expected_finding(lab.plan)
        assert lab.finding in lab.readout.value


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


def test_the_picture_is_drawn_as_a_file_when_it_is_asked_for():
    lab, told = small_lab(), []
    lab.picture.observe(told.append, "value")
    lab.plan = Plan.alone(["layer2"])
    assert len(told) == 1
    found = re.fullmatch(r'<img alt="(.*)" src="data:.*,(.*)">', lab.picture.value)
    assert found[1] == lab.finding == lab.picture.shown["finding"]
    assert is_a_full_picture(base64.b64decode(found[2]))
    before = lab.picture.value
    lab.boxes["layer3"].value = True
    assert lab.picture.value != before and len(told) == 2


def test_the_browser_can_draw_the_timeline_from_what_it_gets():
    lab = small_lab()
    lab.plan = Plan.alone(["layer2"])
    for line, report in zip(
        (lab.picture.before, lab.picture.after), lab.state.reports, strict=True
    ):
        timeline = report.timeline
        rows = {name: [0] * (line["length"] + 1) for name in CATEGORIES}
        columns = (line[name] for name in ("bytes", "gaps", "lasts", "category"))
        start = 0
        for n_bytes, gap, places, category in zip(*columns, strict=True):
            start, end = start + gap, start + gap + places
            rows[CATEGORIES[category]][start] += n_bytes
            rows[CATEGORIES[category]][end] -= n_bytes
        levels = {name: [*itertools.accumulate(row)][:-1] for name, row in rows.items()}
        first = timeline.first_allocation
        assert levels == {n: row[first:] for n, row in timeline.levels().items()}
        total = [sum(place) for place in zip(*levels.values(), strict=True)]
        assert total.index(max(total)) == line["peak"]["place"]
        assert max(total) == line["peak"]["bytes"] == report.peak_bytes
        assert [sum(line["categories"])] == [report.peak_bytes]


def test_every_tensor_says_what_made_it():
    lab = small_lab()
    line, names = lab.picture.before, lab.picture.names
    said = {
        (CATEGORIES[kind], names[shape], names[maker])
        for kind, shape, maker in zip(
            line["category"],
            line["shape"],
            itertools.accumulate(line["makers"]),
            strict=True,
        )
    }
    assert ("parameter", "64 × 64", "from before the step") in said
    assert ("activation", "256 × 64", "by gelu in layer1.1") in said


@pytest.mark.parametrize(
    ("make", "name", "most_bytes"),
    [
        (lambda: LayerLab(DocsMLP, 8192), "layer2", 2_000),
        (lambda: LayerLab(batch=8192, settings={"depth": 16}), "layer2", 5_500),
        (lambda: gpt_lab(blocks=96), "blocks.3", 12_000),
    ],
    ids=["the docs' MLP", "16 layers", "96 blocks"],
)
def test_a_flip_sends_few_bytes_and_the_plain_step_and_names_only_once(
    make, name, most_bytes
):
    lab = make()
    told = {*lab.picture.keys} - {"layout"}  # all that the browser knows
    lab.boxes[name].value, sent = True, []
    lab.boxes[name].value = False
    lab.picture.observe(lambda change: sent.append(change.name), told)
    lab.boxes[name].value = True
    assert {*sent} <= {"after", "shown"}
    for key, data in lab.picture.get_state(["after", "shown"]).items():
        if isinstance(data, bytes):
            most_bytes -= len(data)
            data = json.loads(zlib.decompress(data))
            assert data == json.loads(json.dumps(getattr(lab.picture, key)))
        else:
            most_bytes -= len(json.dumps(data))
            assert data == getattr(lab.picture, key)
    assert most_bytes > 0


def test_the_picture_does_not_depend_on_what_was_drawn_before():
    lab, other = small_lab(), small_lab()
    for name in ("layer1", "layer3", "layer2"):
        lab.boxes[name].value = True
    lab.boxes["layer2"].value = False
    other.plan = lab.plan
    for plan in {*lab.state.tried} - {*other.state.tried}:
        del lab.state.tried[plan]
    lab.plan = lab.plan
    assert numbers(lab) == numbers(other) and lab.picture.png == other.picture.png


def bring_back(lab: LayerLab, place: object) -> None:
    """Click on a ring, as the browser says it."""
    lab.picture._handle_custom_msg({"bring_back": place}, [])


def test_a_ring_names_its_plan_and_brings_it_back():
    lab, plan = small_lab(), Plan((("layer1", "layer2"), ("layer4",)))
    lab.plan = plan
    said = lab.finding
    lab.plan = Plan.alone(["layer3"])
    assert [ring["about"] for ring in lab.picture.shown["tried"]][1] == said
    assert lab.picture.shown["names"] == {0: "none", 2: "this plan"}
    bring_back(lab, 1)
    assert lab.plan == plan and lab.finding == said
    assert lab.boxes["layer4"].value and lab.joins["layer2"].value
    assert lab.picture.shown["now"] == 1
    for nothing in (-1, 3, 99, None, "1", [1]):
        bring_back(lab, nothing)
    assert lab.plan == plan and lab.finding == said
    bring_back(lab, 0)
    assert lab.plan == Plan()


def test_rows_show_the_bytes_that_each_layer_keeps():
    lab = small_lab()  # GELU keeps its input and its output: 2 × 256 × 64 × 4 B
    assert "128.0 KiB" in kept(lab, "layer1")
    assert "64.0 KiB" in kept(lab, "layer4")
    lab.plan = Plan((("layer1", "layer2"),))
    assert "keeps 0 B" in kept(lab, "layer1")
    assert "64.0 KiB" in kept(lab, "layer2")


def test_settings_make_another_model_and_keep_the_ticks():
    lab = LayerLab(uniform_mlp, 64, settings={"depth": 3, "width": 32})
    lab.plan = Plan((("layer1", "layer2"), ("layer4",)))
    lab.controls["depth"].value = 2
    assert list(lab.boxes) == ["layer1", "layer2", "layer3"]
    assert lab.plan == Plan((("layer1", "layer2"),))
    assert lab.history[-1] is lab.state.tried[lab.plan]


@pytest.mark.parametrize(
    ("control", "value", "reason"),
    [
        ("batch", -3, "batch must be a whole number from 1 up, not -3"),
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
    ("control", "value", "reason"),
    [
        ("depth", 10**6, "makes some 3,000,002 modules, and a lab takes 100,000"),
        ("depth", 10**9, "makes some 3,000,000,002 modules, and a lab takes 100,000"),
        ("depth", -1, "depth must be a whole number from 1 up, not -1"),
        ("width", 10**6, "one tensor of this size takes 3,725.29 GiB, and a lab takes"),
        ("batch", 2 * 10**9, "one tensor of this size takes 14,901.16 GiB"),
        ("batch", 2**31, "batch must be a whole number from 1 up"),
    ],
)
@pytest.mark.parametrize("tree", [False, True])
def test_a_size_beyond_all_machines_is_refused_at_once(control, value, reason, tree):
    lab = LayerLab(uniform_mlp, 64, {"depth": 3, "width": 2000}, tree=tree)
    before = lab.finding
    lab.controls[control].value = value
    assert reason in lab.readout.value and lab.finding == before
    assert lab.controls[control].value == lab.state.values[control] < 10**6


def test_what_takes_long_is_asked_about_and_done_when_it_is_asked_for_again():
    lab = LayerLab(uniform_mlp, 4, {"depth": 3, "width": 2})
    lab.controls["depth"].value = 1500
    said = "depth 1,500 makes some 4,502 modules, and an answer then takes some 2 s; "
    assert said in lab.readout.value
    assert lab.controls["depth"].value == 3
    lab.controls["depth"].value = 1500
    assert lab.settings["depth"] == 1500 and lab.finding in lab.readout.value
    lab.controls["depth"].value = 1600
    assert "1,600 makes" in lab.readout.value and lab.controls["depth"].value == 1500
    lab.controls["depth"].value = 1400
    assert lab.settings["depth"] == 1400, "less is not asked about"


def test_each_alone_leaves_out_what_cannot_be_ticked_and_says_so():
    relu = [torch.nn.ReLU(inplace=True) for _ in range(2)]
    linear = [torch.nn.Linear(16, 16) for _ in range(3)]
    model = torch.nn.Sequential(linear[0], relu[0], linear[1], relu[1], linear[2])
    lab = LayerLab(model, torch.randn(8, 16), tree=True)
    lab.shortcuts["each alone"].click()
    assert lab.plan == Plan.alone(["0", "2", "4"]) and lab.finding in lab.readout.value
    assert "; left out: &#x27;1&#x27; changes its input in place" in lab.readout.value
    assert "no segment can start with it (and 1 more)" in lab.readout.value
    lab.boxes["4"].value = False
    assert "left out" not in lab.readout.value
    lab.shortcuts["all joined"].click()
    assert lab.plan == Plan((tuple("01234"),)) and lab.finding in lab.readout.value


def test_the_step_and_the_card_are_the_readers_to_choose():
    lab, x = small_lab(), torch.empty(256, 64, device="meta")
    plan = Plan.alone(["layer2"])
    lab.plan = plan
    lab.step.optimizer.value, lab.step.precision.value = "AdamW", "bf16"
    lab.step.card.value = "A100"
    chosen = {"optimizer": torch.optim.AdamW, "autocast": torch.bfloat16}
    expected = predict(lambda: MLP(WIDTHS, "gelu"), x, plan, gpu="A100", **chosen)
    assert lab.history[-1] == expected and expected.categories["optimizer_state"]
    assert "predicted for a CUDA step on A100" in lab.readout.value
    assert lab.measure().peak_bytes and "measured on" in lab.readout.value
    lab.step.optimizer.value, lab.step.precision.value = "none", "float32"
    assert not lab.history[-1].categories["optimizer_state"]


def test_the_cards_memory_is_a_line_and_says_what_is_to_spare():
    lab = small_lab()
    assert lab.picture.shown["limit"] is None
    report = lab.history[-1]
    takes = report.allocator_peak_bytes + report.workspace_bytes
    for n_bytes, word in ((takes + 2**20, "to spare"), (takes - 2**20, "too little")):
        lab.step.memory.value = n_bytes / 2**30
        limit = lab.picture.shown["limit"]
        assert limit["label"].endswith(f"1.0 MiB {word}") and limit["bytes"] == n_bytes
        assert limit["over"] == (n_bytes < takes)
        assert f"; {limit['label']}<" in lab.readout.value  # for who hears it
    lab.step.memory.value = -1
    assert lab.picture.shown["limit"] is None and "my GPU" not in lab.readout.value


def test_a_batch_that_does_not_fit_is_said():
    said = LayerLab(DocsMLP(), torch.ones(2, 4)).readout.value
    assert "does not fit this model at layer &#x27;layer1" in said


def test_measure_lands_on_the_picture_and_in_the_history():
    lab = small_lab()
    lab.plan = Plan((("layer1", "layer2"),))
    predicted = lab.history[-1]
    report = lab.measure()
    assert report.source == "measured" and report.peak_bytes == predicted.peak_bytes
    assert lab.history[-1] is report
    assert lab.state.note in lab.readout.value


def test_an_interrupted_measurement_leaves_model_and_lab_as_they_were(monkeypatch):
    model = MLP(WIDTHS, "gelu")
    lab = LayerLab(model, torch.randn(256, 64))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps = 0

    def interrupted(step, device):
        nonlocal steps
        steps += 1
        raise KeyboardInterrupt

    monkeypatch.setattr("helpers.measure.measured.time_step_ms", interrupted)
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
    assert is_a_full_picture(base64.b64decode(bundle["image/png"]))


def test_a_burst_of_clicks_from_other_threads_is_answered_once_with_the_last_state():
    async def burst() -> tuple[LayerLab, list]:
        lab, drawn = LayerLab(lambda: MLP(WIDTHS, "gelu"), batch=10**6), []
        lab.on_shown = lambda: drawn.append(lab.finding)
        for value in (True, False, True, False, True):
            front_end_click(lab.boxes["layer2"], value=value)
        front_end_click(lab.boxes["layer3"], value=True)
        assert not drawn  # the cell is still running
        await asyncio.sleep(0)
        return lab, drawn

    lab, drawn = asyncio.run(burst())
    assert drawn == [expected_finding(Plan.alone(["layer2", "layer3"]), 10**6)]
    assert drawn == [lab.finding]


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
        monkeypatch.setattr("helpers.measure.measured.time_step_ms", fails)
        for _ in range(2000):
            await asyncio.sleep(0.01)
            if "does not fit" in lab.readout.value:
                break
        return lab

    lab = asyncio.run(measure())
    assert "the step needs" in lab.readout.value
    lab.boxes["layer2"].value = True
    assert lab.finding == expected_finding(Plan.alone(["layer2"]))


# A tree of modules -------------------------------------------------------------------


def gpt_lab(blocks: int = 4, **arguments) -> LayerLab:
    model = GPT(blocks=blocks, width=32, vocabulary=100, context=16)
    return LayerLab(model, torch.randint(100, (2, 16)), **arguments)


def shown_rows(lab: LayerLab) -> list[str]:
    """Read the labels of the rows from top to bottom."""
    return [row.box.description for row in lab.rows.children]


def fold_button(lab: LayerLab, label: str) -> widgets.Button:
    return lab.rows.children[shown_rows(lab).index(label)].fold


def test_a_model_with_depth_is_shown_as_a_tree_folded_below_its_blocks():
    lab = gpt_lab()
    blocks = [f"blocks.{i}" for i in range(4)]
    assert shown_rows(lab) == ["tokens", "places", *blocks, "norm", "head"]
    assert list(lab.joins) == blocks[1:]
    fold_button(lab, "blocks.1").click()
    inside = ["norm1", "attention", "norm2", "mlp", "dropout"]
    assert shown_rows(lab)[4:9] == inside
    fold_button(lab, "blocks.1").click()
    assert shown_rows(lab) == ["tokens", "places", *blocks, "norm", "head"]


def test_an_mlp_is_shown_flat_unless_a_tree_is_asked_for():
    assert list(small_lab().boxes) == ["layer1", "layer2", "layer3", "layer4"]
    lab = small_lab(tree=True)
    assert shown_rows(lab) == ["layer1", "layer2", "layer3", "layer4"]
    lab.boxes["layer1.1"].value = True
    assert lab.plan == Plan.alone(["layer1.1"])


def test_many_blocks_alike_are_one_row_that_ticks_them_all():
    lab = gpt_lab(blocks=24)
    assert shown_rows(lab) == ["tokens", "places", "blocks.0 … 23", "norm", "head"]
    everything = lab.rows.children[2].box
    everything.value = True
    blocks = [f"blocks.{i}" for i in range(24)]
    assert lab.plan == Plan.alone(blocks)
    fold_button(lab, "blocks.0 … 23").click()
    assert len(lab.rows.children) == 5 + 24
    lab.boxes["blocks.7"].value = False
    assert not everything.value and len(lab.plan.segments) == 23
    fold_button(lab, "blocks.0 … 23").click()
    assert "23 ticked" in kept(lab, "blocks.0 …")
    lab.shortcuts["pieces"].click()
    assert lab.plan.segments[3] == ("blocks.6", "blocks.7") and everything.value
    assert "12 segments" in kept(lab, "blocks.0 …")


@pytest.fixture
def made(monkeypatch) -> list[widgets.Widget]:
    """List the widgets as they are made."""
    found, open_comm = [], widgets.Widget.open
    monkeypatch.setattr(
        widgets.Widget, "open", lambda self: found.append(self) or open_comm(self)
    )
    return found


def test_a_tree_of_hundreds_of_modules_makes_few_widgets(made):
    lab = gpt_lab(blocks=60)
    assert len(lab.state.ticks.inspection.layers) > 600 and len(lab.rows.children) == 5
    assert len(made) < 200
    made.clear()
    fold_button(lab, "blocks.0 … 59").click()
    # A row, a join, a fold, a box, what it keeps; of many more at once some get lost.
    assert len(lab.rows.children) == 65 and len(made) <= 5 * 60 + 5


def test_a_thousand_layers_are_answered_and_make_few_widgets(made):
    lab = LayerLab(batch=64, settings={"depth": 999, "width": 16})
    assert shown_rows(lab)[::19] == ["layer1 … 50", "layer951 … 1000"]
    assert len(made) < 250
    lab.boxes["layer777"].value = True
    assert lab.finding.startswith("layer 777 alone")
    assert shown_rows(lab)[15:18] == ["layer751 … 800", "layer751", "layer752"]
    fold_button(lab, "layer751 … 800").click()
    assert "1 ticked" in kept(lab, "layer751 …")
    lab.shortcuts["all joined"].click()
    assert lab.finding.startswith("layers 1–1000 as one segment")
    lab.controls["depth"].value = 9
    assert shown_rows(lab) == [f"layer{i}" for i in range(1, 11)]


def test_a_hundred_blocks_unfold_by_pieces(made):
    lab = gpt_lab(blocks=100)
    names = ["blocks.0 … 49", "blocks.50 … 99"]
    assert shown_rows(lab) == ["tokens", "places", *names, "norm", "head"]
    made.clear()
    fold_button(lab, names[1]).click()
    assert len(lab.rows.children) == 6 + 50 and len(made) <= 5 * 50 + 5


def test_a_box_that_is_folded_away_is_there_when_it_is_asked_for():
    lab = gpt_lab(blocks=24)
    lab.boxes["blocks.7.mlp.0"].value = True
    assert lab.plan == Plan.alone(["blocks.7.mlp.0"])
    assert "blocks.7" in shown_rows(lab) and "mlp" in shown_rows(lab)
    with pytest.raises(KeyError):
        lab.boxes["blocks.99"]


def test_a_box_whose_place_another_tick_takes_shows_it():
    lab = gpt_lab()
    lab.boxes["blocks.1.mlp"].value = True
    lab.boxes["blocks.1"].value = True
    assert lab.plan == Plan.alone(["blocks.1"])
    assert not lab.boxes["blocks.1.mlp"].value
    lab.boxes["blocks.1.mlp"].value = True
    assert not lab.boxes["blocks.1"].value


def test_blocks_are_joined_where_a_chain_allows():
    lab = gpt_lab()
    lab.plan = Plan.alone(["blocks.1", "blocks.2"])
    lab.joins["blocks.2"].value = True
    assert lab.plan == Plan((("blocks.1", "blocks.2"),))
    assert not LayerLab(UNet(2, 4), torch.randn(2, 3, 8, 8)).joins


def test_rows_of_a_tree_show_what_each_module_keeps_with_all_in_it():
    lab = gpt_lab()
    lab.boxes["blocks.0.mlp"].value = True
    now = kept_by_module(lab.history[-1].timeline)
    without = kept_by_module(lab.history[0].timeline)
    for name in ("blocks.0.mlp", "blocks.1", "head"):
        assert f"keeps {format_bytes(now.get(name, 0))}<" in kept(lab, name)
    assert now["blocks.0"] < without["blocks.0"] and "changed" in kept(lab, "blocks.0")
    for _ in range(2):  # unfolded, and folded
        assert f"1 ticked, {format_bytes(now['blocks.0'])}" in kept(lab, "blocks.0")
        fold_button(lab, "blocks.0").click()


def test_a_box_says_that_what_is_inside_is_ticked_in_part():
    lab = gpt_lab()
    box = lab.boxes["blocks.0"]
    lab.boxes["blocks.0.mlp"].value = lab.boxes["blocks.0.norm1"].value = True
    assert not box.value and "part" in box._dom_classes
    assert box.tooltip.endswith("; 2 modules ticked inside")
    states = [(name.strip(), how) for name, how, _ in lab.rows.as_text(lab.plan)]
    assert ("blocks.0", "part") in states and ("mlp", "all") in states
    assert ("blocks.1", "none") in states
    lab.boxes["blocks.0.norm1"].value = False
    assert box.tooltip.endswith("; 1 module ticked inside")
    box.value = True
    assert "part" not in box._dom_classes and "inside" not in box.tooltip
    lab.boxes["blocks.0"].value = False
    assert "part" not in box._dom_classes


def test_what_is_not_safe_is_said_and_marked():
    lab = LayerLab(ResNet((1, 1), 4), torch.randn(2, 3, 8, 8))
    assert "⚠" in kept(lab, "layers.0")
    lab.boxes["layers.0"].value = True
    assert "Careful: &#x27;layers.0.norm1&#x27; updates its running" in (
        lab.readout.value
    )
    lab.boxes["stem.2"].value = True
    assert "&#x27;stem.2&#x27; changes its input in place" in lab.readout.value
    lab.boxes["stem.2"].value = False
    assert lab.finding.startswith("layer 0 alone") and lab.finding in lab.readout.value


def test_clicks_in_a_tree_from_other_threads_are_not_lost():
    async def clicks() -> LayerLab:
        lab = gpt_lab()
        front_end_click(lab.boxes["blocks.0"], value=True)
        front_end_click(lab.boxes["blocks.1"], value=True)
        front_end_click(lab.joins["blocks.1"], value=True)
        front_end_click(lab.boxes["blocks.3"], value=True)
        await asyncio.sleep(0)
        return lab

    lab = asyncio.run(clicks())
    plan = Plan((("blocks.0", "blocks.1"), ("blocks.3",)))
    reports = [predict(lab.state.model, lab.state.batch, p) for p in (Plan(), plan)]
    assert lab.plan == plan and lab.finding == finding(*reports)


def test_a_kernel_without_anywidget_is_told_what_it_lacks():
    code = """if True:
        import sys
        sys.modules["anywidget"] = None
        from helpers.controls import LabState
        LabState(batch=8).set()
        from helpers.controls import LayerLab"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = found.stderr.splitlines()[-1]
    assert last == (
        "ModuleNotFoundError: the labs need anywidget in the kernel's environment: "
        "pip install anywidget"
    )


def test_rows_that_unfold_are_ticked_before_they_are_seen():
    """A click on a box that is not yet ticked would be taken for another tick."""
    lab = LayerLab(GPT(3, 16, 2, 20, 8), torch.randint(0, 20, (2, 8)), tree=True)
    lab.plan = Plan.alone(["blocks.1.mlp"])
    seen = []

    def note(change) -> None:
        seen.append([row.box.value for row in change.new if "mlp" in row.node.names[0]])

    lab.rows._open.clear()
    lab.rows._rows.clear()
    lab.rows._old = {}
    lab.rows.observe(note, "children")
    lab.rows.reveal("blocks.1.mlp")
    assert any(True in ticked for ticked in seen)
