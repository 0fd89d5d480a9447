"""Training steps as readers write them: predicted as measured, and left as found."""

import copy
import functools
import logging
import random
import threading
from collections import deque
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from helpers.checkpointing import Plan
from helpers.measure import measure, predict, verify
from tests.cases.agreement import assert_agreement, untouched

PLAN = Plan((("0", "1"),))
AdamW = torch.optim.AdamW


def mlp(d_out: int = 4) -> nn.Sequential:
    layers = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU()
    return nn.Sequential(*layers, nn.Linear(64, d_out))


def pair(n_rows: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n_rows, 32), torch.randint(4, (n_rows,))


CASES = {}


def case(make):
    """Register what makes a step, and whatever else differs from the usual."""
    CASES[make.__name__] = make
    return make


def loss_of(model, batch):
    x, target = batch
    return cross_entropy(model(x), target)


def accumulation(pieces, zero):
    def step(model, batch, optimizer):
        if zero == "first":
            optimizer.zero_grad()
        elif zero == "to zero":
            optimizer.zero_grad(set_to_none=False)
        x, target = batch
        for rows, wanted in zip(x.chunk(pieces), target.chunk(pieces), strict=True):
            (cross_entropy(model(rows), wanted) / pieces).backward()
        optimizer.step()
        if zero == "last":
            model.zero_grad()

    return {"step": step}


for pieces in (2, 4):
    for zero in ("first", "last", "to zero", "never"):
        name = f"{pieces} micro-batches, zero_grad {zero}"
        CASES[name] = functools.partial(accumulation, pieces, zero)


@case
def clipped_by_norm():
    def step(model, batch, optimizer):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return {"step": step}


@case
def clipped_by_norm_or_error():
    def step(model, batch, optimizer):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()

    return {"step": step}


@case
def clipped_by_value():
    def step(model, batch, optimizer):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.1)
        optimizer.step()

    return {"step": step}


@case
def grad_scaler():
    scaler = torch.amp.GradScaler("cpu")

    def step(model, batch, optimizer):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    return {"step": step, "others": scaler}


def gan() -> nn.ModuleDict:
    make = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32))
    return nn.ModuleDict({"make": make, "judge": mlp(1)})


def judged(model, x):
    return nn.functional.softplus(model["judge"](x)).mean()


@case
def gan_with_one_optimizer():
    def step(model, batch, optimizer):
        noise, real = batch
        optimizer.zero_grad()
        fake = model["make"](noise)
        (judged(model, real) - judged(model, fake.detach())).backward()
        for parameter in model["judge"].parameters():
            parameter.requires_grad_(False)
        judged(model, fake).backward()
        for parameter in model["judge"].parameters():
            parameter.requires_grad_(True)
        optimizer.step()

    batch = torch.randn(64, 8), torch.randn(64, 32)
    plan = Plan((("judge.0", "judge.1"),))
    return {"model": gan(), "batch": batch, "step": step, "plan": plan}


@case
def gan_with_a_second_optimizer():
    model = gan()
    judge_optimizer = torch.optim.Adam(model["judge"].parameters())

    def step(model, batch, optimizer):
        noise, real = batch
        judge_optimizer.zero_grad()
        fake = model["make"](noise)
        (judged(model, real) - judged(model, fake.detach())).backward()
        judge_optimizer.step()
        optimizer.zero_grad()
        judged(model, fake).backward()
        optimizer.step()

    batch = torch.randn(64, 8), torch.randn(64, 32)
    optimizer = torch.optim.Adam(model["make"].parameters())
    plan = Plan((("judge.0", "judge.1"),))
    return {
        "model": model,
        "batch": batch,
        "step": step,
        "plan": plan,
        "optimizer": optimizer,
        "others": judge_optimizer,
    }


