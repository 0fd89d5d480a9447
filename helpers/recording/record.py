"""Measure a fixed set of steps on this machine's GPU, and keep each as it comes.

It can be stopped at any moment: what is in the file is not measured again. A step that
is out of memory is noted, and the others go on.
"""

import datetime
import itertools
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from helpers.allocator import this_gpu
from helpers.checkpointing import Plan, segments_of
from helpers.measure import free_memory, measure_plans
from helpers.recording.compare import compared, summed_up
from helpers.recording.recorded import (
    OPTIMIZERS,
    PRECISIONS,
    Group,
    Recording,
    RecordingError,
    Step,
    read,
    write,
)

# The set: a few minutes on a modern GPU ---------------------------------------------
REPEATS, WARMUP = 20, 3
SAME = "gpu driver cuda torch processors threads capability".split()
SAME += "repeats warmup made_up".split()
LAYERS = [f"layer{place}" for place in range(1, 18)]
WAIST = [1024, 2048, 2048, 512, 2048, 1024]  # the widths of notebook 09, outputs apart
BOTH = ("relu", "gelu")
# Depth, activation, dropout.
SHAPES = tuple(itertools.product((8, 16), BOTH, (0.0, 0.1)))
# Plans that notebooks name, draw as a front, or reach with the slider; see `named`.
WAIST_NAMED = (
    "1 2-3 4, 1 2-3, 1-2, 2-3, 1 3 4, 1 4, 1, 4, 1 2 3 4 5 6, 1-3, 1-2 3-4 5-6"
)
NAMED = {
    6: "1, 1-2, 1-3, 1-2 3-4, 1-2 3-4 5",
    8: "1-4, 5-8, 1, 1-2, 1-3, 1-3 5-6, 1-3 5-6 8, 1-4 6-8, 7, 5-6, 3-5, 1-2 3-5, "
    "1-2 3-4 5-6, 1-2 3-4 5-6 7, 1-3 4-6, 1-3 4-5 6-7, 1-2 3-4, 2-4, 6-8",
}


