"""Read the bytes and the costs of a chain's stages off three marked steps.

Levels are counted from where a stage starts, so that what earlier stages hold does not
matter; gradients that later stages have brought by then are taken off as well.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from helpers.checkpointing import Plan
from helpers.planner._marks import BEFORE, Marks
from helpers.planner.chain import Chain, Stage
from helpers.timeline import Allocation, tensors_in
from helpers.units import round_to_block


@dataclass(frozen=True)
class Runs:
    """Three steps of one model: nothing checkpointed, each stage alone, many joined."""

    model: nn.Module
    batch: object
    plain: Marks
    alone: Marks
    joined: Marks
    starting: frozenset[str]  # stages that may be a segment's first
    joined_plan: Plan

    def chain(self) -> Chain:
        """Put the chain together."""
        plain, last = self.plain, self.names[-1]
        levels, end = plain.levels, plain.end(last)
        phases = [phase for _, _, phase in plain.log]
        after = phases.index("optimizer") if "optimizer" in phases else len(phases)
        own = (run.brief.intersection(run.outputs[last]) for run in (self.alone, plain))
        alone, kept = (sum(it.bytes for it in brief) for brief in own)
        beside = self.beside(self.alone.end(last)) - (alone - kept)
        loss_peak = plain.peak(end, plain.backward[last].start) - levels[end]
        return Chain(
            tuple(map(self.stage, self.names)),
            static_bytes=levels[self.start],
            loss_forward_bytes=loss_peak + beside,
            loss_beside_bytes=alone - kept,
            backward_bytes=self.backward_bytes,
            other_peak_bytes=max(levels[: self.start + 1] + levels[after:]),
        )

    def stage(self, name: str) -> Stage:
        """Read one stage's numbers."""
        plain, forward, freed = self.plain, self.plain.forward[name], self.freed(name)
        level = plain.lasting[forward.start] + self.gradients_after(name)
        beside = self.beside(self.alone.forward[name].start)
        starts, joins = name in self.starting, self.first(name) != name
        return Stage(
            name,
            output_bytes=self.alone.output_bytes(name),
            kept_bytes=self.rise(name, plain.end(name)) + freed,
            forward_peak_bytes=plain.forward_peak(name) + beside,
            backward_peak_bytes=plain.peak(*plain.backward[name]) - level,
            gradient_bytes=self.gradients[name],
            recompute_cost=forward.flops,
            freed_input_bytes=freed,
            shares_input=plain.inputs.get(name) in plain.outputs[name],
            starts=starts,
            joins=joins,
            **(self.alone_in_segment(name) if starts else {}),
            **(self.later_in_segment(name) if joins else {}),
        )

    def alone_in_segment(self, name: str) -> dict[str, int]:
        """Read what a stage does as the first and last of its segment."""
        alone, plain = self.alone, self.plain
        start, backward = alone.forward[name].start, alone.backward[name]
        level = alone.lasting[start] + self.gradients_after(name)
        gradient = max(alone.levels[backward.start] - level, 0)
        # Where the stage before keeps its output, this one's input stays.
        goes = plain.frees_input(name, *plain.backward[name])
        stays = None if goes else alone.inputs.get(name)
        levels = alone.levels_in(name, "backward", stays) or [level]
        again = alone.levels_in(name, "recompute") or [level + gradient]
        return {
            "first_forward_peak_bytes": alone.forward_peak(name) + self.beside(start),
            "last_forward_peak_bytes": max(again) - level - gradient,
            "first_backward_peak_bytes": max(levels) - level,
            "last_recompute_cost": backward.flops,
            "output_gradient_bytes": gradient,
        }

    def later_in_segment(self, name: str) -> dict[str, int]:
        """Read what a stage does in a segment that another one starts."""
        joined, first, start = (
            self.joined,
            self.first(name),
            self.plain.forward[name][0],
        )
        level = joined.lasting[joined.forward[first].start] + self.gradients_after(name)
        level += self.rise(first, start) + self.freed(first)
        levels = joined.levels_in(name, "backward") or [level]
        return {"later_backward_peak_bytes": max(levels) - level}

    @property
    def start(self) -> int:
        """The place where the model's forward begins."""
        return self.plain.forward[BEFORE].start

    @functools.cached_property
    def names(self) -> list[str]:
        """The stages; what comes before the first layer is one if it does anything."""
        before, *layers = self.plain.forward
        return [before] * (self.plain.end(before) > self.start) + layers

    def first(self, name: str) -> str:
        """Name the first stage of its segment in the joined plan; itself in none."""
        return next((s[0] for s in self.joined_plan.segments if name in s), name)

    @functools.cached_property
    def gradients(self) -> dict[str, int]:
        """Each stage's parameter gradients; a shared one belongs to the last stage."""
        seen: set[nn.Parameter] = set()
        found = dict.fromkeys(self.names, 0)
        for name in reversed(self.names):
            if name != BEFORE:
                own = {*self.model.get_submodule(name).parameters()} - seen
                found[name] = _bytes(p for p in own if p.requires_grad)
                seen |= own
        inputs = [x for x in tensors_in(self.batch) if x.requires_grad]
        late = self.plain.late - seen if BEFORE in self.names else ()
        found[self.names[0]] += _bytes([*inputs, *late])
        return found

    @functools.cached_property
    def backward_bytes(self) -> int:
        """What is alive all through backward, besides those gradients."""
        levels, end = self.plain.levels, self.plain.backward[BEFORE].stop
        return levels[end] - levels[self.start] - sum(self.gradients.values())

    def gradients_after(self, name: str) -> int:
        """Count what backward holds by the time that it comes to a stage."""
        following = self.names[self.names.index(name) + 1 :]
        return self.backward_bytes + sum(map(self.gradients.get, following))

    def beside(self, place: int) -> int:
        """Count what lies beside the chain, where all earlier layers are checkpointed.

        Where they are not, some of it may be saved, and is counted twice in forward.
        """
        return self.alone.levels[place] - self.alone.lasting[place]

    def rise(self, name: str, stop: int) -> int:
        """Say by how much the plain level rises from a stage's start to a place."""
        return self.kept_levels[stop] - self.kept_levels[self.plain.forward[name].start]

    @functools.cached_property
    def kept_levels(self) -> list[int]:
        """The plain levels without what is brief, unless a checkpoint saves it.

        What plain layers let go of, a checkpoint may save as its argument.
        """
        plain, alone = self.plain, self.alone
        saved: set[Allocation] = {
            it
            for name, outputs in plain.outputs.items()
            for it, again in zip(outputs, alone.outputs[name], strict=False)
            if it in plain.brief and again not in alone.brief
        }
        return plain.levels_without(plain.brief - saved)

    def freed(self, name: str) -> int:
        """Count its input's bytes where they are freed as soon as it has run."""
        plain = self.plain
        freed = plain.frees_input(name, plain.forward[name].start, plain.end(name))
        return plain.inputs[name].bytes if freed else 0


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(round_to_block(tensor.nbytes) for tensor in tensors)
