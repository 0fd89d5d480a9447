"""What a lab knows, without its widgets: plans are answered, measured, or refused."""

import random
import subprocess
import sys

import pytest
import torch
from torch import nn

from helpers.checkpointing import Plan
from helpers.controls import LabState
from helpers.controls._findings import describe, finding
from helpers.measure import predict
from helpers.models import MLP, DocsMLP, uniform_mlp
from helpers.models.architectures import GPT, Encoder, ResNet, UNet

WIDTHS = [64] * 5


def shown(*args, **arguments) -> LabState:
    """Make a state that shows no checkpointing."""
    state = LabState(*args, **arguments)
    state.set()
    state.show()
    return state


def small_state(**arguments) -> LabState:
    return shown(lambda: MLP(WIDTHS, "gelu"), 256, **arguments)


def gpt_state(**arguments) -> LabState:
    model = GPT(blocks=4, width=32, vocabulary=100, context=16)
    return shown(model, torch.randint(100, (2, 16)), **arguments)


def answer(state: LabState, plan: Plan) -> str:
    state.plan = plan
    state.show()
    return state.finding


def expected(state: LabState, plan: Plan) -> str:
    return finding(*(predict(state.model, state.batch, p) for p in (Plan(), plan)))


def test_it_needs_no_widgets_and_no_figures():
    code = """if True:
        import sys
        from helpers.controls import LabState
        LabState(batch=8).set()
        assert not {"ipywidgets", "matplotlib"} & {*sys.modules}"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_plan_can_be_set_and_reads_back():
    state = small_state()
    for segments in ((("layer1", "layer2", "layer3"),), (("layer2",), ("layer3",)), ()):
        plan = Plan(segments)
        assert answer(state, plan) == expected(state, plan)
        assert state.plan == state.shown == plan


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (Plan.alone(["layer9"]), "layer1, layer2, layer3, layer4"),
        (Plan.alone(["layer1.0"]), "no box for 'layer1.0'"),
        (Plan((("layer1", "layer3"),)), "does not follow"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_and_nothing_changes(plan, reason):
    state = small_state()
    state.plan = Plan.alone(["layer2"])
    with pytest.raises(ValueError, match=reason):
        state.plan = plan
    assert state.plan == Plan.alone(["layer2"])


def test_a_plan_that_does_not_fit_a_tree_is_refused():
    state = gpt_state()
    state.plan = Plan.alone(["blocks.1.mlp"])
    for plan, reason in (
        (Plan.alone(["blocks.9"]), "no layer named"),
        (Plan.alone(["blocks"]), "no forward of its own"),
        (Plan.alone(["blocks.1", "blocks.1.mlp"]), "lies inside"),
    ):
        with pytest.raises(ValueError, match=reason):
            state.plan = plan
    assert state.plan == Plan.alone(["blocks.1.mlp"])


def test_the_later_tick_takes_the_place_of_what_is_around_it_or_inside():
    ticks = gpt_state().ticks
    for name, left in (
        ("blocks.1.mlp", ["blocks.1.mlp"]),
        ("blocks.1.attention", ["blocks.1.attention", "blocks.1.mlp"]),
        ("blocks.2", ["blocks.1.attention", "blocks.1.mlp", "blocks.2"]),
        ("blocks.1", ["blocks.1", "blocks.2"]),
        ("blocks.2.mlp", ["blocks.1", "blocks.2.mlp"]),
    ):
        ticks.tick([name], True)
        assert ticks.plan == Plan.alone(left)


def test_pieces_where_a_chain_allows():
    blocks = [f"blocks.{i}" for i in range(4)]
    ticks = gpt_state().ticks
    assert ticks.pieces(None) == Plan((tuple(blocks),))
    assert ticks.pieces(3) == Plan((tuple(blocks[:3]), tuple(blocks[3:])))
    assert ticks.pieces(1) == Plan.alone(blocks)
    unet = shown(UNet(2, 4), torch.randn(2, 3, 8, 8)).ticks
    assert unet.pieces(None) == Plan.alone(["stem", "down.0", "grow.0", "up.0", "head"])


def test_every_flip_in_a_tree_says_what_predict_says():
    state, chance = gpt_state(), random.Random(0)
    for _ in range(15):
        name = chance.choice(list(state.ticks.inspection.layers))
        state.ticks.tick([name], name not in state.ticks.ticked)
        state.ticks.joined = {n for n in state.ticks.before if chance.random() < 0.5}
        state.show()
        assert state.finding == expected(state, state.plan)
        assert state.ticks.ticked == set(state.shown.names)


def test_other_sizes_make_another_model_and_keep_the_ticks():
    state = shown(uniform_mlp, 64, {"depth": 3, "width": 32})
    state.plan = Plan((("layer1", "layer2"), ("layer4",)))
    state.set(depth=2)
    state.show()
    assert state.plan == Plan((("layer1", "layer2"),))
    x = torch.empty(64, 32, device="meta")
    assert state.history[-1] == predict(lambda: uniform_mlp(2, 32), x, state.plan)
    state.set(depth=3)
    assert len(state.history) == 1, "each size has a history of its own"


def test_other_sizes_of_a_tree_keep_what_is_ticked():
    def make(blocks, width):
        return GPT(blocks, width, vocabulary=100)

    sizes = {"blocks": 3, "width": 32}
    state = shown(make, torch.randint(100, (2, 16)), sizes)
    state.plan = Plan((("blocks.0", "blocks.1"), ("blocks.2.mlp",)))
    state.set(blocks=2)
    assert state.plan == Plan((("blocks.0", "blocks.1"),))
    with pytest.raises(ValueError):
        state.set(width=33)  # no multiple of the heads
    assert state.settings == {"blocks": 2, "width": 32}


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("depth", 0, "depth must be a whole number from 1 up, not 0"),
        ("batch", -3, "batch must be a whole number from 1 up, not -3"),
        ("width", 10**12, "width must be a whole number"),
        ("dropout", 1.5, "dropout must be at least 0 and below 1"),
    ],
)
def test_a_wrong_size_is_refused_and_nothing_changes(name, value, reason):
    settings = {"depth": 3, "width": 32, "dropout": 0.0}
    state = shown(uniform_mlp, 64, settings)
    with pytest.raises(ValueError, match=reason):
        state.set(**{name: value})
    assert state.values == settings | {"batch": 64} and state.settings == settings
    state.show()
    assert state.finding.startswith("no checkpointing")


@pytest.mark.parametrize(
    ("model", "batch", "reason", "tree"),
    [
        (nn.Linear(4, 4), torch.ones(2, 4), "no layers to tick", None),
        (DocsMLP(), torch.ones(2, 4), "does not fit this model at layer 'layer1", None),
        (nn.Sequential(nn.Conv1d(1, 1, 1)), 8, "give a tensor as batch", None),
        (nn.ReLU(), torch.ones(2, 8), "ReLU has no parameters", True),
        (Encoder(), torch.ones(2, 8), "does not fit this model at its own", True),
    ],
)
def test_a_model_or_batch_that_does_not_fit_is_refused(model, batch, reason, tree):
    state = LabState(model, batch, tree=tree)
    for _ in range(2):  # it is said each time
        with pytest.raises(ValueError, match=reason):
            state.show()
    assert state.plan == Plan() and state.finding == ""


def test_a_model_a_batch_with_targets_and_a_loss_may_be_given():
    plan, batch = Plan.alone(["layer2"]), (torch.randn(8, 1024), torch.arange(8))
    model = DocsMLP()
    state = shown(model, batch)
    answer(state, plan)
    assert state.history[-1] == predict(model, batch, plan)

    def loss(output):
        return output.square().mean()

    for tree in (False, True):
        state = shown(model, batch[0], tree=tree, options={"loss": loss})
        answer(state, plan)
        assert state.history[-1] == predict(model, batch[0], plan, loss=loss)


def test_a_measurement_lands_in_note_reports_and_history():
    state = small_state()
    answer(state, Plan((("layer1", "layer2"),)))
    assert "the measurement follows" in state.note and state.measured_unasked
    predicted = state.history[-1]
    steps = sum(1 for _ in state.measuring())
    assert steps > 16, "one training step a turn"
    report = state.history[-1]
    assert report.source == "measured" and report.peak_bytes == predicted.peak_bytes
    assert "as predicted" in state.note
    assert f"median of {report.repeats} runs" in state.note
    assert not state.measured_unasked
    before, after = state.reports
    assert (before.source, after.step_ms) == ("measured", report.step_ms)
    assert after.timeline is predicted.timeline


def test_a_tree_measures_a_model_called_by_keywords():
    ids = torch.randint(500, (2, 8))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    state = shown(Encoder(), batch, device="cpu")
    answer(state, Plan.alone(["layers.1"]))
    predicted = state.history[-1]
    for _ in state.measuring():
        pass
    assert state.history[-1].peak_bytes == predicted.peak_bytes
    assert "as predicted" in state.note


def test_a_step_too_large_for_this_cpu_is_refused_with_what_would_do():
    if torch.cuda.is_available():
        pytest.skip("a GPU measures it")
    state = shown(uniform_mlp, 8192)
    assert "are too much to measure on this CPU" in state.note
    with pytest.raises(ValueError, match="take a batch or a width that needs at most"):
        next(state.measuring())


def test_a_model_without_data_is_predicted_only():
    with torch.device("meta"):
        model = GPT(width=32, vocabulary=100)
    state = shown(model, torch.empty(2, 16, dtype=torch.long, device="meta"))
    assert "this model has no data" in state.note
    with pytest.raises(ValueError, match="this model has no data"):
        next(state.measuring())


def test_what_is_not_safe_is_said():
    state = shown(ResNet((1, 1), 4), torch.randn(2, 3, 8, 8))
    assert state.caution == ""
    assert answer(state, Plan.alone(["layers.0"])).startswith("layer 0 alone")
    assert "Careful: 'layers.0.norm1' updates its running" in state.caution
    with pytest.raises(ValueError, match="'stem.2' changes its input in place"):
        answer(state, Plan.alone(["layers.0", "stem.2"]))
    assert state.shown == Plan.alone(["layers.0"])


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
        ((("blocks.2",),), "block 2 alone"),
        (
            (("blocks.0", "blocks.1"), ("blocks.4",)),
            "blocks 0–1 as one segment; 4 alone",
        ),
        ((("0", "1"), ("3",)), "layers 0–1 as one segment; 3 alone"),
    ],
)
def test_plans_are_described_as_one_would_say_them(segments, words):
    assert describe(Plan(segments)) == words
