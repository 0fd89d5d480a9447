"""A chain of layers in numbers: what each needs, and what a plan over them needs.

x₀ → x₁ → … → x_N → loss. A plan keeps some stages as they are and cuts the others
into checkpointed segments l..r. Its peak is the largest of the sums below, above what
is static, and is found without running anything; whether that is right is for a dry
run to say. Stage i has output a_i and kept k_i bytes, forward and backward peaks fp_i
and bp_i; c is what a checkpoint call holds, H what earlier pieces hold, and G_i what
backward holds when it comes to stage i, later stages' parameter gradients:

- kept i: H + fp_i and H + G_i + bp_i; then H += k_i
- checkpointed l..r, forward: H + c + max_i(fp_i + [i > l]·a_{i−1})
- recompute: H + c + G_r + a_r + max_i(Σ_{l≤j<i} k_j + fp_i)
- backward: H + c + max_i(G_i + Σ_{l≤j<i} k_j + bp_i); then H += a_r + c
- the loss: H + max(its forward, its backward − a_N if N is checkpointed)

Segments of a chain: Chen et al., "Training deep nets with sublinear memory cost",
arXiv 1604.06174. Stages that differ, and their peaks: Beaumont, Eyraud-Dubois,
Herrmann, Joly, Shilova, "Optimal checkpointing for heterogeneous chains", ACM TOMS
2024, arXiv 1911.13214; they also nest segments, which is not done here.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction

import torch

from helpers.checkpointing import Plan
from helpers.units import format_bytes

NEVER = 2**60  # bytes that no machine has


@dataclass(frozen=True)
class Stage:
    """One layer of a chain: its bytes, and what it costs to run it again.

    The peaks count from the level at the stage's start, H: in forward from what earlier
    stages hold, in backward from the same level again, its own kept bytes on top. The
    last fields are for what a plain layer does not do; ``profile`` finds them.
    """

    name: str
    output_bytes: int  # a: its output, whole storages
    kept_bytes: int  # k: what it leaves alive where it is kept, its output included
    forward_peak_bytes: int  # fp
    backward_peak_bytes: int  # bp: kept, both gradients, its parameters' gradients
    gradient_bytes: int  # its parameters' gradients, which stay
    recompute_cost: float  # FLOPs or milliseconds
    last_recompute_cost: float | None = None  # as the last of its segment: early stop
    last_forward_peak_bytes: int | None = None  # the same, in recomputing it
    first_forward_peak_bytes: int | None = None  # checkpointed, the first time
    first_backward_peak_bytes: int | None = None  # recomputed, the segment's first
    later_backward_peak_bytes: int | None = None  # recomputed, after another stage
    output_gradient_bytes: int | None = None  # with its backward about to begin
    freed_input_bytes: int = 0  # its input, where neither it nor another keeps that
    shares_input: bool = False  # its output is a view of its input, or in its place
    starts: bool = True  # may be a segment's first; not where it changes its input
    joins: bool = True  # may share a segment with the stage before

    def __post_init__(self) -> None:
        for name, usual in (
            ("last_recompute_cost", self.recompute_cost),
            ("last_forward_peak_bytes", self.forward_peak_bytes),
            ("first_forward_peak_bytes", self.forward_peak_bytes),
            (
                "first_backward_peak_bytes",
                self.backward_peak_bytes + self.freed_input_bytes,
            ),
            ("later_backward_peak_bytes", self.backward_peak_bytes),
            ("output_gradient_bytes", self.output_bytes),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, usual)
        for name, value in vars(self).items():
            is_cost = name.endswith("_cost")
            is_number = isinstance(value, int | float | Fraction)
            if is_cost and not (is_number and 0 <= value < math.inf):
                raise ValueError(
                    f"{name} of stage {self.name!r} is a number from 0 up, "
                    f"not {value!r}"
                )
            if name.endswith("_bytes") and not isinstance(value, int):
                raise ValueError(
                    f"{name} of stage {self.name!r} is a whole number, not {value!r}"
                )


@dataclass(frozen=True)
class Chain:
    """Stages that feed each other, and what is alive around them."""

    stages: tuple[Stage, ...]
    _: KW_ONLY
    static_bytes: int = 0  # parameters, optimizer state, batch
    loss_forward_bytes: int = 0  # the loss's peak while the last output is alive
    loss_beside_bytes: int = 0  # more of it where the last stage is checkpointed
    loss_backward_bytes: int = 0  # and in its backward, where that output can go
    per_segment_bytes: int = 0  # c: what a checkpoint call itself holds
    backward_bytes: int = 0  # alive all through backward: the loss, the output
    other_peak_bytes: int = 0  # the peak elsewhere, as in the optimizer's step
    cost_unit: str = "FLOP"  # or "ms"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise ValueError("a chain needs at least one stage")
        if len(set(self.names)) < len(self.stages):
            raise ValueError("two stages of a chain have the same name")

    def __len__(self) -> int:
        return len(self.stages)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(stage.name for stage in self.stages)

    def peak_bytes(self, plan: Plan) -> int:
        """Compute the most bytes alive at once during a step under ``plan``."""
        held, peak = 0, self.other_peak_bytes - self.static_bytes
        pieces = self._pieces(plan)
        for first, last, checkpointed in pieces:
            need, added = self.kept_needs[first], self.kept[first]
            if checkpointed:
                need = int(self.segment_needs[first, last])
                added = int(self.segment_held[first, last])
            peak = max(peak, held + need)
            held += added
        return self.static_bytes + max(peak, held + self.loss_need(pieces[-1][2]))

    def recompute_cost(self, plan: Plan) -> float:
        """Sum what backward runs again under ``plan``, in FLOPs or milliseconds."""
        return sum(
            sum(stage.recompute_cost for stage in self.stages[first:last])
            + self.stages[last].last_recompute_cost
            for first, last, checkpointed in self._pieces(plan)
            if checkpointed
        )

    def plan(self, segments: list[tuple[int, int]]) -> Plan:
        """Make a plan of segments given by their first and last stages' places."""
        return Plan(tuple(self.names[first : last + 1] for first, last in segments))

    def _pieces(self, plan: Plan) -> list[tuple[int, int, bool]]:
        """Cut the chain as ``plan`` says: (first, last, checkpointed), in order."""
        places = {name: place for place, name in enumerate(self.names)}
        for name in plan.names:
            if name not in places:
                raise ValueError(
                    f"no stage named {name!r}; this chain has: {', '.join(self.names)}"
                )
        pieces, end = [], 0
        for segment in sorted(plan.segments, key=lambda segment: places[segment[0]]):
            first, last = places[segment[0]], places[segment[-1]]
            if first < end or segment != self.names[first : last + 1]:
                raise ValueError(
                    f"{'+'.join(segment)} is no run of neighbours that no other "
                    f"segment holds; this chain has: {', '.join(self.names)}"
                )
            if last > self.reach[first]:
                raise ValueError(f"{'+'.join(segment)} cannot be one segment")
            pieces += [(place, place, False) for place in range(end, first)]
            pieces.append((first, last, True))
            end = last + 1
        return pieces + [(place, place, False) for place in range(end, len(self))]

    def loss_need(self, checkpointed: bool) -> int:
        """Say what the loss needs above what the stages hold."""
        if not checkpointed:
            return max(self.loss_forward_bytes, self.loss_backward_bytes)
        forward = self.loss_forward_bytes + self.loss_beside_bytes
        return max(forward, self.loss_backward_bytes - self.stages[-1].output_bytes)

    @functools.cached_property
    def segment_held(self) -> torch.Tensor:
        """What a segment l..r leaves held, a_r + c: N × N, row l and column r."""
        return self._outputs + self.per_segment_bytes

    @functools.cached_property
    def reach(self) -> list[int]:
        """The last stage that a segment from each stage may hold; −1 for none."""
        reach: list[int] = []
        end = len(self) - 1
        for place in reversed(range(len(self))):
            reach.append(end if self.stages[place].starts else -1)
            end = end if self.stages[place].joins else place - 1
        return reach[::-1]

    @functools.cached_property
    def kept(self) -> list[int]:
        """What each stage adds to H where it is kept: k, less what it frees."""
        return [stage.kept_bytes - stage.freed_input_bytes for stage in self.stages]

    @functools.cached_property
    def _gradients(self) -> list[int]:
        """G_i: what backward holds by the time that it comes to stage i."""
        after = [stage.gradient_bytes for stage in self.stages]
        return [self.backward_bytes + sum(after[i + 1 :]) for i in range(len(self))]

    @functools.cached_property
    def kept_needs(self) -> list[int]:
        """What each stage needs above H where it is kept."""
        return [
            max(stage.forward_peak_bytes, gradients + stage.backward_peak_bytes)
            for stage, gradients in zip(self.stages, self._gradients, strict=True)
        ]

    def _row(self, field: str) -> torch.Tensor:
        return on_cpu([getattr(stage, field) for stage in self.stages])

    @functools.cached_property
    def _outputs(self) -> torch.Tensor:
        """Bytes of x_r that are new since x_{l−1}: N × N, row l and column r."""
        shares, outputs = self._row("shares_input"), self._row("output_bytes")
        fresh = _from_first((1 - shares).expand(len(self), -1), 0)
        return torch.where(fresh.cummax(1).values > 0, outputs, 0)

    @functools.cached_property
    def segment_needs(self) -> torch.Tensor:
        """What a segment l..r needs above H: N × N, row l, column r.

        Stages before the one that runs hold their kept bytes again, and the segment's
        input is held throughout, so it is not freed where a kept stage would free it.
        A segment that must not be needs more than any machine has.
        """
        row = self._row
        gradients, freed = on_cpu(self._gradients), row("freed_input_bytes")
        kept = on_cpu([0, *self.kept]).cumsum(0)[:-1]
        # Σ_{l≤j<i} k_j: row l, column i, as all tables here until their maximum.
        again = kept[None, :] - kept[:, None] + freed[:, None] - torch.diag(freed)
        inputs = self._outputs.roll(1, 1).triu(1)
        forward = _from_first(row("first_forward_peak_bytes") + inputs)
        recompute = _from_first(again + row("forward_peak_bytes"))
        earlier = torch.cat([torch.full_like(freed, -NEVER)[:, None], recompute], 1)
        last = again + row("last_forward_peak_bytes")
        recompute = torch.maximum(earlier.cummax(1).values[:, :-1], last)
        recompute = recompute + gradients + row("output_gradient_bytes")
        peaks = row("later_backward_peak_bytes").repeat(len(self), 1)
        peaks = peaks.diagonal_scatter(row("first_backward_peak_bytes"))
        backward = _from_first(again + peaks + gradients)
        peaks = torch.maximum(forward.cummax(1).values, backward.cummax(1).values)
        needs = torch.maximum(peaks, recompute) + self.per_segment_bytes
        places = on_cpu(range(len(self)))
        allowed = (places >= places[:, None]) & (places <= on_cpu(self.reach)[:, None])
        return torch.where(allowed, needs, NEVER)

    def __repr__(self) -> str:
        return (
            f"Chain({len(self)} stages {self.names[0]} … {self.names[-1]}, "
            f"static {format_bytes(self.static_bytes)}, peak with no checkpointing "
            f"{format_bytes(self.peak_bytes(Plan()))})"
        )


def on_cpu(values: Iterable[int]) -> torch.Tensor:
    """Make a row of whole numbers, also where the default device is another."""
    return torch.tensor(list(values), dtype=torch.int64, device="cpu")


def _from_first(table: torch.Tensor, before: int = -NEVER) -> torch.Tensor:
    """Blank out, in each row, the stages before the segment's first."""
    return torch.where(torch.ones_like(table, dtype=torch.bool).triu(), table, before)
