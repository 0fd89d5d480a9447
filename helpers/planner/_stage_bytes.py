"""Read the bytes and the costs of a chain's stages off three marked steps.

Levels are counted from where a stage starts, so that what earlier stages hold does not
matter; gradients that later stages have brought by then are taken off as well.
"""

from collections.abc import Iterable

import torch
from torch import nn

from helpers.checkpointing import Plan
from helpers.planner._marks import BEFORE, MarkedStep
from helpers.planner.chain import Chain, Stage
from helpers.timeline import Allocation, tensors_in
from helpers.units import round_to_block


class Reader:
    """Reads a chain's numbers off the three runs."""

    def __init__(
        self,
        model: nn.Module,
        batch: object,
        plain: MarkedStep,
        alone: MarkedStep,
        joined: MarkedStep,
        joined_plan: Plan,
    ) -> None:
        self.plain, self.alone, self.joined = plain, alone, joined
        self.first = {
            name: segment[0] for segment in joined_plan.segments for name in segment
        }
        # What lies beside the chain is counted apart, unless a checkpoint saves it.
        saved = self._saved_by_checkpoints()
        self.lasting = plain.levels_without(plain.brief - saved)
        self.least = plain.levels_without(plain.brief)
        self.alone_lasting = alone.levels_without(alone.brief)
        self.joined_lasting = joined.levels_without(joined.brief)
        self.start = plain.starts[BEFORE].place
        has_before = plain.ends[BEFORE].place > self.start
        self.names = [*([BEFORE] * has_before), *plain.names]
        self.gradients = _gradient_bytes(model, plain.names)
        inputs = [tensor for tensor in tensors_in(batch) if tensor.requires_grad]
        own = {
            p for name in plain.names for p in model.get_submodule(name).parameters()
        }
        late = [p for p in plain.late if has_before and p not in own]
        self.gradients[self.names[0]] += _bytes([*inputs, *late])
        done = plain.levels[plain.backward_end.place] - plain.levels[self.start]
        self.backward_bytes = done - sum(self.gradients[name] for name in self.names)

    def chain(self) -> Chain:
        """Put the chain together."""
        levels, log, end = self.plain.levels, self.plain.tracker.log, self.plain.end
        loss_end = self.plain.backward_marks(self.names[-1])[0].place
        phases = [phase for _, _, phase in log]
        after = phases.index("optimizer") if "optimizer" in phases else len(log)
        more = self._own_beside(self.alone) - self._own_beside(self.plain)
        beside = self.beside(self.alone.end) - more
        return Chain(
            tuple(map(self.stage, range(len(self.names)))),
            static_bytes=levels[self.start],
            loss_forward_bytes=self.plain.peak(end, loss_end) - levels[end] + beside,
            loss_beside_bytes=more,
            backward_bytes=self.backward_bytes,
            other_peak_bytes=max(levels[: self.start + 1] + levels[after:]),
        )

    def stage(self, place: int) -> Stage:
        """Read one stage's numbers."""
        plain, name = self.plain, self.names[place]
        following = self.names[place + 1 :]
        start, end = plain.starts[name].place, self.place_after(name)
        beside = self.beside(self.alone.starts[name].place)
        held_gradients = self.backward_bytes + sum(map(self.gradients.get, following))
        begins, ends = plain.backward_marks(name)
        backward = plain.peak(begins.place, ends.place)
        outputs = plain.outputs[name]
        return Stage(
            name,
            output_bytes=self.alone.output_bytes(name),
            kept_bytes=self.lasting[end] - self.lasting[start] + self.freed(name),
            forward_peak_bytes=plain.peak_after_start(name) + beside,
            backward_peak_bytes=backward - self.least[start] - held_gradients,
            gradient_bytes=self.gradients[name],
            recompute_cost=plain.ends[name].forward_flops
            - plain.starts[name].forward_flops,
            freed_input_bytes=self.freed(name),
            shares_input=plain.inputs.get(name) in outputs,
            starts=self.starts(name),
            joins=self.first.get(name, name) != name,
            **self.recomputed(name, held_gradients),
        )

    def starts(self, name: str) -> bool:
        """Say whether it may be the first of a segment."""
        return name != BEFORE and name not in self.plain.in_place

    def place_after(self, name: str) -> int:
        """Find where the next stage starts, or the loss."""
        following = self.names[self.names.index(name) + 1 :]
        return self.plain.starts[following[0]].place if following else self.plain.end

    def beside(self, place: int) -> int:
        """Count what lies beside the chain, where all earlier layers are checkpointed.

        Where they are not, some of it may be saved, and is counted twice in forward.
        """
        return self.alone.levels[place] - self.alone_lasting[place]

    def _own_beside(self, run: MarkedStep) -> int:
        """Count what the last stage leaves beside the chain."""
        return sum(
            it.bytes for it in run.brief.intersection(run.outputs[self.names[-1]])
        )

    def _saved_by_checkpoints(self) -> set[Allocation]:
        """Find what plain layers let go of, and a checkpoint saves as its argument."""
        plain, alone = self.plain, self.alone
        return {
            it
            for name, outputs in plain.outputs.items()
            for it, again in zip(outputs, alone.outputs[name], strict=False)
            if it in plain.brief and again not in alone.brief
        }

    def freed(self, name: str) -> int:
        """Count its input's bytes where they are freed as soon as it has run."""
        given = self.plain.inputs.get(name)
        start, end = self.plain.starts[name].place, self.place_after(name)
        events = self.plain.tracker.log[start:end]
        freed = any(kind == "free" and it is given for kind, it, _ in events)
        return given.bytes if freed else 0

    def recomputed(self, name: str, held_gradients: int) -> dict[str, int]:
        """Read what a stage does as the first, a later and the last of a segment."""
        found, alone, joined = {}, self.alone, self.joined
        if self.starts(name):
            begins, ends = alone.backward_marks(name)
            given = alone.inputs.get(name)
            start = alone.starts[name].place
            level = self.alone_lasting[start] + held_gradients
            gradient = max(alone.levels[begins.place] - level, 0)
            # Where the stage before keeps its output, this one's input stays.
            stays = None if self.plain.frees_input_in_backward(name) else given
            backward = alone.levels_in(name, "backward", stays) or [level]
            again = alone.levels_in(name, "recompute")
            found = {
                "first_backward_peak_bytes": max(backward) - level,
                "last_recompute_cost": ends.recompute_flops - begins.recompute_flops,
                "last_forward_peak_bytes": max(again) - level - gradient
                if again
                else 0,
                "first_forward_peak_bytes": alone.peak_after_start(name)
                + self.beside(start),
                "output_gradient_bytes": gradient,
            }
        first = self.first.get(name, name)
        if first != name:
            start, here = (self.plain.starts[stage].place for stage in (first, name))
            level = self.joined_lasting[joined.starts[first].place] + held_gradients
            level += self.lasting[here] - self.lasting[start] + self.freed(first)
            backward = joined.levels_in(name, "backward") or [level]
            found["later_backward_peak_bytes"] = max(backward) - level
        return found


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(
        round_to_block(tensor.numel() * tensor.element_size()) for tensor in tensors
    )


def _gradient_bytes(model: nn.Module, names: list[str]) -> dict[str, int]:
    """Sum each stage's parameter gradients; a shared one belongs to the last stage."""
    seen: set[nn.Parameter] = set()
    found = {BEFORE: 0}
    for name in reversed(names):
        own = {p for p in model.get_submodule(name).parameters() if p.requires_grad}
        found[name] = _bytes(own - seen)
        seen |= own
    return found