@case
def gradient_penalty():
    def step(model, batch, optimizer):
        optimizer.zero_grad()
        x = batch[0].detach().requires_grad_()
        score = model(x).sum(1)
        (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        (score.mean() + ((slope.norm(dim=1) - 1) ** 2).mean()).backward()
        optimizer.step()

    return {"step": step}


@case
def second_order():
    def step(model, batch, optimizer):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        grads = torch.autograd.grad(loss, [*model.parameters()], create_graph=True)
        (loss + sum(grad.square().sum() for grad in grads)).backward()
        optimizer.step()

    return {"step": step}


@case
def optimizer_in_backward_by_closure():
    model = mlp()
    optimizers = {p: torch.optim.Adam([p], foreach=False) for p in model.parameters()}

    def update(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)

    def step(model, batch, optimizer):
        loss_of(model, batch).backward()

    return {"model": model, "step": step, "optimizer": None, "others": optimizers}


OPTIMIZERS: dict = {}


def update_by_a_global(parameter):
    OPTIMIZERS[parameter].step()
    OPTIMIZERS[parameter].zero_grad()


@case
def optimizer_in_backward_by_a_global():
    model = mlp()
    OPTIMIZERS.clear()
    OPTIMIZERS.update({p: torch.optim.SGD([p], 0.1, 0.9) for p in model.parameters()})
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update_by_a_global)

    def step(model, batch, optimizer):
        loss_of(model, batch).backward()

    return {"model": model, "step": step, "optimizer": None, "others": OPTIMIZERS}


@case
def optimizer_in_backward_without_a_step():
    return {**optimizer_in_backward_by_closure(), "step": None}


@case
def logits_dropped_before_backward():
    def step(model, batch, optimizer):
        x, target = batch
        optimizer.zero_grad()
        logits = model(x)
        loss = cross_entropy(logits, target)
        del logits
        loss.backward()
        optimizer.step()

    return {"step": step, "model": mlp(4)}


@case
def losses_kept_in_a_list():
    history = []

    def step(model, batch, optimizer):
        optimizer.zero_grad()
        history.append(loss_of(model, batch))
        history[-1].backward()
        optimizer.step()

    return {"step": step, "others": history}


@case
def losses_kept_as_numbers():
    history = []

    def step(model, batch, optimizer):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        history.append(loss.item())

    return {"step": step, "others": history}


@case
def autocast_in_the_step():
    def step(model, batch, optimizer):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()

    return {"step": step}


@case
def several_losses_summed():
    def step(model, batch, optimizer):
        optimizer.zero_grad()
        x, target = batch
        logits = model(x)
        decay = sum(parameter.square().sum() for parameter in model.parameters())
        (cross_entropy(logits, target) + 0.1 * logits.abs().mean() + decay).backward()
        optimizer.step()

    return {"step": step}


@case
def two_forward_passes():
    def step(model, batch, optimizer):
        optimizer.zero_grad()
        x, target = batch
        first, second = model(x), model(x.flip(0))
        (cross_entropy(first, target) + (first - second).square().mean()).backward()
        optimizer.step()

    return {"step": step}


@case
def two_backwards_of_one_graph():
    def step(model, batch, optimizer):
        optimizer.zero_grad()
        x, target = batch
        logits = model(x)
        cross_entropy(logits, target).backward(retain_graph=True)
        logits.square().mean().backward()
        optimizer.step()

    return {"step": step}


@case
def activations_shared_by_two_heads():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = mlp(64)
            self.left, self.right = nn.Linear(64, 4), nn.Linear(64, 1)

        def forward(self, x):
            shared = self.trunk(x)
            return {"class": self.left(shared), "size": self.right(shared)}

    def step(model, batch, optimizer):
        optimizer.zero_grad()
        x, target = batch
        out = model(x)
        cross_entropy(out["class"], target).backward(retain_graph=True)
        out["size"].square().mean().backward()
        optimizer.step()

    return {"step": step, "model": Two(), "plan": Plan((("trunk.0", "trunk.1"),))}


@case
def a_scheduler_inside():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def step(model, batch, optimizer):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        scheduler.step()

    return {"model": model, "step": step, "optimizer": optimizer, "others": scheduler}


@case
def an_average_model():
    model = mlp()
    average = copy.deepcopy(model).requires_grad_(False)

    def step(model, batch, optimizer):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(average.parameters(), model.parameters(), strict=True):
                old.lerp_(new, 0.1)

    return {"model": model, "step": step, "others": average}


@case
def torch_s_average_model():
    model = mlp()
    average = torch.optim.swa_utils.AveragedModel(model)

    def step(model, batch, optimizer):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        average.update_parameters(model)

    return {"model": model, "step": step, "others": average}


@case
def evaluation_inside():
    def step(model, batch, optimizer):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            loss_of(model, batch)
        model.train()

    return {"step": step}


