"""Ranks by torchrun: what comes back, how failures end, what a rank's step holds."""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from helpers import distributed
from helpers.checkpointing import Plan, checkpointed
from helpers.measure import StepReport, measure
from helpers.models import MLP, uniform_mlp
from helpers.units import round_to_block

depth, width, rows = 4, 128, 512
layer_bytes = 4 * (width * width + width)
plans = {
    "none": (),
    "alone": (("layer1",), ("layer2",), ("layer3",), ("layer4",)),
    "pairs": (("layer1", "layer2"), ("layer3", "layer4")),
    "all": (("layer1", "layer2", "layer3", "layer4"),),
}


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    """No process of ours goes on, and no file stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert list(tmp_path.iterdir()) == []
    for _ in range(50):  # a rank that was told to end may take a moment
        if not (alive := processes_in(tmp_path)):
            break
        time.sleep(0.1)
    assert alive == []


def processes_in(folder: Path) -> list[psutil.Process]:
    """List the processes that run in the folder, or in one inside it."""
    running = psutil.process_iter(["cwd"])
    return [found for found in running if str(folder) in (found.info["cwd"] or "")]


# What comes back


def placed():
    return [dist.get_rank(), dist.get_world_size()]


def everyones(number):
    numbers = torch.tensor([float(number)])
    dist.all_reduce(numbers)
    return numbers.item()


def sums():
    return {"ranks": everyones(dist.get_rank()), "depth": everyones(depth)}


def backend():
    return [dist.get_backend(), torch.zeros(1).device.type]


def shard_bytes():
    weights = sharded().parameters()
    return sum(distributed.local(weight).nbytes for weight in weights)


def in_a_notebook():
    """Define functions as a notebook's cells do, which no module has."""
    cells = {"__name__": "__main__", "torch": torch, "dist": dist}
    exec("share = torch.ones(4)\ndef half(): return share / 2", cells)
    exec("def lent(): share[dist.get_rank()] = 0; return half().tolist()", cells)
    exec("def kept(): return share.tolist()", cells)
    return cells["lent"], cells["kept"]


def test_each_function_brings_back_what_it_returned_on_each_rank():
    model, sent = MLP([2, 2]), in_a_notebook()
    n_weights = lambda: sum(w.numel() for w in model.parameters())  # noqa: E731
    asked = placed, sums, backend, shard_bytes, *sent, n_weights
    results = distributed.run(*asked, ranks=4, device="cpu")
    places, totals, backends, shards, lent, kept, numbers = results
    assert places == [[0, 4], [1, 4], [2, 4], [3, 4]]
    assert totals == 4 * [{"ranks": 6.0, "depth": 4.0 * depth}]
    assert backends == 4 * [["gloo", "cpu"]]
    # The last layer's 10 rows are dealt out as torch.chunk does it.
    hidden = depth * layer_bytes // 4
    assert shards == [hidden + 4 * n * (width + 1) for n in (3, 3, 3, 1)]
    # Functions share a rank's copy, and here nothing is changed.
    assert lent[1] == [0.5, 0, 0.5, 0.5] and kept[1] == [1, 0, 1, 1]
    assert sent[1]() == [1, 1, 1, 1] and numbers == 4 * [6]


# Failures


def gives_a_model_on_1():
    if dist.get_rank() == 1:
        return MLP([2, 2])
    dist.barrier()  # where rank 0 waits until rank 1 is gone, and fails as well


def hangs_on_1():
    while dist.get_rank() == 1:
        time.sleep(0.1)
    dist.barrier()


def is_killed_on_1():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def exits():
    sys.exit(0)


@pytest.mark.parametrize(
    ("function", "ranks", "message"),
    [
        (
            gives_a_model_on_1,
            2,
            "rank 1 failed in gives_a_model_on_1: TypeError: JSON cannot hold a "
            "Sequential; return numbers or texts",
        ),
        (is_killed_on_1, 2, "rank 1 ended in is_killed_on_1, with exit code -9"),
        (exits, 1, "not all was done when the processes ended: rank 0 in exits"),
    ],
)
def test_a_failed_rank_is_one_sentence(function, ranks, message):
    with pytest.raises(distributed.RankError) as raised:
        distributed.run(placed, function, ranks=ranks)
    assert str(raised.value) == message


