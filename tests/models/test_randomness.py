"""Every random generator goes on where it was, from tensors alone."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from corpora.errors import InputError
from models.randomness import random_state, restore_random

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Leave the generators as they were."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)


def drawn() -> list[Any]:
    return [
        *(random.random(), random.gauss(), random.gauss(), random.getrandbits(70)),
        *(np.random.standard_normal(3).tolist(), np.random.randint(1 << 30), np.random.random()),
        *(torch.rand(5).tolist(), torch.randn(17).tolist(), torch.randperm(9).tolist()),
    ]


@pytest.mark.parametrize("before", range(5))
def test_all_generators_go_on_exactly(before: int, tmp_path: Path) -> None:
    """With and without a Gaussian that waits, and at several places of the 624 words."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(before)
    for _ in range(before * 99):
        random.gauss()
        np.random.standard_normal()
        torch.randn(1)
    save_file(random_state(CPU), tmp_path / "random")
    expected, states = drawn(), (random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state())
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(77)
    assert drawn() != expected
    restore_random(load_file(tmp_path / "random"), CPU)
    assert drawn() == expected
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[2])
    now = np.random.get_state(legacy=False)
    assert now["state"]["key"].tolist() == states[1]["state"]["key"].tolist()
    assert {**now, "state": now["state"]["pos"]} == {**states[1], "state": states[1]["state"]["pos"]}


def test_the_states_are_kept_whole() -> None:
    random.seed(1)
    random.gauss()
    tensors = random_state(CPU)
    assert {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "random:python": ("torch.int64", (625,)),
        "random:python:gauss": ("torch.float64", (1,)),
        "random:numpy": ("torch.int64", (626,)),
        "random:numpy:gauss": ("torch.float64", (1,)),
        "random:cpu": ("torch.uint8", (len(torch.get_rng_state()),)),
    }
    assert tensors["random:python"].tolist() == list(random.getstate()[1])
    random.gauss()
    assert random_state(CPU)["random:python:gauss"].shape == (0,)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("random:python", None),
        ("random:numpy", None),
        ("random:cpu", None),
        ("random:python", torch.zeros(624, dtype=torch.int64)),
        ("random:python", torch.full((625,), -1)),
        ("random:python", torch.full((625,), 625)),
        ("random:python", torch.zeros(625)),
        ("random:numpy", torch.zeros(600, dtype=torch.int64)),
        ("random:numpy", torch.full((626,), -1)),
        ("random:numpy", torch.full((626,), 625)),  # a position behind the words: NumPy would read on
        ("random:numpy:gauss", torch.zeros(2)),
        ("random:cpu", torch.zeros(9, dtype=torch.uint8)),
        ("random:cpu", torch.zeros(len(torch.get_rng_state()))),
    ],
)
def test_what_no_generator_can_be_in_is_refused(name: str, tensor: torch.Tensor | None) -> None:
    tensors = random_state(CPU)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    with pytest.raises(InputError, match=r"random states cannot be restored \(\w+Error: ") as told:
        restore_random(tensors, CPU)
    assert "\n" not in str(told.value)


def test_a_state_of_cuda_is_passed_over_without_cuda() -> None:
    tensors = random_state(CPU)
    expected = drawn()
    restore_random({**tensors, "random:cuda": torch.zeros(16, dtype=torch.uint8)}, CPU)
    assert drawn() == expected
