"""Threads that predict at once get what one gets, and leave torch as it was."""

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from helpers.checkpointing import Plan
from helpers.measure import predict
from helpers.models import GPT, MLP
from tests.torch_state import changes, torch_state

BF16 = torch.bfloat16
MLP_4, X = MLP([16, 32, 32, 4], "gelu", dropout=0.1), torch.randn(8, 16)
DECODER, IDS = GPT(blocks=2, width=32), torch.randint(1000, (2, 8))
STEPS = [
    lambda: predict(MLP_4, X, Plan.alone(["layer1"])),
    lambda: predict(MLP_4, X, device="cpu", optimizer=torch.optim.AdamW),
    lambda: predict(MLP_4, X, autocast=BF16),
    lambda: predict(DECODER, IDS, Plan.alone(["blocks.0"]), autocast=BF16),
    lambda: predict(DECODER, IDS, device="cpu"),
]


def test_threads_predict_what_one_does():
    before, expected = torch_state(), [step() for step in STEPS]
    assert not changes(before, torch_state())
    wanted = [n % len(STEPS) for n in range(60)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda place: STEPS[place](), wanted))
    assert found == [expected[place] for place in wanted]
    assert not changes(before, torch_state())


def test_of_two_threads_one_predicts_a_copy_of_the_model_on_the_meta_device():
    both, seen = threading.Barrier(2, timeout=30), queue.SimpleQueue()

    class Waits(torch.nn.Linear):
        def forward(self, x):
            seen.put(self)
            both.wait()  # each is in the middle of its step
            return super().forward(x)

    model, plan = Waits(4, 4, device="meta"), Plan()
    x = torch.empty(2, 4, device="meta")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: predict(model, x, plan), range(2))
    assert first == second and first.categories["gradient"]
    used = [seen.get(), seen.get()]
    assert used[0] is not used[1] and any(one is model for one in used)
    assert all(parameter.grad is None for parameter in model.parameters())
