"""The dry run: meta copies, a device's kernels, and shapes that are remembered."""

import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.dry_run import as_on, meta_batch, meta_model
from helpers.dry_run.meta import RememberedShapes
from helpers.measure import measure, predict
from helpers.models import MLP
from tests.oracles import profiled_bytes

# Meta copies


def test_a_meta_copy_has_the_models_shape_and_none_of_its_data():
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    model[2].eval()
    model(torch.randn(3, 8)).sum().backward()
    found = meta_model(model)
    pairs = list(
        zip(found.state_dict().items(), model.state_dict().items(), strict=True)
    )
    assert len(pairs) == 9
    for (name, copied), (own_name, own) in pairs:
        assert name == own_name and copied.is_meta and not own.is_meta
        assert (copied.shape, copied.dtype) == (own.shape, own.dtype)
        assert copied.stride() == own.stride()
    for copied, own in zip(found.parameters(), model.parameters(), strict=True):
        assert type(copied) is nn.Parameter and copied.grad is None
        assert copied.requires_grad == own.requires_grad
    assert [m.training for m in found.modules()] == [
        m.training for m in model.modules()
    ]
    assert type(found[1]) is nn.BatchNorm1d and found[1] is not model[1]
    assert model[2].weight.grad is not None


def test_shared_parameters_stay_shared():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    found = meta_model(model)
    assert found[2].weight is found[0].weight
    assert found[2].bias is not found[0].bias
    assert len(list(found.parameters())) == 3


def test_hooks_come_along():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, output: output[:1])
    found = meta_model(model)
    assert found(torch.empty(2, 4, device="meta")).shape == (1, 4)


def test_what_a_hook_notes_in_a_list_of_the_readers_is_not_noted_by_a_dry_run():
    model, noted = nn.Sequential(nn.Linear(4, 4)), []
    model[0].register_forward_hook(lambda *args: noted.append(args[0]))
    meta_model(model)(torch.empty(2, 4, device="meta"))
    assert noted == []


def test_a_factory_makes_its_model_without_data():
    made = []
    changes = profiled_bytes(lambda: made.append(meta_model(lambda: MLP([2048] * 5))))
    assert all(parameter.is_meta for parameter in made[0].parameters())
    assert sum(p.numel() for p in made[0].parameters()) == 4 * (2048 * 2048 + 2048)
    assert max(changes, default=0) < 1024


def test_a_meta_model_is_not_copied():
    model = MLP([4, 4, 4]).to("meta")
    assert meta_model(model) is model


def test_a_meta_batch_is_like_the_batch():
    x = torch.randn(6, 4).T.requires_grad_()
    target = torch.randint(3, (6,))
    batch = meta_batch({"x": [x, target], "pair": (target, None), "n": 7})
    found, found_target = batch["x"]
    assert found.is_meta and found.requires_grad and found.is_leaf
    assert (found.shape, found.stride()) == (x.shape, x.stride())
    assert found_target.dtype == torch.int64 and not found_target.requires_grad
    assert type(batch["x"]) is list and type(batch["pair"]) is tuple
    assert batch["pair"][1] is None and batch["n"] == 7


def test_a_meta_batch_of_any_size_costs_nothing():
    huge = torch.empty(10**10, 1024, device="meta")
    assert max(profiled_bytes(lambda: meta_batch((huge, huge))), default=0) == 0


# The device's kernels


