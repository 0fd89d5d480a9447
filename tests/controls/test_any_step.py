"""Labs over a reader's own step and model: also where these cannot be predicted."""

import html
from collections import OrderedDict
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from helpers.checkpointing import Plan
from helpers.controls import BudgetLab, LabState, LayerLab, state, ticks
from helpers.measure import predict
from helpers.models import MLP, uniform_mlp
from helpers.models.architectures import GPT, ResNet
from helpers.planner import Planner

WIDTHS = [64] * 5
PLAN = Plan((("layer1", "layer2"),))


def two_losses(model, batch, optimizer):
    """Take two batches apart, and clip what both give."""
    if optimizer:
        optimizer.zero_grad()
    model(batch["one"]).sum().backward()
    model(batch["other"]).square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if optimizer:
        optimizer.step()


def pair(rows: int = 16) -> dict[str, torch.Tensor]:
    return {"one": torch.randn(rows, 64), "other": torch.randn(2 * rows, 64)}


class Experts(nn.Module):
    """Each row goes to one expert, which values tell."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 4)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen, out = self.gate(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(x[rows]))
        return x + out


def mixture(blocks: int = 2, width: int = 16) -> nn.Module:
    ends = nn.Linear(width, width), nn.Linear(width, 3)
    return nn.Sequential(ends[0], *(Experts(width) for _ in range(blocks)), ends[1])


class Remembers(nn.Module):
    """Has a hidden state in a plain tensor attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.level = nn.Linear(16, 16), torch.zeros(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.level = (0.5 * self.level + self.linear(x).mean(0)).detach()
        return torch.tanh(self.linear(x) * (1 + self.level))


def measured(state: LabState, plan: Plan) -> LabState:
    """Tick a plan, and measure it, predicted or not."""
    if state.model is None:
        state.set()
    state.plan = plan
    for _ in state.measuring():
        pass
    return state


def said(lab: LayerLab | BudgetLab) -> str:
    """Read what the panel says, as a reader sees it."""
    seen = Seen()
    seen.feed(lab.readout.value)
    return seen.text


class Seen(HTMLParser):
    """Notes text and tags as a browser would make them."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.tags, self.attributes = "", [], []

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += attrs


# The reader's own step ---------------------------------------------------------------


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_a_step_and_an_optimizer_of_the_reader_s_are_predicted_and_measured(tree, own):
    model = MLP(WIDTHS, "gelu")
    made = torch.optim.AdamW(model.parameters()) if own else torch.optim.AdamW
    options = {"step": two_losses, "optimizer": made}
    state = LabState(model, pair(), device="cpu", tree=tree, options=options)
    before = [p.clone() for p in model.parameters()]
    plan = Plan.alone(["layer1", "layer2"])
    report = predict(model, pair(), plan, device="cpu", **options)
    measured(state, plan)
    assert state.tried[plan] == report and report.categories["optimizer_state"]
    assert state.history[-1].peak_bytes == report.peak_bytes
    assert "as predicted" in state.note and "gradients as without" in state.note
    assert all(map(torch.equal, before, model.parameters()))
    assert not own or not made.state


def test_neighbours_join_in_a_step_that_calls_the_model_twice():
    model, batch = MLP(WIDTHS, "gelu"), pair()
    state = LabState(model, batch, options={"step": two_losses}, tree=True)
    state.set()
    state.plan = PLAN
    state.show()
    assert state.history[-1] == predict(model, batch, PLAN, step=two_losses)


def test_a_loss_autocast_and_an_optimizer_reach_every_answer():
    def loss(output):
        return output.square().mean()

    options = {"loss": loss, "autocast": torch.bfloat16}
    options["optimizer"] = torch.optim.SGD
    model, x = MLP(WIDTHS, "gelu"), torch.randn(64, 64)
    for lab in (
        LayerLab(model, x, **options),
        BudgetLab(model, x, tree=True, **options),
    ):
        lab.plan = PLAN
        assert lab.history[-1] == predict(model, x, PLAN, **options)
    assert lab.state.ticks.inspection.report == predict(model, x, **options)


def test_a_budget_is_planned_for_the_reader_s_step():
    def one_batch(model, batch, optimizer):
        model.zero_grad()
        model(batch["one"]).square().mean().backward()

    panel = BudgetLab(MLP(WIDTHS, "gelu"), pair(512), step=one_batch)
    assert len(panel.front) > 2
    for peak_bytes, _, plan in panel.front:
        report = predict(MLP(WIDTHS, "gelu"), pair(512), plan, step=one_batch)
        assert report.peak_bytes == peak_bytes


def test_a_batch_without_data_is_predicted_only():
    state = LabState(MLP(WIDTHS, "gelu"), torch.empty(8, 64, device="meta"))
    state.show()
    assert "this batch has no data" in state.note and not state.measured_unasked
    with pytest.raises(ValueError, match="this batch has no data"):
        next(state.measuring())


# What a plan does to gradients -------------------------------------------------------


def test_a_measurement_says_that_gradients_are_as_without_in_three_steps_more():
    state = LabState(lambda: MLP(WIDTHS, "gelu"), 256)
    state.show()
    alone = sum(1 for _ in state.measuring())
    assert "gradients" not in state.note  # there is nothing to compare
    state.plan = PLAN
    assert sum(1 for _ in state.measuring()) <= 2 * alone + 3
    assert state.note.endswith("; gradients as without") and state.caution == ""


def test_gradients_that_differ_are_an_alarm():
    model = nn.Sequential(nn.Linear(16, 16), Remembers(), nn.Linear(16, 4))
    state = LabState(model, torch.randn(64, 16), tree=True)
    measured(state, Plan.alone(["1"]))
    assert ". Careful: gradients differ: " in state.caution
    assert " by 0." in state.caution and "changes its attribute" in state.caution
    assert "gradients as without" not in state.note
    assert not state.answers.verified[Plan.alone(["1"])].same
    measured(state, Plan.alone(["0"]))
    assert "gradients as without" in state.note and "differ" not in state.caution


def test_a_flat_lab_that_looks_for_no_hazards_gives_the_alarm_as_well():
    model = nn.Sequential(nn.Linear(16, 16), Remembers(), nn.Linear(16, 4))
    lab = LayerLab(model, torch.randn(64, 16), tree=False)
    lab.boxes["1"].value = True
    assert "Careful" not in said(lab)
    lab.measure_button.click()
    assert ". Careful: gradients differ: " in said(lab)


def test_statistics_that_count_twice_are_no_alarm_about_gradients():
    state = LabState(ResNet((1, 1), 4), torch.randn(2, 3, 8, 8))
    measured(state, Plan.alone(["layers.0"]))
    assert "; gradients as without; buffers differ: layers.0." in state.note
    assert "gradients differ" not in state.caution


# A model that cannot be predicted ----------------------------------------------------


@pytest.mark.parametrize("tree", [False, True])
def test_what_looks_at_values_is_measured_and_shown(tree):
    state, plan = LabState(mixture(), torch.randn(64, 16), tree=tree), Plan.alone(["1"])
    for _ in range(2):
        with pytest.raises(ValueError, match="layer '1.* looks at values"):
            state.show()
    assert state.finding == "" and {"0", "1", "2", "3"} <= {
        *state.ticks.inspection.layers
    }
    measured(state, plan)
    report, base = state.measured[plan]
    assert report.source == base.source == "measured"
    assert state.finding.startswith("layer 1 alone: peak ")
    assert "no prediction can tell" in state.note
    assert "gradients as without" in state.note
    assert [one.source for one in state.reports] == ["measured"] * 2
    assert state.answers.kept[0] != state.answers.kept[1]
    state.plan = Plan()
    state.show()  # it was measured as well
    assert state.finding.startswith("no checkpointing") and len(state.history) == 2
    measured(state, plan)
    assert "no prediction can tell" in state.note
    with pytest.raises(ValueError, match="looks at values"):
        state.plan = Plan.alone(["0"])
        state.show()
    assert state.shown == plan


@pytest.mark.parametrize("tree", [False, True])
def test_a_panel_without_a_prediction_works_by_clicks(tree):
    lab = LayerLab(mixture, torch.randn(64, 16), {"blocks": 2}, tree=tree)
    assert "looks at values" in said(lab) and "measure it" in said(lab)
    assert lab.picture.value == "" and "keeps" not in lab.rows.children[0].kept.value
    assert lab._repr_mimebundle_()["text/plain"] == said(lab)
    lab.boxes["1"].value = lab.boxes["2"].value = True
    assert not lab.joins["2"].disabled
    lab.joins["2"].value = True
    assert lab.plan == Plan((("1", "2"),)) and "looks at values" in said(lab)
    lab.measure_button.click()
    assert lab.finding.startswith("layers 1–2 as one segment: peak ")
    assert lab.finding in said(lab) and f'alt="{lab.finding}"' in lab.picture.value
    assert "keeps 0 B" in lab.rows.children[1].kept.value
    lab.controls["blocks"].value = 3
    assert lab.settings == {"blocks": 3} and "looks at values" in said(lab)
    assert lab.picture.value == "", "no picture of other sizes stays"
    assert "4" in lab.boxes and lab.measure().plan == Plan((("1", "2"),))
    lab.controls["blocks"].value = 2
    assert "no prediction can tell" in said(lab)
    lab.shortcuts["none"].click()
    assert lab.finding.startswith("no checkpointing")


def test_a_budget_for_what_cannot_be_predicted_is_refused_and_boxes_work():
    panel = BudgetLab(mixture(), torch.randn(64, 16))
    assert panel.slider.disabled and panel.field.disabled and panel.least.disabled
    panel.boxes["1"].value = True
    panel.measure_button.click()
    assert panel.finding.startswith("layer 1 alone") and panel.finding in said(panel)
    assert "looks at values" in panel.verdict.value and panel.slider.disabled


# A model that fails ------------------------------------------------------------------


@pytest.mark.parametrize("tree", [False, True])
def test_after_a_first_failure_another_size_works(tree):
    x = torch.randn(8, 64)
    lab = LayerLab(uniform_mlp, x, {"depth": 3, "width": 32}, tree=tree)
    assert "does not fit this model at layer 'layer1" in said(lab)
    lab.boxes["layer2"].value = True
    lab.measure_button.click()
    assert "does not fit this model at layer 'layer1" in said(lab)
    lab.controls["width"].value = 64
    assert lab.finding.startswith("layer 2 alone") and lab.finding in said(lab)
    picture = lab.picture.value
    lab.controls["width"].value = 48
    assert "does not fit" in said(lab) and lab.controls["width"].value == 64
    assert lab.picture.value == picture and lab.state.values["width"] == 64
    lab.boxes["layer1"].value = True
    assert lab.finding.startswith("layers 1, 2 each alone") and lab.finding in said(lab)


class Odd(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (KeyError("x"), "KeyError: 'x'"),
        (Odd("of another kind\nand more"), "Odd: of another kind"),
        (Odd(), "Odd"),
        (ValueError("so it is"), "so it is"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_factory_that_fails_is_one_sentence_and_another_try_works(error, sentence):
    fails = [True]

    def make() -> nn.Module:
        if fails:
            raise error
        return MLP(WIDTHS, "gelu")

    lab = LayerLab(make, 16)
    for press in (lab.measure_button, lab.shortcuts["each alone"]):
        press.click()
        assert said(lab) == sentence
    fails.clear()
    lab.shortcuts["none"].click()
    assert lab.finding.startswith("no checkpointing") and len(lab.boxes) == 4


def test_a_step_that_fails_is_one_sentence():
    def wrong(model, batch, optimizer):
        return model(batch)

    for lab in (LayerLab, BudgetLab):
        panel = lab(MLP(WIDTHS, "gelu"), torch.randn(8, 64), step=wrong)
        panel.boxes["layer1"].value = True
        assert "the step never calls backward" in said(panel)
        panel.measure_button.click()
        assert "the step never calls backward" in said(panel)


def test_a_join_makes_right_what_was_refused():
    inner = nn.ReLU(inplace=True)
    model = nn.Sequential(nn.Linear(16, 16), inner, nn.Linear(16, 16))
    lab = LayerLab(model, torch.randn(8, 16), tree=True)
    lab.boxes["0"].value = lab.boxes["1"].value = True
    assert "changes its input in place" in said(lab)
    lab.measure_button.click()
    assert "changes its input in place" in said(lab)
    lab.joins["1"].value = True
    assert lab.finding.startswith("layers 0–1 as one segment") and lab.finding in said(
        lab
    )


# An interrupt ------------------------------------------------------------------------


@pytest.fixture
def interrupts(monkeypatch) -> set[str]:
    """Name what the next call of is interrupted."""
    waiting: set[str] = set()

    def interruptible(name: str, owner=state):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            if name in waiting:
                waiting.discard(name)
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    interruptible("predict")
    interruptible("meta_model")
    interruptible("inspect_model", ticks)
    return waiting


@pytest.mark.parametrize("where", ["predict", "inspect_model"])
def test_an_interrupt_of_the_first_prediction_leaves_a_panel_to_work_with(
    interrupts, where
):
    interrupts.add(where)
    lab = LayerLab(GPT(2, 32, vocabulary=50, context=16), torch.randint(50, (2, 16)))
    assert not interrupts and "stopped" in said(lab)
    lab.shortcuts["each alone"].click()
    lab.shortcuts["each alone"].click()
    assert lab.finding.startswith("blocks 0, 1 each alone") and lab.finding in said(lab)
    assert lab.rows.children and lab.boxes["blocks.0"].value


@pytest.mark.parametrize("where", ["predict", "inspect_model", "meta_model"])
def test_an_interrupt_of_another_size_puts_the_fields_back(interrupts, where):
    lab = LayerLab(uniform_mlp, 64, {"depth": 3, "width": 32}, tree=True)
    lab.boxes["layer2"].value = True
    before = lab.finding
    interrupts.add(where)
    lab.controls["depth"].value = 5
    assert not interrupts and "stopped" in said(lab)
    assert lab.controls["depth"].value == 3 and lab.settings["depth"] == 3
    assert len([n for n in lab.boxes if "." not in n]) == 4 and lab.finding == before
    lab.controls["depth"].value = 5
    assert lab.settings["depth"] == 5 and lab.finding in said(lab) != ""


def test_an_interrupt_of_a_flip_is_made_good_by_the_next(interrupts):
    lab = LayerLab(lambda: MLP(WIDTHS, "gelu"), 64)
    interrupts.add("predict")
    lab.boxes["layer2"].value = True
    assert "stopped" in said(lab)
    lab.boxes["layer3"].value = True
    assert lab.finding.startswith("layers 2, 3 each alone") and lab.finding in said(lab)


def test_an_interrupted_front_is_found_later(monkeypatch):
    real, calls = Planner.front, []

    def front(*args):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(Planner, "front", front)
    panel = BudgetLab(lambda: MLP(WIDTHS * 3, "gelu"), 64)
    assert "stopped" in said(panel) and not panel.front and not panel.verdict.value
    panel.boxes["layer1"].value = True
    assert len(panel.front) > 1 and not panel.slider.disabled


# Names -------------------------------------------------------------------------------

NAMES = [
    "it's",
    'say "so"',
    "<b>bold</b>",
    "<script>alert(1)</script>",
    "new\nline",
    "line\u2028separator",
    "$x^2$ $",
    "a & b &amp;",
    "%s {0} \\",
]


@pytest.mark.parametrize("tree", [False, True])
def test_names_of_every_kind_are_shown_as_they_are(tree):
    layers = OrderedDict((name, nn.Linear(16, 16)) for name in NAMES)
    layers[NAMES[2]] = Remembers()
    lab = LayerLab(nn.Sequential(layers), torch.randn(8, 16), tree=tree)
    boxes = [row.box for row in lab.rows.children]
    assert [box.description for box in boxes] == NAMES
    assert not any(box.description_allow_html for box in boxes)
    for name in NAMES:
        lab.shortcuts["none"].click()
        lab.boxes[name].value = True
        assert f"{name} alone: peak" in lab.finding and lab.finding in said(lab)
        picture, marks = Seen(), Seen()
        picture.feed(lab.picture.value)
        assert (
            picture.tags == ["img"] and dict(picture.attributes)["alt"] == lab.finding
        )
        for row in lab.rows.children:
            marks.feed(row.kept.value)
        assert {*marks.tags} <= {"span"}
        compile(lab.plan.code(lab.state.model), "printed", "exec")
    lab.plan = Plan.alone([NAMES[2]])
    lab.measure_button.click()
    assert "gradients differ" in said(lab) and "<b>" in html.unescape(lab.readout.value)
    assert "<b>" not in lab.readout.value
