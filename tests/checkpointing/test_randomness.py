"""What notebook 06 says of randomness in passing holds beyond its one example."""

import math

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from helpers.checkpointing import Plan
from helpers.measure import measure, predict
from helpers.models import uniform_mlp

ROWS, WIDTH, CLASSES = 512, 128, 10


def dropout_gradient(p, **options):
    """Take a step through dropout, in a segment where there are options.

    Dropout is written out, so that its mask is known to draw from torch alone.
    """
    torch.manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)
    x, last = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, CLASSES)
    target = torch.randint(CLASSES, (ROWS,))

    def segment(x):
        mask = (torch.rand(ROWS, WIDTH) > p) / (1 - p)
        return torch.relu(x @ weight / WIDTH**0.5) * mask

    if options:
        hidden = checkpoint(segment, x, use_reentrant=False, **options)
    else:
        hidden = segment(x)
    logits = hidden @ last / WIDTH**0.5
    loss = torch.nn.functional.cross_entropy(logits, target)
    return loss, torch.autograd.grad(loss, weight)[0]


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
def test_a_lost_mask_leaves_the_loss_and_spoils_the_gradient_by_root_2p(p):
    loss, right = dropout_gradient(p)
    kept_loss, kept = dropout_gradient(p, preserve_rng_state=True)
    lost_loss, wrong = dropout_gradient(p, preserve_rng_state=False)
    assert torch.equal(kept, right)
    assert kept_loss == lost_loss == loss
    error = (wrong - right).norm() / right.norm()
    assert error.item() == pytest.approx(math.sqrt(2 * p), rel=0.1)


def test_numpys_generator_is_not_put_aside():
    numbers = np.random.default_rng(0)
    drawn = []

    def segment(x):
        drawn.append(torch.from_numpy(numbers.random(4)))
        return x.exp() * drawn[-1]

    x = torch.zeros(4, requires_grad=True)
    checkpoint(segment, x, use_reentrant=False).sum().backward()
    first, second = drawn
    assert not torch.equal(first, second)


def test_no_peak_counts_the_states_that_are_put_aside():
    model, x = uniform_mlp(4, 32), torch.randn(16, 32)
    plan = Plan.alone(["layer1", "layer2", "layer3"])
    peaks = {
        run(model, x, plan, device="cpu", preserve_rng_state=keep).peak_bytes
        for run in (predict, measure)
        for keep in (True, False)
    }
    assert len(peaks) == 1