@case
def distillation():
    teacher = mlp().eval()

    def step(model, batch, optimizer):
        optimizer.zero_grad()
        x, _ = batch
        with torch.no_grad():
            wanted = teacher(x).softmax(1)
        cross_entropy(model(x), wanted).backward()
        optimizer.step()

    return {"step": step, "others": teacher}


@case
def contrastive():
    def step(model, batch, optimizer):
        optimizer.zero_grad()
        one, other = batch
        one, other = normalize(model(one)), normalize(model(other))
        places = torch.arange(len(one), device=one.device)
        cross_entropy(one @ other.T / 0.1, places).backward()
        optimizer.step()

    return {"step": step, "batch": (torch.randn(64, 32), torch.randn(64, 32))}


@case
def a_method_of_a_trainer():
    class Trainer:
        def __init__(self, model):
            self.model, self.steps, self.weights = model, 0, torch.ones(4)

        def train(self, model, batch, optimizer):
            optimizer.zero_grad()
            self.steps += 1
            x, target = batch
            cross_entropy(model(x), target, self.weights).backward()
            optimizer.step()

    model = mlp()
    trainer = Trainer(model)
    return {"model": model, "step": trainer.train, "others": vars(trainer)}


@case
def a_trainer_with_all_its_own():
    class Trainer:
        def __init__(self):
            self.model = mlp()
            self.optimizer = AdamW(self.model.parameters())

        def train(self, model, batch, optimizer):
            self.optimizer.zero_grad()
            loss_of(self.model, batch).backward()
            self.optimizer.step()

    trainer = Trainer()
    how = {"model": trainer.model, "optimizer": trainer.optimizer}
    return {**how, "step": trainer.train, "others": vars(trainer)}


@case
def a_trainer_that_is_called():
    class Trainer:
        def __init__(self):
            self.weights = torch.ones(4)

        def __call__(self, model, batch, optimizer):
            optimizer.zero_grad()
            x, target = batch
            cross_entropy(model(x), target, self.weights).backward()
            optimizer.step()

    return {"step": Trainer()}


def weighted(weights, model, batch, optimizer, smooth=0.0):
    optimizer.zero_grad()
    x, target = batch
    cross_entropy(model(x), target, weights, label_smoothing=smooth).backward()
    optimizer.step()


@case
def a_partial():
    return {"step": functools.partial(weighted, torch.ones(4), smooth=0.1)}


@case
def a_lambda():
    return {
        "step": lambda model, batch, optimizer: (
            optimizer.zero_grad(),
            loss_of(model, batch).backward(),
            optimizer.step(),
        )
    }


@dataclass
class Output:
    loss: torch.Tensor | None
    logits: torch.Tensor


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.body = nn.Embedding(50, 32), mlp()

    def forward(self, input_ids, attention_mask, labels=None):
        x = self.words(input_ids) * attention_mask[..., None]
        logits = self.body(x.sum(1) / attention_mask.sum(1, keepdim=True))
        return Output(cross_entropy(logits, labels), logits)