@pytest.mark.parametrize("open_one", [threading.Lock, tempfile.TemporaryFile])
def test_what_cannot_be_sent_is_refused(open_one):
    held = open_one()

    def waits():
        with held:
            return 1

    words = "^waits refers to what cannot be sent to another process, so make it inside"
    with pytest.raises(ValueError, match=words) as raised:
        distributed.run(placed, waits)
    assert waits() == 1 and "\n" not in str(raised.value)


def test_ranks_that_hang_are_ended_in_time():
    with pytest.raises(TimeoutError, match="after 5 s: rank 0 .*, rank 1 .*"):
        distributed.run(placed, hangs_on_1, timeout_s=5)


def test_nobody_outside_can_connect_and_an_interrupt_ends_the_ranks(tmp_path):
    addresses = []

    def hanging() -> list[bool]:
        notes = [file.read_text() for file in tmp_path.glob("*/rank?.json")]
        return ["in hangs_on_1" in note for note in notes]

    def interrupt():
        while hanging() != [True, True]:
            time.sleep(0.1)
        for process in processes_in(tmp_path):
            for found in process.net_connections():
                if found.status == psutil.CONN_LISTEN:
                    addresses.append(found.laddr.ip)
        signal.raise_signal(signal.SIGINT)

    # A shell's background jobs are started with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            distributed.run(hangs_on_1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(addresses) >= 2 and set(addresses) <= {"127.0.0.1", "::1"}


def test_ranks_end_with_a_process_that_is_killed(tmp_path):
    """As a notebook's kernel may be; then nobody is left to end them."""
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=distributed.run, args=(hangs_on_1,))
    process.start()
    while not list(tmp_path.glob("*/rank1.json")):
        assert process.is_alive()
        time.sleep(0.1)
    process.kill()
    process.join()
    for _ in range(100):
        if not processes_in(tmp_path):
            break
        time.sleep(0.1)
    assert processes_in(tmp_path) == []
    for folder in tmp_path.iterdir():  # this, too, nobody could do
        shutil.rmtree(folder)


@pytest.mark.parametrize("ranks", [0, -1, 1.5, "2"])
def test_a_wrong_number_of_ranks_is_refused(ranks):
    with pytest.raises(ValueError, match="whole number"):
        distributed.run(placed, ranks=ranks)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="'cpu' or 'cuda'"):
        distributed.run(placed, device="tpu")
    too_many = torch.cuda.device_count() + 1
    with pytest.raises(ValueError, match="a GPU each"):
        distributed.run(placed, ranks=too_many, device="cuda")


# What a rank's step holds


@pytest.fixture(scope="module")
def found():
    """What the functions below return on either rank, by one start."""
    asked = alone, in_ddp, with_few_rows, in_fsdp, gathers, outcomes
    results = distributed.run(*asked, device="cpu")
    # Also FSDP2's bytes do not depend on when gloo's threads let go of a buffer.
    assert all(one == other for one, other in results)
    return {f.__name__: r[0] for f, r in zip(asked, results, strict=True)}


def make_net():
    return uniform_mlp(depth, width)


def parameter_bytes(net):
    return sum(round_to_block(4 * weight.numel()) for weight in net.parameters())


def alone():
    x = torch.randn(rows, width)
    pairs = {}
    for name, segments in plans.items():
        what = make_net(), x, Plan(segments)
        pairs[name] = distributed.measure_step(*what), measure(*what, repeats=0)
    return pairs


def in_ddp():
    x, found = torch.randn(rows, width), {}
    for name, segments in plans.items():
        net = DDP(make_net())
        found[name] = distributed.measure_step(net, x, Plan(segments))
    return found


def with_few_rows():
    x = torch.randn(1, width)
    nets = make_net(), DDP(make_net()), DDP(make_net(), gradient_as_bucket_view=True)
    return [distributed.measure_step(net, x) for net in nets]


def test_a_rank_counts_as_one_process_does_and_ddp_adds_its_buckets(found):
    one, in_ddps, few = found["alone"], found["in_ddp"], found["with_few_rows"]
    gradient_bytes = parameter_bytes(make_net())
    for name, (on_rank, measured) in one.items():
        assert isinstance(on_rank, StepReport)
        assert on_rank == measured
        with_buckets = in_ddps[name]
        for field in ("peak_bytes", "after_forward_bytes", "baseline_bytes"):
            added = getattr(with_buckets, field) - getattr(on_rank, field)
            assert added == gradient_bytes, (name, field)
    by_itself, in_buckets, as_views = few
    assert by_itself.categories["gradient"] == gradient_bytes
    assert in_buckets.categories["gradient"] == 2 * gradient_bytes
    assert as_views.categories["gradient"] == gradient_bytes


