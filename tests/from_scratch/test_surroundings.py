"""RNG states, autocast and the default device come back, and go away again."""

import pytest
import torch

from helpers.from_scratch._surroundings import Surroundings


def test_the_same_numbers_are_drawn_again_and_the_others_go_on():
    torch.manual_seed(0)
    then = Surroundings((), preserve_rng_state=True)
    drawn = torch.rand(5)
    torch.manual_seed(1)
    with then.restored():
        assert torch.equal(torch.rand(5), drawn)
    after = torch.rand(5)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(5), after)


def test_they_come_back_as_often_as_asked():
    then = Surroundings((), preserve_rng_state=True)
    drawn = torch.rand(5)
    for _ in range(2):
        with then.restored():
            assert torch.equal(torch.rand(5), drawn)


def test_random_numbers_are_left_alone_where_they_do_not_count():
    torch.manual_seed(0)
    then = Surroundings((), preserve_rng_state=False)
    first = torch.rand(5)
    with then.restored():
        second = torch.rand(5)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(5), first) and torch.equal(torch.rand(5), second)


def test_an_exception_inside_restores_as_well():
    then = Surroundings((), preserve_rng_state=True)
    torch.manual_seed(1)
    with pytest.raises(KeyError), then.restored():
        raise KeyError
    after = torch.rand(5)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(5), after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_comes_back_with_its_dtype(dtype):
    a = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=dtype):
        then = Surroundings((a,), preserve_rng_state=False)
    plain = Surroundings((a,), preserve_rng_state=False)
    with then.restored():
        assert (a @ a).dtype == dtype
        with plain.restored():
            assert (a @ a).dtype == torch.float32
    assert (a @ a).dtype == torch.float32


def test_the_default_device_comes_back():
    with torch.device("meta"):
        then = Surroundings((), preserve_rng_state=False)
    with then.restored():
        assert torch.ones(1).is_meta
    assert not torch.ones(1).is_meta


@pytest.mark.gpu
def test_generators_of_a_gpu_among_nested_arguments_come_back():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    then = Surroundings(({"x": [torch.ones(1, device="cuda")]},), True)
    drawn = torch.rand(5, device="cuda")
    before = torch.cuda.get_rng_state()
    with then.restored():
        assert torch.equal(torch.rand(5, device="cuda"), drawn)
    assert torch.equal(torch.cuda.get_rng_state(), before)