@case
def a_hugging_face_loop():
    def step(model, batch, optimizer):
        outputs = model(**batch)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ids = torch.randint(50, (16, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["labels"] = torch.randint(4, (16,))
    plan = Plan((("body.0", "body.1"),))
    return {"model": Classifier(), "batch": batch, "step": step, "plan": plan}


@case
def a_batch_as_an_object():
    @dataclass
    class Batch:
        x: torch.Tensor
        target: torch.Tensor
        name: str

    def step(model, batch, optimizer):
        optimizer.zero_grad()
        cross_entropy(model(batch.x), batch.target).backward()
        optimizer.step()

    return {"step": step, "batch": Batch(*pair(), "first")}


@case
def a_batch_of_many_kinds():
    def step(model, batch, optimizer):
        optimizer.zero_grad()
        for view in batch["views"]:
            loss = cross_entropy(model(view), batch["target"][0])
            (batch["scale"] * loss).backward()
        optimizer.step()

    views = [torch.randn(64, 32), torch.randn(64, 32)]
    batch = {"views": views, "target": (pair()[1],), "scale": 0.5, "none": None}
    return {"step": step, "batch": batch}


@case
def dropout_and_noise():
    def step(model, batch, optimizer):
        optimizer.zero_grad()
        x, target = batch
        random.random(), np.random.rand()
        cross_entropy(model(x + 0.1 * torch.randn_like(x)), target).backward()
        optimizer.step()

    layers = nn.Linear(32, 64), nn.Dropout(0.3), nn.GELU(), nn.Linear(64, 4)
    return {"step": step, "model": nn.Sequential(*layers), "plan": Plan((("0", "1"),))}


@case
def hooks_that_are_the_step_s():
    def step(model, batch, optimizer):
        optimizer.zero_grad()
        kept = []
        handle = model[2].register_forward_hook(lambda *a: kept.append(a[-1]))
        loss = loss_of(model, batch) + kept[0].square().mean()
        handle.remove()
        loss.backward()
        optimizer.step()

    return {"step": step}


@case
def gradients_of_the_input():
    def step(model, batch, optimizer):
        optimizer.zero_grad()
        x, target = batch
        x = x.clone().requires_grad_()
        cross_entropy(model(x), target).backward()
        worse = (x + 0.1 * x.grad.sign()).detach()
        model.zero_grad()
        cross_entropy(model(worse), target).backward()
        optimizer.step()

    return {"step": step}


@case
def frozen_in_the_step():
    def step(model, batch, optimizer):
        model[0].requires_grad_(False)
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()

    return {"step": step}


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def run_case(name: str, **more) -> None:
    found = {"model": mlp(), "batch": pair(), "plan": PLAN, "optimizer": AdamW}
    found |= CASES[name]() | more
    plan = found.pop("plan")
    assert_agreement(found.pop("model"), found.pop("batch"), plan, **found)


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_predicted_as_measured(name):
    run_case(name)


OTHERS = {
    "a factory with options": lambda m: functools.partial(AdamW, lr=0.1, amsgrad=True),
    "SGD": lambda m: torch.optim.SGD,
    "momentum": lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
    "Adam": lambda m: torch.optim.Adam,
    "foreach": lambda m: torch.optim.AdamW(m.parameters(), foreach=True),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), fused=True),
    "Adagrad": lambda m: torch.optim.Adagrad,
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), momentum=0.5),
    "Muon": lambda m: torch.optim.Muon([p for p in m.parameters() if p.dim() == 2]),
    "groups": lambda m: AdamW(
        [{"params": m[0].parameters(), "lr": 0.1}, {"params": m[2].parameters()}]
    ),
    "some": lambda m: AdamW(m[4].parameters()),
}


def usual(model, batch, optimizer):
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


@pytest.mark.parametrize("name", OTHERS)
def test_an_optimizer_is_predicted_as_measured(name):
    model, batch = mlp(), pair()
    optimizer = OTHERS[name](model)
    assert_agreement(model, batch, PLAN, step=usual, optimizer=optimizer)
    assert_agreement(model, batch, PLAN, optimizer=optimizer)


def test_an_optimizer_with_state_keeps_it():
    model, batch = mlp(), pair()
    optimizer = AdamW(model.parameters())
    usual(model, batch, optimizer)
    assert_agreement(model, batch, PLAN, step=usual, optimizer=optimizer)


