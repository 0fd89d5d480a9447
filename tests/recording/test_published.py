"""Published figures, and PyTorch's own CUDA code, are what is predicted today."""

import functools

import pytest
import torch

from helpers.checkpointing import Plan
from helpers.measure import predict
from helpers.models import GPT, DocsMLP, uniform_mlp
from helpers.recording import RecordingError
from helpers.recording.published import cuda_code, figures, times
from helpers.recording.published.tables import read
from tests.nocard.cases import GROUPS, token_loss
from tests.notebooks.navigation import ROOT
from tests.notebooks.notebook import Notebook

CARDS = ["H100", "A100", "T4"]


@pytest.fixture(scope="module")
def found():
    return figures()


@pytest.fixture(scope="module")
def timed():
    return times()


def test_each_figure_is_as_near_as_it_says(found):
    """A tenth of a per cent, or as many as its row has, which then says why."""
    within = found.within.fillna(0.1)
    far = found[found.error_percent.abs() > within]
    assert far.empty, far[["what", "published", "ours_bytes", "error_percent"]]
    unsaid = found[(within > 0.1) & (found.why.fillna("") == "")]
    assert unsaid.empty, unsaid.what
    idle = found[(within > 0.1) & (found.error_percent.abs() < within / 8)]
    assert idle.empty, idle[["what", "error_percent", "within"]]


def test_figures_say_where_they_are_from(found):
    assert len(found) >= 20 and found.link.str.startswith("https://").all()
    assert not found[["what", "source", "published", "unit"]].isna().any(axis=None)


def test_what_is_of_four_digits_and_without_cudnn_is_near(found):
    exact = found[found.within.isna()]
    assert len(exact) >= 8 and (exact.error_percent.abs() <= 0.1).all()


def test_times_are_beside_flops_of_a_forward_at_most(timed):
    assert (timed.more_time_percent > 10).all()
    assert timed.more_flops_percent.between(1, 100 / 3).all()


def test_each_case_is_equal_on_each_card():
    counts, _ = cuda_code()
    sums = counts.groupby("card").sum(numeric_only=True)
    assert sorted(sums.index) == sorted(CARDS)
    cases = {name: sum(len(c.plans) for c in make()) for name, make in GROUPS.items()}
    for card in CARDS:
        of_card = counts[counts.card == card]
        assert dict(zip(of_card.group, of_card.cases, strict=True)) == cases
    assert (counts.cases == counts.equal).all()


def example_steps() -> dict[str, tuple]:
    ids = torch.empty(8, 1024, dtype=torch.long, device="meta")
    gpt = functools.partial(GPT, 4, 512, 8, 8000, 1024, 0.1)
    how = {"loss": token_loss, "optimizer": torch.optim.AdamW}
    mlp = functools.partial(uniform_mlp, 6, 1000, "gelu", 0.1)
    return {
        "DocsMLP": (DocsMLP, torch.empty(8192, 1024, device="meta"), {}),
        "MLP": (mlp, torch.empty(1000, 1000, device="meta"), {}),
        "GPT": (gpt, (ids, ids.clone()), how | {"autocast": torch.bfloat16}),
    }


def test_examples_are_predicted_to_the_byte():
    _, examples = cuda_code()
    steps = example_steps()
    assert len(examples) == 2 * len(steps) * len(CARDS)
    for row in examples.itertuples():
        make, batch, how = steps[row.step]
        plan = Plan(tuple(map(tuple, row.plan)))
        report = predict(make, batch, plan, gpu=row.card, **how)
        assert report.allocator_peak_bytes == row.allocator_peak_bytes, row
        assert report.reserved_peak_bytes == row.reserved_peak_bytes, row


def test_the_notebook_links_each_source(found, timed):
    prose = Notebook.read(ROOT / "notebooks/13_is_it_true.ipynb").prose
    text = "\n".join(cell.source for _, cell in prose)
    assert [link for link in {*found.link, *timed.link} if link not in text] == []


@pytest.mark.parametrize("text", ["", '{"torch": "2.13.0", "counts": [', "{}"])
def test_a_part_of_a_table_is_told_in_a_sentence(text, tmp_path):
    path = tmp_path / "cuda_code.json"
    path.write_text(text)
    with pytest.raises(RecordingError, match="is no table, or only a part of one"):
        read(path, "counts")
    with pytest.raises(RecordingError, match="put back the file"):
        read(tmp_path / "nowhere.json", "counts")