def groups() -> Iterator[Group]:
    """List what is measured; first, in smaller sizes, what a CPU can bear as well."""
    for activation in BOTH:
        yield uniform(8, activation, width=256, rows=512)
    for share, rows in ((8, 1024), (1, 8192)):
        widths = [*(width // share for width in WAIST), 10]
        step = Step("MLP", {"widths": widths, "activation": "gelu"}, rows)
        yield Group(step, (Plan(), *named(WAIST_NAMED)))
    for width, rows in ((256, 512), (1024, 4096)):
        names = ["", "wide", "pointwise", "deep", "narrow", "head", "wide pointwise"]
        plans = tuple(Plan.alone(ticked.split()) for ticked in names)
        yield Group(Step("unequal_blocks", {"width": width}, rows), plans)
    for rows in (32, 8192, 65536):
        yield Group(Step("DocsMLP", {}, rows), boxes(3))
    for shape in ((6, "gelu", 0.0), *SHAPES):
        yield uniform(*shape)
    for words in itertools.product(BOTH, OPTIMIZERS, PRECISIONS):
        activation, *others = words
        if others != ["none", "float32"]:  # which is above
            step = Step("uniform_mlp", {"activation": activation}, 8192, *others)
            yield Group(step, in_pieces(8, (1, 3)))
    yield Group(Step("uniform_mlp", {}, 8192), boxes(8))
    for shape in SHAPES:
        yield uniform(*shape, width=4096, rows=2048)
    for activation in BOTH:  # the lab's own batch, at most of the work
        yield uniform(8, activation, width=4096)


def uniform(depth: int, activation: str, dropout=0.0, width=1024, rows=8192) -> Group:
    """Make a uniform MLP's group: none, each alone, all joined, in pieces, named."""
    every = (depth, width, dropout) == (16, 1024, 0.0)
    plans = in_pieces(depth, range(1, 17) if every else (1, depth, 2, 3, 4))
    if width < 4096:  # as the lab's shortcuts tick them, the last layer too
        plans += in_pieces(depth + 1, (1, depth + 1, 2, 3, 4))
        plans += () if dropout else named(NAMED.get(depth, ""))
    settings = {"depth": depth, "width": width, "activation": activation}
    step = Step("uniform_mlp", settings | {"dropout": dropout}, rows)
    return Group(step, tuple(dict.fromkeys(plans)))


def boxes(depth: int) -> tuple[Plan, ...]:
    """Make a plan for each combination of ticks, each layer alone; none comes first."""
    ticks = itertools.product((False, True), repeat=depth)
    return tuple(Plan.alone(itertools.compress(LAYERS, row)) for row in ticks)


def in_pieces(depth: int, sizes: Iterable[int]) -> tuple[Plan, ...]:
    """Join layers to segments of each size; no checkpointing comes first."""
    return Plan(), *(segments_of(LAYERS[:depth], lambda *_: True, k) for k in sizes)


def named(text: str) -> tuple[Plan, ...]:
    """Read plans off their layers' numbers: "1-2 5, 3" joins the first two of one."""
    plans = []
    for words in text.split(", "):
        ends = [span.partition("-") for span in words.split()]
        plans.append(Plan(tuple(LAYERS[int(a) - 1 : int(b or a)] for a, _, b in ends)))
    return tuple(plans)


# Measured ---------------------------------------------------------------------------


def record(
    path: Path,
    blank: Recording,
    wanted: Iterable[Group],
    device: str = "cuda",
) -> Recording:
    """Measure what is not in the file yet, and write the file after each group.

    Raises:
        RecordingError: if there is a file that does not go on from ``blank``.
        OSError: if the file cannot be written.
    """
    recording = resumed(path, blank)
    done = [replace(group, measured=()) for group in recording.groups]
    todo = [group for group in wanted if group not in done]
    for place, group in enumerate(todo, 1):
        print(f"[{place}/{len(todo)}] {group.step}, {len(group.plans)} plans")
        group = measure_group(group, device, blank.repeats, blank.warmup)
        recording = replace(recording, groups=(*recording.groups, group))
        write(recording, path)
        words = summed_up(compared(replace(blank, groups=(group,))))
        print(f"  {words}, {len(group.plans) - len(group.measured)} out of memory")
    return recording


def resumed(path: Path, blank: Recording) -> Recording:
    """Read what there is to go on from; ``blank`` if there is nothing yet."""
    if not path.exists():
        return blank
    found = read(path)
    for name in SAME:
        there, here = getattr(found, name), getattr(blank, name)
        if there != here:
            raise RecordingError(
                f"{path} is of another run: its {name!r} is {there!r}, and here it is "
                f"{here!r}; record into another --folder, or take the file away"
            )
    return found


def measure_group(group: Group, device: str, repeats: int, warmup: int) -> Group:
    """Measure a group's plans in one interleaved run, as many as have room."""
    step, plans = group.step, list(group.plans)
    settings = {"device": device, "repeats": repeats, "warmup": warmup, **step.options}
    while plans:
        model = batch = None  # those of the run before
        free_memory(device)
        try:
            with torch.device(device):
                model, batch = step.make_model(), step.make_batch()
            order = random.Random(0)
            reports = measure_plans(model, batch, plans, shuffle=order, **settings)
            return replace(group, measured=tuple(reports))
        except torch.OutOfMemoryError:  # the plan that needs most is the first to go
            needs = {plan: step.predicted(plan, device).peak_bytes for plan in plans}
            plans.remove(max(plans, key=needs.get))
    return group


def this_machine() -> Recording:
    """Make the recording of this machine that is empty yet."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.check_output(query, text=True, timeout=60).split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    return Recording(
        gpu=torch.cuda.get_device_name(),
        driver=driver,
        cuda=torch.version.cuda or "none",
        torch=torch.__version__,
        date=datetime.date.today().isoformat(),
        **this_gpu()._asdict(),
        repeats=REPEATS,
        warmup=WARMUP,
    )


def run(folder: Path) -> None:
    """Record this machine's GPU, and compare; if it stops, end with one sentence."""
    blank = this_machine()
    if "nocard" in blank.gpu:
        sys.exit(f"{blank.gpu} computes nothing, so its times and values are rubbish")
    path = folder / blank.file_name
    print(f"{blank.label}, driver {blank.driver}, into {path}")
    try:
        comparisons = compared(record(path, blank, groups()))
    except RecordingError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{path} cannot be written ({error.strerror}); what it held is kept")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    wrong = (one for one in comparisons if one.error_bytes)
    print(*wrong, summed_up(comparisons), sep="\n")
