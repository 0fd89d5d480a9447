"""The same words for the same step, others for another."""

import functools
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.fingerprint import describe, describe_machine
from helpers.models import MLP

SCALE = 2


def of_source(source: str, name: str = "f") -> object:
    space = {"__name__": "reader", "F": F, "nn": nn}
    exec(source, space)
    return space[name]


def add(number):
    return lambda x: x + number


SAME = {
    "where it stands": (
        "def f(x): return x + 1",
        "\n\n# moved\ndef f(x): return x + 1",
    ),
    "a set": ("def f(x): return x in {'a', 'b'}", "def f(x): return x in {'b', 'a'}"),
    "a class": (
        "class f(nn.Module):\n def g(self): return 1",
        "\n\nclass f(nn.Module):\n def g(self): return 1",
    ),
}
OTHER = {
    "a constant": ("def f(x): return x + 1", "def f(x): return x + 2"),
    "a name": ("def f(x): return F.relu(x)", "def f(x): return F.gelu(x)"),
    "a default": ("def f(x, y=1): return y", "def f(x, y=2): return y"),
    "a keyword": ("def f(x, *, y=1): return y", "def f(x, *, y=2): return y"),
    "a global": ("n = 1\ndef f(x): return n", "n = 2\ndef f(x): return n"),
    "inside": (
        "def f(x):\n def g(): return 1\n return g",
        "def f(x):\n def g(): return 2\n return g",
    ),
    "a method": (
        "class f:\n def g(self): return 1",
        "class f:\n def g(self): return 2",
    ),
    "a static method": (
        "class f:\n @staticmethod\n def g(): return 1",
        "class f:\n @staticmethod\n def g(): return 2",
    ),
    "a property": (
        "class f:\n @property\n def g(self): return 1",
        "class f:\n @property\n def g(self): return 2",
    ),
    "a base": (
        "class b:\n n = 1\nclass f(b): pass",
        "class b:\n n = 2\nclass f(b): pass",
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_what_does_not_matter_is_not_told(name):
    first, second = map(of_source, SAME[name])
    assert describe(first) == describe(second)


@pytest.mark.parametrize("name", OTHER)
def test_what_matters_is_told(name):
    first, second = map(of_source, OTHER[name])
    assert describe(first) != describe(second)


def test_closures_partials_and_modules_are_told_apart():
    values = [add(1), add(2), functools.partial(add, 1), functools.partial(add, 2)]
    values += [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)]
    values += [F.cross_entropy, F.gelu, torch.sum, torch.optim.SGD, torch.optim.Adam]
    values += [None, 0, False, "0", 0.0, (), {}, torch.float16, {"a": 1}, {"a": 2}]
    assert len(set(map(describe, values))) == len(values)
    assert list(map(describe, values)) == list(map(describe, values))


def test_models_are_alike_whatever_their_values():
    assert describe(MLP([4, 8, 2])) == describe(MLP([4, 8, 2]))
    with torch.device("meta"):
        assert describe(MLP([4, 8, 2])) == describe(MLP([4, 8, 2]))
    tied, untied = MLP([4, 4, 4, 4]), MLP([4, 4, 4, 4])
    tied[1][0].weight = tied[0][0].weight
    assert describe(tied) != describe(untied)


def test_a_forward_put_on_a_module_is_told():
    model, other = MLP([4, 8, 2]), MLP([4, 8, 2])
    other.layer1.forward = lambda x: x
    assert describe(model) != describe(other)


def test_what_refers_to_itself_is_described():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()  # its closure holds the class
            self.layer = nn.Linear(2, 2)
            self.forward = self.run

        def run(self, x):
            return self.layer(x)

    def loop(x):
        return loop(x)

    ring = []
    ring.append(ring)
    assert len({describe(Deep()), describe(loop), describe(ring)}) == 3
    assert describe(Deep()) == describe(Deep())


def test_words_are_the_same_in_another_process():
    program = (
        "from tests.test_fingerprint import *\n"
        "print(*map(describe, (MLP([4, 8, 2]), of_source, add(1), SAME)))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1] != ""


def test_the_machine_is_named_where_time_counts():
    quick, timed = (describe_machine("cpu", measured) for measured in (False, True))
    assert timed.startswith(quick) and "threads" in timed and "threads" not in quick
    assert torch.__version__ in quick
