"""Notebook 10 begins with the reader's own model, and survives whatever that is."""

import ast
import contextlib
import io
import re
from pathlib import Path

import matplotlib
import nbformat
import pytest
import torch

from helpers import models
from tests.notebooks.exercises import Statement

PAGE = Path(__file__).parents[2] / "notebooks" / "10_your_model.ipynb"
CODE = [c.source for c in nbformat.read(PAGE, 4).cells if c.cell_type == "code"]
SETTINGS = next(place for place, cell in enumerate(CODE) if cell.startswith("model = "))

TIGHT = """
from helpers import models


def least():
    return planner.front_for(model, batch, tensors=True, **own)[0].peak_bytes
"""
LOOKS_AT_FLOATS = """
class Gated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x)) if x.max() > 1 else layer(x)
        return x


model, batch = Gated(), torch.randn(4, 8)
"""
OWN_STEP = """
def step(model, batch, optimizer):
    optimizer.zero_grad()
    for x in batch.chunk(2):
        model(x).square().mean().backward()
    optimizer.step()


model, batch = models.DocsMLP(), torch.randn(64, 1024)
own = {"step": step, "optimizer": torch.optim.AdamW}
budget = least()
"""
BERT = """
config = transformers.BertConfig(
    vocab_size=50, hidden_size=16, intermediate_size=32, num_attention_heads=2,
    num_hidden_layers=2,
)
model = transformers.BertForMaskedLM(config)
ids = torch.randint(50, (2, 8))
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
budget = least()
"""
ENCODER = """
model = models.Encoder(2, 16, 2, 50)
ids = torch.randint(50, (2, 8))
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.tensor([0, 1])
own = {"loss": lambda output, target: output[0].sum() + output[1].square().sum()}
budget = least()
"""
GPT = """
model = models.GPT(2, 16, 2, 50, 8, tied=True)
batch = (torch.randint(50, (2, 8)), torch.randint(50, (2, 8)))
own, budget = {"autocast": torch.bfloat16}, "1 KiB"
"""
README = PAGE.parents[1] / "README.md"
MODELS = {  # what is put into the settings, and a line of what must be said
    "a U-Net": (
        "model, batch = models.UNet(3, 8), torch.randn(2, 3, 16, 16)\nbudget = least()",
        "'down.1' is not fed what 'down.0' returns",
    ),
    "an encoder of tuples": (ENCODER, "'layers.0' does not return a tensor"),
    "a GPT, and too small a budget": (GPT, "no plan fits into 1.0 KiB"),
    "the docs' MLP, in a step of its own": (OWN_STEP, "layer1"),
    "a ResNet with BatchNorm": (
        "model, batch = models.ResNet((1, 1), 8), torch.randn(2, 3, 8, 8)\n"
        "budget = least()",
        "updates its running statistics",
    ),
    "what looks at floats": (LOOKS_AT_FLOATS, "looks at values"),
    "a BERT, as a Hugging Face batch": (BERT, "bert.encoder.layer.0"),
    "one layer, with nothing inside": (
        "model, batch = torch.nn.Linear(8, 8), torch.randn(4, 8)",
        "# nothing is checkpointed",
    ),
    "nothing to train": (
        "model, batch = torch.nn.ReLU(), torch.randn(4, 8, requires_grad=True)",
        "nothing to train",
    ),
}


def readers_cells() -> list[int]:
    """Find the cells that speak of the reader's model: they read what it made."""
    of_model, found = set(), []
    for place, cell in enumerate(CODE):
        statements = [Statement.of(tree) for tree in ast.parse(cell).body]
        for statement in statements:
            is_function = isinstance(statement.tree, ast.FunctionDef | ast.ClassDef)
            if place == SETTINGS or (statement.reads & of_model and not is_function):
                of_model |= statement.binds
                found.append(place)
            else:
                of_model -= statement.binds
    return sorted(set(found))


def test_the_readers_model_comes_first_and_the_rest_brings_its_own():
    first, *places = readers_cells()
    assert first == SETTINGS == 1
    (code,) = (place for place in places if ".code(model)" in CODE[place])
    assert places[-1] == code < len(CODE) / 2
    page = "\n".join(CODE[first : code + 1])
    for part in ("predict", "inspect_model", "plan_for", "front_for", "LayerLab"):
        assert part in page
    assert "verify" in page and "measure," in page


@pytest.mark.parametrize("settings, line", MODELS.values(), ids=MODELS)
def test_the_page_survives(settings, line):
    matplotlib.use("Agg")
    names = {"__name__": "__main__"}
    *_, last = readers_cells()
    cells = CODE[: last + 1]
    cells.insert(SETTINGS + 1, f"{TIGHT}\n{settings}")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for cell in cells:
            exec(compile(cell, "cell", "exec"), names)
    matplotlib.pyplot.close("all")
    assert line in printed.getvalue()
    said = [text for text in printed.getvalue().splitlines() if "values" in text]
    assert bool(said) == (settings is LOOKS_AT_FLOATS)
    assert all(len(text) < 250 for text in said)
    predictable = names["plain"] is not None
    assert bool(names["front"]) == predictable
    assert f"measured{' equals predicted: True' * predictable}" in printed.getvalue()
    counted_twice = "updates its running statistics" in line
    wanted = "buffers differ" if counted_twice else "gradients and buffers as without"
    assert str(names["same"]).startswith(wanted)


def test_the_lines_in_the_readme_run(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    model, batch = models.DocsMLP(), torch.randn(8, 1024)
    exec(code.replace("8 GiB", "128 MiB"), {"model": model, "batch": batch})
    said = capsys.readouterr().out
    for words in ("layer3", "bit by bit", "# nothing is checkpointed"):
        assert words in said