class Operators(TorchDispatchMode):
    """Note the operators that run below autograd, and what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, tuple) else (out,)
        self.made.append((func.overloadpacket.__name__, *(t.dtype for t in outs)))
        return out


def dropped_out(x: torch.Tensor, p: float, training: bool = True) -> list[tuple]:
    with Operators() as operators:
        F.dropout(x, p, training)
    return operators.made


ON_CPU = [
    ("empty_like", torch.float32),
    ("bernoulli_", torch.float32),
    ("div_", torch.float32),
    ("mul", torch.float32),
]


def test_dropout_on_meta_takes_the_devices_kernel():
    x = torch.empty(8, 4, device="meta")
    assert dropped_out(x, 0.1) == ON_CPU
    with as_on("cuda"):
        fused = [("native_dropout", torch.float32, torch.bool)]
        assert dropped_out(x, 0.1) == fused
        with as_on("cpu"):
            assert dropped_out(x, 0.1) == ON_CPU
        assert dropped_out(x, 0.1) == fused
        assert dropped_out(x, 0.1, training=False) == dropped_out(x, 0.0) == []
        assert dropped_out(x, 1.0) == ON_CPU[:2] + ON_CPU[3:]  # as CUDA does it
    assert dropped_out(x, 0.1) == ON_CPU


def test_dropout_on_a_cpu_is_what_the_prediction_takes_it_for():
    x = torch.ones(8, 4)
    assert dropped_out(x, 0.1) == ON_CPU
    with as_on("cuda"):
        assert dropped_out(x, 0.1) == ON_CPU  # real tensors are left alone
    assert torch.equal(F.dropout(x, 0.0), x)
    assert set(F.dropout(torch.ones(1000), 0.5).tolist()) == {0.0, 2.0}


def test_the_chosen_kernels_are_put_back_after_an_error():
    with pytest.raises(KeyError), as_on("cuda"):
        raise KeyError
    assert dropped_out(torch.empty(8, 4, device="meta"), 0.1) == ON_CPU


def test_another_thread_chooses_its_own_kernels():
    x, found = torch.empty(8, 4, device="meta"), []
    with as_on("cuda"):
        thread = threading.Thread(target=lambda: found.append(dropped_out(x, 0.1)))
        thread.start()
        thread.join()
    assert found == [ON_CPU]


@pytest.mark.parametrize(
    ("options", "foreach"),
    [
        ({}, True),
        ({"foreach": False}, False),
        ({"foreach": True}, True),
        ({"fused": True}, None),
        ({"differentiable": True}, None),
    ],
)
def test_optimizers_work_on_lists_as_on_cuda_unless_told(options, foreach):
    model, factory = MLP([4, 4, 4]).to("meta"), partial(torch.optim.AdamW, **options)
    with as_on("cuda") as imagined:
        made = imagined.optimizer(factory, model)
    assert [group["foreach"] for group in made.param_groups] == [foreach]
    with as_on("cpu") as imagined:
        made = imagined.optimizer(factory, model)
    assert [group["foreach"] for group in made.param_groups] == [options.get("foreach")]


def test_an_optimizer_without_lists_is_left_alone():
    model = MLP([4, 4, 4])
    before = torch.optim.LBFGS(model.parameters()).param_groups[0]
    with as_on("cuda") as imagined:
        made = imagined.optimizer(torch.optim.LBFGS, model)
    assert made.param_groups[0] == before


@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad]
)
def test_fused_optimizers_still_refuse_what_they_refused(optimizer):
    half = nn.Parameter(torch.ones(4, dtype=torch.int32), requires_grad=False)
    with pytest.raises((RuntimeError, ValueError), match="[Ff]loating|fused"):
        made = optimizer([half], fused=True)
        half.grad = torch.ones(4, dtype=torch.int32)
        made.step()


# Remembered shapes


def counted(func, calls: list):
    """Wrap an operator so that its calls are seen."""

    class Counted:
        overloadpacket, _op = func.overloadpacket, func._op

        def __call__(self, *args, **kwargs):
            calls.append(func)
            return func(*args, **kwargs)

    return Counted()


aten = torch.ops.aten


def meta(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def layout(out: object) -> object:
    if isinstance(out, tuple | list):
        return type(out), [layout(item) for item in out]
    return out.shape, out.stride(), out.dtype, out.device, out.storage_offset()


@pytest.mark.parametrize(
    ("func", "make_args", "kwargs"),
    [
        (aten.mm.default, lambda: (meta(5, 4), meta(4, 3)), {}),
        (aten.mm.default, lambda: (meta(4, 5).t(), meta(4, 3)), {}),
        (aten.addmm.default, lambda: (meta(3), meta(5, 4), meta(4, 3)), {}),
        (aten.gelu.default, lambda: (meta(5, 4).t(),), {"approximate": "tanh"}),
        (aten.add.Tensor, lambda: (meta(5, 1), meta(4)), {"alpha": 2}),
        (aten.sum.dim_IntList, lambda: (meta(5, 4), [0], True), {"dtype": torch.half}),
        (aten.native_dropout.default, lambda: (meta(5, 4), 0.1, True), {}),
        (
            aten.native_layer_norm.default,
            lambda: (meta(5, 4), [4], None, None, 1e-5),
            {},
        ),
        (aten.cat.default, lambda: ([meta(5, 4), meta(2, 4)],), {}),
        (aten._to_copy.default, lambda: (meta(5, 4),), {"dtype": torch.bfloat16}),
        (aten.topk.default, lambda: (meta(5, 4), 2), {}),
    ],
)
def test_a_remembered_answer_is_the_operators(func, make_args, kwargs):
    run, calls = RememberedShapes(), []
    func, expected = counted(func, calls), layout(func(*make_args(), **kwargs))
    first, second = (run(func, make_args(), kwargs) for _ in range(2))
    assert layout(first) == layout(second) == expected
    assert len(calls) == 1, "the operator ran again"
    storages = [
        item.untyped_storage()._cdata
        for out in (first, second)
        for item in (out if isinstance(out, tuple) else (out,))
    ]
    assert len(set(storages)) == len(storages), "an answer shares its storage"


def test_one_shape_is_not_mistaken_for_another():
    run = RememberedShapes()
    for x in (meta(5, 4), meta(4, 5).t(), meta(5, 4, dtype=torch.half), meta(4, 5)):
        assert layout(run(aten.relu.default, (x,), {})) == layout(x.relu())
    for value in (1, 1.0, True):
        out = run(aten.mul.Tensor, (meta(3, dtype=torch.int32), value), {})
        assert out.dtype == (meta(3, dtype=torch.int32) * value).dtype
    for dim in (0, 1):
        assert (
            run(aten.sum.dim_IntList, (meta(5, 4), [dim]), {}).shape
            == ((4,), (5,))[dim]
        )


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.t.default, ()),
        (aten.view.default, ([20],)),
        (aten.slice.Tensor, (0, 1, 3)),
        (aten.detach.default, ()),
        (aten.split.Tensor, (2,)),
    ],
)
def test_views_always_share_their_base(func, args):
    run = RememberedShapes()
    for _ in range(3):
        x = meta(5, 4)
        out = run(func, (x, *args), {})
        for view in out if isinstance(out, tuple | list) else (out,):
            assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
        assert layout(out) == layout(func(x, *args))


def test_in_place_operators_return_their_own_argument():
    run = RememberedShapes()
    for _ in range(3):
        x, y = meta(5, 4), meta(5, 4)
        assert run(aten.add_.Tensor, (x, y), {}) is x
        assert run(aten.copy_.default, (y, x), {}) is y
        assert run(aten.add.out, (x, x), {"out": y}) is y


def test_real_tensors_are_computed_every_time():
    run = RememberedShapes()
    for value in (1.0, 2.0):
        out = run(aten.mul.Tensor, (torch.tensor([value]), 3), {})
        assert out.tolist() == [3 * value]


def test_what_cannot_be_a_key_runs_every_time():
    run, calls = RememberedShapes(), []
    func = counted(aten.relu.default, calls)
    for _ in range(2):
        with pytest.raises((TypeError, RuntimeError)):
            run(func, (meta(5, 4), {"no": "key"}), {})
    assert len(calls) == 2


def test_memory_of_shapes_is_bounded():
    run = RememberedShapes(most=3)
    for rows in range(1, 20):
        run(aten.relu.default, (meta(rows, 4),), {})
        assert 1 <= len(run) <= 4


def test_fused_steps_make_nothing_and_need_no_kernel():
    model = MLP([4, 4, 4]).to("meta")
    for optimizer in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad):
        run = RememberedShapes()

        class Dry(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None, run=run):
                return run(func, args, kwargs or {})

        made = partial(optimizer, fused=True)
        with as_on("cuda") as imagined, Dry():
            made = imagined.optimizer(made, model)
            model(meta(2, 4)).sum().backward()
            made.step()
        model.zero_grad()


class Grouped(nn.Module):
    """Attends with fewer heads of keys than of queries."""

    def __init__(self, heads: int, masked: bool, is_causal: bool) -> None:
        super().__init__()
        self.heads, self.masked, self.is_causal = heads, masked, is_causal
        self.query, self.both = nn.Linear(32, 32), nn.Linear(32, 16 * heads)

    def forward(self, x):
        rows, length, _ = x.shape
        query = self.query(x).view(rows, length, 4, 8).transpose(1, 2)
        both = self.both(x).view(rows, length, 2 * self.heads, 8).transpose(1, 2)
        mask = None
        if self.masked:
            shape = rows, 1, length, length
            mask = torch.ones(shape, dtype=torch.bool, device=x.device)
        key, value = both.chunk(2, 1)
        how = {"attn_mask": mask, "is_causal": self.is_causal, "enable_gqa": True}
        attended = nn.functional.scaled_dot_product_attention(query, key, value, **how)
        return attended.transpose(1, 2).reshape(rows, length, 32)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("masked", "is_causal"), [(False, False), (False, True), (True, False)]
)
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_attention_in_groups(heads, masked, is_causal, autocast):
    model, x = Grouped(heads, masked, is_causal), torch.randn(2, 16, 32)
    predicted = predict(model, x, device="cpu", autocast=autocast)
    measured = measure(model, x, repeats=0, autocast=autocast)
    assert predicted.peak_bytes == measured.peak_bytes
    # As PyTorch's CUDA build chooses on an A100.
    events = predict(model, x, autocast=autocast, gpu="A100").timeline.events
    flash = any("flash" in event.allocation.op for event in events)
    efficient = any("efficient" in event.allocation.op for event in events)
    assert flash == (autocast is not None and not masked)
    assert efficient == (not flash and heads == 4)