LOSSES = {
    "closed over": lambda: (lambda w: lambda out, y: cross_entropy(out, y, w))(
        torch.rand(4)
    ),
    "a module": lambda: nn.CrossEntropyLoss(weight=torch.rand(4)),
    "perceptual": lambda: (
        lambda net: lambda out, y: net(out).square().mean() + cross_entropy(out, y)
    )(nn.Sequential(nn.Linear(4, 16), nn.ReLU()).requires_grad_(False)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_holds_tensors(name):
    assert_agreement(mlp(), pair(), PLAN, loss=LOSSES[name]())


def no_backward(model, batch, optimizer):
    loss_of(model, batch)


def another_structure(model, batch, optimizer):
    usual(model, batch, optimizer)
    model[4] = nn.Linear(64, 4)


def two_updates(model, batch, optimizer):
    usual(model, batch, optimizer)
    usual(model, batch, optimizer)


def another_key(model, batch, optimizer):
    random.random(), np.random.rand(), torch.rand(1)
    usual(model, batch[:2], optimizer)
    batch[0].add_(1)
    batch[2]["mask"]


def another_form(model, batch, optimizer):
    usual(model, (batch[0].T, batch[1]), optimizer)


BAD = {
    no_backward: "never calls backward",
    another_structure: "changes which modules",
    two_updates: "optimizer.step\\(\\) 2 times",
    another_key: "the step fails: KeyError: 'mask'",
    another_form: "does not fit this model at layer '0'",
}


@pytest.mark.parametrize("run", [predict, measure, verify])
@pytest.mark.parametrize("step", BAD, ids=lambda step: step.__name__)
def test_a_bad_step_is_told_and_leaves_all_as_it_was(step, run):
    model, batch = mlp(), (*pair(), {})
    optimizer = AdamW(model.parameters())
    how = {"step": step, "optimizer": optimizer, "device": "cpu"}
    if run is measure:
        how["repeats"] = 0
    step_batch = batch[:2] if step is not another_key else batch
    with untouched(model, batch, how), pytest.raises(ValueError, match=BAD[step]) as e:
        run(model, step_batch, Plan(), **how)
    assert "\n" not in str(e.value)


def test_an_optimizer_of_another_model_is_refused():
    model, other, batch = mlp(), mlp(), pair()
    optimizer = AdamW(other.parameters())
    for run in (predict, measure):
        with untouched(model, other), pytest.raises(ValueError, match="not this model"):
            run(model, batch, step=usual, optimizer=optimizer, device="cpu")


def test_adafactor_looks_at_parameters_and_is_measured():
    model, batch = mlp(), pair()
    with pytest.raises(ValueError, match="looks at values"):
        predict(model, batch, optimizer=torch.optim.Adafactor, device="cpu")
    with untouched(model, batch):
        how = {"optimizer": torch.optim.Adafactor, "device": "cpu"}
        assert measure(model, batch, PLAN, repeats=0, **how).recompute_flops
        assert verify(model, batch, PLAN, **how).same


def lbfgs(model, batch, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    optimizer.step(closure)


def test_lbfgs_looks_at_values_and_is_measured():
    model, batch = mlp(), pair()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    with untouched(model, batch, optimizer):
        with pytest.raises(ValueError, match="looks at values"):
            predict(model, batch, step=lbfgs, optimizer=optimizer, device="cpu")
        how = {"step": lbfgs, "optimizer": optimizer, "device": "cpu"}
        assert measure(model, batch, PLAN, repeats=0, **how).peak_bytes
        assert verify(model, batch, PLAN, **how).same


def test_what_a_step_refers_to_is_put_back():
    model, batch = mlp(), pair()
    rng, array, queue = np.random.default_rng(0), np.zeros(3), deque([1])
    count, generator, flat = 0, torch.Generator(), torch.zeros(3)

    def step(model, batch, optimizer):
        nonlocal count
        count += 1
        array[0] += rng.random()
        torch.rand(1, generator=generator)
        queue.append(count)
        batch[0].add_(1.0)
        model[0].weight.data = model[0].weight.data.clone()
        flat.requires_grad_()
        usual(model, batch, optimizer)

    def state():
        return rng.bit_generator.state, array.tolist(), [*queue], count

    before, drawn = state(), generator.get_state().clone()
    with untouched(model, batch, flat):
        measure(model, batch, step=step, optimizer=AdamW, device="cpu", repeats=0)
        verify(model, batch, PLAN, step=step, optimizer=AdamW, device="cpu")
    assert state() == before and torch.equal(generator.get_state(), drawn)


def test_an_ambient_autocast_counts():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_agreement(mlp(), pair(), PLAN, optimizer=AdamW)


def test_a_first_layer_in_place_leaves_the_batch():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(32, 64), nn.Linear(64, 4))
    assert_agreement(model, pair(), Plan.alone(["1"]))


def test_a_trainer_with_a_lock_and_a_log():
    class Trainer:
        def __init__(self):
            self.lock, self.log = threading.Lock(), logging.getLogger("trainer")
            self.weights, self.steps = torch.rand(4), 0

        def train(self, model, batch, optimizer):
            with self.lock:
                self.steps += 1
                weighted(self.weights, model, batch, optimizer)

    trainer = Trainer()
    how = {"optimizer": AdamW, "step": trainer.train, "others": vars(trainer)}
    assert_agreement(mlp(), pair(), PLAN, **how)


def test_what_a_forward_makes_once_is_there_the_second_time():
    class Cached(nn.Linear):
        mask = None

        def forward(self, x):
            if self.mask is None:
                self.mask = torch.ones_like(x)
            return super().forward(x * self.mask)

    assert_agreement(nn.Sequential(Cached(32, 64), nn.GELU(), nn.Linear(64, 4)), pair())
