"""What a step compiled by ``torch.compile`` under a memory budget needs.

The compiler decides by itself what to recompute: it bounds the bytes that forward saves
(``torch._functorch.config.activation_memory_budget``). Its graphs are made and run on
meta tensors here, so no C++ compiler is asked for and nothing is allocated.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch._functorch import config
from torch.utils._pytree import tree_flatten, tree_unflatten

from helpers.checkpointing import Plan
from helpers.dry_run import as_on, meta_batch, meta_model
from helpers.measure import Loss, StepReport, predict, report_of, training_step
from helpers.timeline import Timeline, record_timeline

BACKEND = "aot_eager_decomp_partition"  # forward and backward graphs, run op by op


def predict_compiled(
    model_or_factory: nn.Module | Callable[[], nn.Module],
    batch: object,
    memory_budget: float = 1.0,
    *,
    loss: Loss | None = None,
) -> StepReport:
    """Predict one training step of a model compiled under a memory budget.

    Args:
        model_or_factory, batch, loss: as in ``predict``.
        memory_budget: the share of what the compiler would save by default, 0 to 1.

    Returns:
        A report, whose ``recompute_flops`` are those that the backward graph has beyond
        an uncompiled backward.

    Raises:
        ValueError: for a budget outside 0 to 1, or a model that is not one graph.
    """
    with as_on("cpu") as imagined:
        model, batch = meta_model(model_or_factory), meta_batch(batch)
        return _report(model, batch, memory_budget, loss, imagined.record, "predicted")


def measure_compiled(
    model: nn.Module,
    batch: object,
    memory_budget: float = 1.0,
    *,
    loss: Loss | None = None,
) -> StepReport:
    """Measure the bytes of such a step on the CPU; not its time.

    Args and errors: as ``predict_compiled``, but the model and the batch are real.
    """
    report = _report(model, batch, memory_budget, loss, record_timeline, "measured")
    model.zero_grad(set_to_none=True)
    return report


def _report(
    model: nn.Module,
    batch: object,
    memory_budget: float,
    loss: Loss | None,
    record: Callable[..., Timeline],
    source: str,
) -> StepReport:
    if not 0 <= memory_budget <= 1:
        raise ValueError(f"memory_budget is a share from 0 to 1, not {memory_budget}")
    training_step(model, batch, loss)  # which says what is wrong with a batch
    x = batch[0] if isinstance(batch, tuple | list) else batch
    compiled = CompiledModel(model, x, memory_budget)
    step = training_step(compiled, batch, loss)
    step()  # the first call does more than later ones
    timeline = record(step, compiled, batch=batch)
    plain = predict(model, batch, loss=loss, device="cpu").timeline
    timeline.flops["recompute"] = timeline.flops["backward"] - plain.flops["backward"]
    return report_of(timeline, Plan(), "cpu", source)


class CompiledModel(nn.Module):
    """A model compiled for one input, whose graphs are called without Dynamo.

    Dynamo would not run them while ``record_timeline`` watches the operators.
    """

    def __init__(self, model: nn.Module, x: object, memory_budget: float = 1.0) -> None:
        """Compile it for ``x``, or for a dict of keyword arguments."""
        super().__init__()
        self.model, self._calls = model, []
        torch._dynamo.reset()  # else it would take the graphs of another budget
        with config.patch(activation_memory_budget=memory_budget):
            compiled = torch.compile(model, backend=self._compile)
            output = compiled(**x) if isinstance(x, Mapping) else compiled(x)
        torch._dynamo.reset()
        if len(self._calls) != 1:
            raise ValueError(
                f"this model is compiled into {len(self._calls)} graphs; a model that "
                "is one graph is needed"
            )
        self._leaves, self._form = tree_flatten(output)
        places = {id(made): place for place, made in enumerate(self._made)}
        self._places = [places.get(id(leaf)) for leaf in self._leaves]
        self._leaves = [None if id(one) in places else one for one in self._leaves]
        del self._made

    def _compile(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        compiled = torch._dynamo.lookup_backend(BACKEND)(graph, inputs)

        def run(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
            self._calls.append((compiled, args))
            self._made = compiled(*args)
            return self._made

        return run

    def forward(self, *_: object, **__: object) -> object:
        """Run the graph on the input that it was compiled with."""
        ((compiled, args),) = self._calls
        made = compiled(*args)
        leaves = [
            leaf if place is None else made[place]
            for leaf, place in zip(self._leaves, self._places, strict=True)
        ]
        return tree_unflatten(leaves, self._form)