def sharded(alone=depth + 1, **options):
    """Shard some layers, each by itself; the root takes the others."""
    from torch.distributed.fsdp import fully_shard  # not every rank needs it

    net = make_net()
    for layer in net[:alone]:
        fully_shard(layer, **options)
    return fully_shard(net)


def in_fsdp():
    x, found = torch.randn(rows, width), {}
    for name, segments in plans.items():
        found[name] = distributed.measure_step(sharded(), x, Plan(segments))
    kept = sharded(reshard_after_forward=False)
    found["kept"] = distributed.measure_step(kept, x)
    adam = torch.optim.AdamW
    found["AdamW"] = distributed.measure_step(sharded(), x, optimizer=adam)
    return found


def gathers():
    found = {}
    for name, segments in plans.items():
        net = sharded()
        with checkpointed(net, Plan(segments)), distributed.Collectives() as calls:
            net(torch.randn(2, width)).sum().backward()
        found[name] = calls.counts["_allgather_base_"]
    net = sharded(alone=depth)
    with distributed.Collectives() as calls:
        net(torch.randn(2, width)).sum().backward()
    return found | {"root": calls.counts["_allgather_base_"]}


def test_fsdp_holds_its_shards_and_what_it_has_gathered(found):
    one, reports, calls = found["alone"], found["in_fsdp"], found["gathers"]
    whole = make_net()
    half_bytes = sum(
        round_to_block(4 * weight.numel() // 2) for weight in whole.parameters()
    )
    x_bytes = 4 * rows * width
    for name in plans:
        assert reports[name].categories["parameter"] == half_bytes
        assert reports[name].baseline_bytes == half_bytes + x_bytes
        (on_rank, _), split = one[name], reports[name]
        kept = on_rank.after_forward_bytes - on_rank.baseline_bytes
        assert split.after_forward_bytes - split.baseline_bytes == kept
    more = reports["kept"].after_forward_bytes - reports["none"].after_forward_bytes
    assert more == parameter_bytes(whole)
    n_weights = len(list(whole.parameters()))
    steps = n_weights * 512  # AdamW counts its steps, a number for each parameter
    assert reports["AdamW"].categories["optimizer_state"] == 2 * half_bytes + steps
    # None has two layers gathered at its peak, and one long segment all of them.
    gathered = reports["all"].peak_bytes - reports["none"].peak_bytes
    assert gathered == (depth - 2) * layer_bytes
    assert calls == dict.fromkeys(plans, 2 * (depth + 1)) | {"root": 2 * depth + 1}


# Gradients, and the two mechanisms


def gradients(net, x):
    net.zero_grad()
    net(x).sum().backward()
    return [weight.grad.clone() for weight in net.parameters()]


def outcome(use_reentrant, segments, **options):
    """Train a step in DDP: whether its gradients are those without checkpoints."""
    torch.manual_seed(0)
    net, x = MLP([width] * 4, "gelu", 0.2), torch.randn(8, width)
    torch.manual_seed(dist.get_rank())
    expected = gradients(net, x)
    for gradient in expected:
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    torch.manual_seed(dist.get_rank())
    try:
        with checkpointed(net, Plan(segments), use_reentrant=use_reentrant):
            found = gradients(DDP(net, **options), x)
    except RuntimeError as error:
        return str(error).partition(". ")[0]
    return all(map(torch.equal, found, expected))


def outcomes():
    segment = (("layer2",),)
    found = {}
    for use_reentrant in (True, False):
        found[str(use_reentrant)] = [
            outcome(use_reentrant, segment),
            outcome(use_reentrant, segment, static_graph=True),
            outcome(use_reentrant, segment, find_unused_parameters=True),
        ]
    return found


def test_reentrant_fails_in_ddp_where_unused_parameters_are_looked_for(found):
    once = "Expected to mark a variable ready only once"
    expected = {"True": [True, True, once], "False": [True, True, True]}
    assert found["outcomes"] == expected


# GPUs


@pytest.mark.gpu
def test_two_gpus_take_nccl():
    if torch.cuda.device_count() < 2:
        pytest.skip("no two GPUs")
    assert distributed.run(backend)[0] == 2 * [["nccl", "cuda"]]
    (one, _), (wrapped, _) = distributed.run(alone, in_ddp)
    for name, (on_rank, _) in one.items():
        added = wrapped[name].peak_bytes - on_rank.peak_bytes
        assert added == parameter_bytes(make_net())
