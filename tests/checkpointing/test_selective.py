"""Selective checkpointing: predicted bytes are measured ones, and what notebook 09
says of policies holds."""

import contextlib
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
)

from helpers.checkpointing import Plan
from helpers.measure import measure, predict

ADDMM = torch.ops.aten.addmm
ALONE = Plan.alone(["0", "1", "2"])
WIDTH, ROWS = 64, 512


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def blocks() -> nn.Sequential:
    return nn.Sequential(FeedForward(), FeedForward(), FeedForward())


def save(*ops):
    def policy(ctx, op, *args, **kwargs):
        saved = op in ops
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.MUST_RECOMPUTE

    return policy


def save_all(ctx, op, *args, **kwargs):
    return CheckpointPolicy.PREFER_SAVE


def up_only(ctx, op, *args, **kwargs):
    if op == ADDMM.default and args[2].shape[1] > args[2].shape[0]:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def under(policy_or_list, run=predict, **options):
    make = functools.partial(create_selective_checkpoint_contexts, policy_or_list)
    x = torch.randn(ROWS, WIDTH)
    return run(blocks(), x, ALONE, device="cpu", context_fn=make, **options)


@pytest.mark.parametrize(
    "policy_or_list",
    [save(ADDMM.default), [ADDMM.default], save(ADDMM), save_all, up_only],
    ids=["products", "list", "without default", "everything", "up"],
)
def test_a_policy_s_bytes_and_flops_are_predicted(policy_or_list):
    measured = under(policy_or_list, measure, repeats=1)
    predicted = under(policy_or_list)
    assert measured.peak_bytes == predicted.peak_bytes
    assert measured.after_forward_bytes == predicted.after_forward_bytes
    assert measured.recompute_flops == predicted.recompute_flops


def test_saved_products_are_not_run_again():
    x = torch.randn(ROWS, WIDTH)
    none, boxes = (predict(blocks, x, plan, device="cpu") for plan in (Plan(), ALONE))
    products, up = under(save(ADDMM.default)), under(up_only)
    assert products.recompute_flops == up.recompute_flops == 0 < boxes.recompute_flops
    assert boxes.peak_bytes < up.peak_bytes < products.peak_bytes < none.peak_bytes


def test_a_policy_with_an_operator_not_in_full_is_ignored():
    boxes = predict(blocks, torch.randn(ROWS, WIDTH), ALONE, device="cpu")
    ignored = under(save(ADDMM))
    assert ignored.peak_bytes == boxes.peak_bytes
    assert ignored.recompute_flops == boxes.recompute_flops


def test_a_list_with_an_operator_not_in_full_is_refused():
    with pytest.raises(ValueError, match="to be an OpOverload"):
        create_selective_checkpoint_contexts([ADDMM])


def test_saving_everything_needs_more_than_no_checkpointing():
    none = predict(blocks, torch.randn(ROWS, WIDTH), device="cpu")
    everything = under(save_all)
    assert everything.peak_bytes > none.peak_bytes
    assert everything.after_forward_bytes > none.after_forward_bytes


def wrong_arguments(ctx, op):
    return CheckpointPolicy.MUST_SAVE


def not_a_pair():
    return contextlib.nullcontext()


@pytest.mark.parametrize(
    ("context_fn", "message"),
    [
        ("everything", "context_fn='everything' is no function"),
        (save_all, "context_fn fails, TypeError: save_all.* missing 2 required"),
        (lambda: None, "context_fn returned None; .* returns two context managers"),
        (lambda: (1, 2), r"context_fn returned \(1, 2\)"),
        (not_a_pair, "context_fn returned <contextlib.nullcontext"),
        (
            functools.partial(create_selective_checkpoint_contexts, [ADDMM]),
            "context_fn fails, ValueError: Expected op in `op_list`",
        ),
        (
            functools.partial(create_selective_checkpoint_contexts, wrong_arguments),
            "at layer '0.norm': wrong_arguments.* takes 2 positional arguments",
        ),
    ],
)
@pytest.mark.parametrize("run", [predict, measure])
def test_a_wrong_context_fn_is_named(run, context_fn, message):
    model, x = blocks(), torch.randn(ROWS, WIDTH)
    with pytest.raises(ValueError, match=message):
        run(model, x, ALONE, device="cpu", context_fn=context_fn)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_context_fn_with_reentrant_checkpoints():
    with pytest.raises(ValueError, match="no place with use_reentrant=True"):
        under(save_all, use_reentrant=True)


def test_a_batch_that_does_not_fit_is_no_fault_of_the_policy():
    make = functools.partial(create_selective_checkpoint_contexts, save_all)
    with pytest.raises(ValueError, match="does not fit this model at layer '0.norm'"):
        predict(blocks(), torch.randn(4, 3), ALONE, context_fn=make)
