"""Measure what a recording holds, on this machine's GPU, and keep it as it comes.

It can be stopped at any moment: what is in the file is not measured again. A step that
is out of memory is noted, and the others go on.
"""

import datetime
import random
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from helpers.allocator import this_gpu
from helpers.checkpointing import Plan, checkpointed
from helpers.measure import (
    StepReport,
    free_memory,
    is_out_of_memory,
    largest_batch,
    measure_plans,
    memory_limit,
    predict,
    random_numbers_kept,
    training_step,
)
from helpers.recording import compare as comparison
from helpers.recording._schema import RecordingError
from helpers.recording._set import Group, Search, groups, searches
from helpers.recording.file import (
    RecordedCase,
    RecordedSearch,
    Recording,
    file_name,
    read,
    write,
)

REPEATS, WARMUP, SEED = 20, 3, 0


def record(
    path: Path,
    blank: Recording,
    wanted: Iterable[Group],
    searched: Iterable[Search] = (),
    *,
    device: str = "cuda",
    say: Callable[[str], object] = print,
) -> Recording:
    """Measure what is not in the file yet, and write the file after each group.

    Args:
        blank: a recording of this machine without cases, its settings included.

    Raises:
        RecordingError: if there is a file, and it is of another machine or settings.
        OSError: if the file cannot be written.
    """
    recording = resumed(path, blank)
    wanted, searched = list(wanted), list(searched)
    for place, group in enumerate(wanted, 1):
        title = f"[{place}/{len(wanted)}] {group.step}"
        if recording.has([(group.step, plan) for plan in group.plans]):
            say(f"{title}: there already")
            continue
        started = time.monotonic()
        cases = measure_group(group, device, say=say, **recording.settings)
        recording = recording.with_cases(cases)
        write(recording, path)
        say(f"{title}: {outcome(cases)} ({time.monotonic() - started:.0f} s)")
    done = [found.search for found in recording.searches]
    for search in searched:
        if search not in done:
            found = run_search(search, device)
            recording = recording.with_search(found)
            write(recording, path)
            say(comparison.describe_search(found))
    return recording


def resumed(path: Path, blank: Recording) -> Recording:
    """Read what there is to go on from; ``blank`` if there is nothing yet."""
    if not path.exists():
        return blank
    found = read(path)
    same = ("gpu", "driver", "cuda", "torch", "processors", "threads")
    for name in (*same, "settings", "made_up"):
        there, here = getattr(found, name), getattr(blank, name)
        if there != here:
            raise RecordingError(
                f"{path} is of another run: its {name!r} is {there!r}, and here it is "
                f"{here!r}; record into another --folder, or take the file away"
            )
    return found


def measure_group(
    group: Group,
    device: str,
    repeats: int,
    warmup: int,
    say: Callable[[str], object] = print,
) -> list[RecordedCase]:
    """Measure a group's plans in one interleaved run, as many as have room.

    Args:
        say: told now and then how many steps have been run.
    """
    predicted = [_predicted(group, plan, device) for plan in group.plans]
    plans, reports = list(group.plans), {}
    while plans and not reports:
        try:
            reports = _measured(group, plans, device, repeats, warmup, say)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if not reports:  # the one that needs most is the first to go
            free_memory(device)
            largest = max(
                (report for report in predicted if report.plan in plans),
                key=lambda report: report.peak_bytes,
            )
            plans.remove(largest.plan)
    free_memory(device)
    base_ms = reports[Plan()].step_ms if Plan() in reports else None
    return [
        RecordedCase(
            group.step,
            report,
            reports.get(report.plan),
            base_ms if report.plan in reports else None,
        )
        for report in predicted
    ]


def _predicted(group: Group, plan: Plan, device: str) -> StepReport:
    step = group.step
    with torch.device("meta"):
        batch = step.make_batch()
    return predict(step.make_model, batch, plan, device=device, **step.options)


def _measured(
    group: Group,
    plans: list[Plan],
    device: str,
    repeats: int,
    warmup: int,
    say: Callable[[str], object],
) -> dict[Plan, StepReport]:
    with random_numbers_kept():
        torch.manual_seed(SEED)
        with torch.device(device):
            model, batch = group.step.make_model(), group.step.make_batch()
    reports = measure_plans(
        model,
        batch,
        plans,
        device=device,
        repeats=repeats,
        warmup=warmup,
        between_steps=_teller(say),
        shuffle=random.Random(SEED),
        **group.step.options,
    )
    return dict(zip(plans, reports, strict=True))


def _teller(say: Callable[[str], object]) -> Callable[[], None]:
    """Make a function that counts its calls, and says how many at most every 15 s."""
    steps, said = 0, time.monotonic()

    def tell() -> None:
        nonlocal steps, said
        steps += 1
        if time.monotonic() - said > 15:
            say(f"  … {steps:,} steps")
            said = time.monotonic()

    return tell


def run_search(search: Search, device: str) -> RecordedSearch:
    """Find the largest batch under a limit, by predictions and by steps that are run.

    CUDA's own limit is on what its allocator reserves, workspaces included.
    """
    step, options = search.step, search.step.options
    with torch.device("meta"):
        shapes = step.make_model()

    def should_fit(rows: int) -> bool:
        with torch.device("meta"):
            batch = step.make_batch(rows)
        report = predict(shapes, batch, search.plan, device=device, **options)
        return report.allocator_peak_bytes <= search.limit_bytes

    with torch.device(device):
        model = step.make_model()
    optimizer = options["optimizer"] and options["optimizer"](model.parameters())

    def fits(rows: int) -> bool:
        try:
            with memory_limit(search.limit_bytes, device):
                with torch.device(device):
                    batch = step.make_batch(rows)
                training_step(model, batch, None, optimizer, options["autocast"])()
        except torch.OutOfMemoryError:
            return False
        finally:
            model.zero_grad(set_to_none=True)
        return True

    with checkpointed(model, search.plan):
        run = largest_batch(fits)
    free_memory(device)
    return RecordedSearch(search, largest_batch(should_fit), run)


def outcome(cases: list[RecordedCase]) -> str:
    """Say in a few words how a group's predictions did."""
    measured = [case for case in cases if case.measured]
    same = sum(
        c.measured.allocator_peak_bytes == c.predicted.allocator_peak_bytes
        for c in measured
    )
    words = f"{same} of {len(measured)} as predicted to the byte"
    missing = len(cases) - len(measured)
    return f"{words}, {missing} out of memory" if missing else words


# This machine -----------------------------------------------------------------------


def run(folder: Path) -> int:
    """Record this machine's GPU, and compare; 1 if it stopped, after one sentence."""
    blank = this_machine()
    path = folder / file_name(blank.gpu, blank.torch)
    print(f"{blank.label}, driver {blank.driver}, into {path}")
    try:
        recording = record(path, blank, groups(), searches())
    except RecordingError as error:
        print(error)
        return 1
    except OSError as error:
        print(f"{path} cannot be written ({error.strerror}); what it held is kept")
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here")
        return 1
    print(*comparison.lines(comparison.compare(recording)), sep="\n")
    return 0


def this_machine() -> Recording:
    """Make the recording of this machine that has no cases yet."""
    return Recording(
        gpu=torch.cuda.get_device_name(),
        driver=_driver(),
        cuda=torch.version.cuda or "none",
        torch=torch.__version__,
        date=datetime.date.today().isoformat(),
        **this_gpu()._asdict(),
        settings={"repeats": REPEATS, "warmup": WARMUP},
    )


def _driver() -> str:
    """Ask for the driver's version."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (answer.stdout.split() or ["unknown"])[0]
