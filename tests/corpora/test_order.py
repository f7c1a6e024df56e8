"""The order of blocks: a bijection, the same for ever, and without a pattern."""

import itertools
import time
from collections import Counter
from collections.abc import Callable
from math import factorial

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpora.order import Permutation

Indices = npt.NDArray[np.int64]


def test_every_place_has_one_block() -> None:
    for n in range(1, 2001):
        assert np.array_equal(np.sort(Permutation(n, 1, n % 3)(np.arange(n))), np.arange(n)), n


@pytest.mark.parametrize("n", [65_535, 65_536, 65_537, 1_000_003])
def test_every_place_of_many_has_one_block(n: int) -> None:
    assert np.bincount(Permutation(n, 5, 2)(np.arange(n)), minlength=n).tolist() == [1] * n


@pytest.mark.parametrize("n", [2**31 + 1, 10**12, 2**40 - 1, 2**40, 2**62])
def test_places_of_very_many_are_distinct(n: int) -> None:
    # A random function instead of a permutation would meet itself here for the smallest n, about 23 times.
    places = np.concatenate([np.arange(160_000), n - 1 - np.arange(160_000)])
    order = Permutation(n, 0, 0)(places)
    assert order.min() >= 0
    assert order.max() < n
    assert len(np.unique(order)) == len(places)


@given(
    n=st.integers(1, 2**40),
    seed=st.integers(),
    epoch=st.integers(0),
    data=st.data(),
)
def test_a_place_does_not_depend_on_its_company(n: int, seed: int, epoch: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, n - 1), max_size=10))
    order = Permutation(n, seed, epoch)
    together = order(np.array(indices, np.int64))
    alone = [int(Permutation(n, seed, epoch)(np.array(i))) for i in indices]
    assert together.tolist() == alone
    assert together.dtype == np.int64
    assert all(0 <= i < n for i in alone)
    assert len(set(alone)) == len(set(indices))


# Never to be changed: a run that goes on under another order would see blocks twice and others never.
PINNED = [
    (1, 0, 0, [0]),
    (2, 0, 0, [0, 1]),
    (2, 0, 1, [1, 0]),
    (10, 0, 0, [3, 6, 9, 5, 4, 1, 0, 7, 2, 8]),
    (10, 0, 1, [6, 7, 3, 0, 2, 4, 5, 8, 1, 9]),
    (10, 1, 0, [8, 0, 9, 2, 6, 1, 7, 5, 3, 4]),
    (64, 42, 3, [46, 5, 54, 4, 44]),
    (65, 42, 3, [64, 38, 7, 22, 42]),
    (1_000_000, 42, 3, [801682, 939644, 899312, 404180, 346924]),
    (2**40, 0, 0, [762840909869, 701239890923, 745567418800, 521736637532, 335450495493]),
    (2**40, 2**63, 2**33, [229904663318, 1064813012854, 129060650097, 265510881842, 506697016900]),
    (2**40, -1, 0, [309179140770, 2737128270, 911993975209, 399959875552, 362850767002]),
]


@pytest.mark.parametrize(("n", "seed", "epoch", "first"), PINNED)
def test_order_is_pinned(n: int, seed: int, epoch: int, first: list[int]) -> None:
    assert Permutation(n, seed, epoch)(np.arange(len(first))).tolist() == first


def patterns(permute: Callable[[Indices], Indices], n: int) -> set[str]:
    """Name the patterns in a permutation of range(n), each of which a random one has once in a million or less."""
    i = np.arange(n)
    order = permute(i)
    distances = np.bincount(np.diff(order) % n, minlength=n)
    regions = np.bincount(i * 50 // n * 50 + order * 50 // n, minlength=2500)
    chi = float(((regions - n / 2500) ** 2 / (n / 2500)).sum())
    found = {
        "places and blocks correlate": abs(np.corrcoef(i, order)[0, 1]) * n**0.5 > 5,
        "neighbours correlate": abs(np.corrcoef(order[:-1], order[1:])[0, 1]) * n**0.5 > 5,
        "neighbours keep their distance": np.count_nonzero(distances) < n / 2,  # 0.63 n is expected
        "blocks stay in their places": np.count_nonzero(order == i) > 12,  # 1 is expected
        "blocks move too little or too far": not 0.98 < 3 * np.abs(order - i).mean() / n < 1.02,
        "regions stay together": chi > 2500 + 5 * (2 * 2500) ** 0.5,
    }
    return {name for name, is_so in found.items() if is_so}


@pytest.mark.parametrize("n", [40_000, 65_536, 100_003])
def test_no_pattern(n: int) -> None:
    for seed, epoch in itertools.product(range(4), repeat=2):
        assert patterns(Permutation(n, seed, epoch), n) == set(), (seed, epoch)


def shuffled_regions(i: Indices) -> Indices:
    random = np.random.default_rng(0)
    return random.permutation(random.permuted(i.reshape(50, -1), axis=1)).reshape(-1)


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (lambda i: i, "blocks stay in their places"),
        (lambda i: i[::-1], "places and blocks correlate"),
        (lambda i: i ^ 1, "blocks move too little or too far"),
        (lambda i: (i + 20_000) % 40_000, "blocks move too little or too far"),
        (
            lambda i: np.random.default_rng(0).permutation(i.reshape(-1, 8)).reshape(-1),
            "neighbours correlate",
        ),
        (lambda i: (i * 17_393 + 7_919) % 40_000, "neighbours keep their distance"),  # linear congruence
        (shuffled_regions, "regions stay together"),
    ],
)
def test_bad_permutations_have_patterns(bad: Callable[[Indices], Indices], found: str) -> None:
    assert sorted(bad(np.arange(40_000))) == list(range(40_000))
    assert found in patterns(bad, 40_000)


def test_epochs_and_seeds_have_nothing_in_common() -> None:
    n = 10_000
    orders = [
        Permutation(n, seed, epoch)(np.arange(n)) for seed in (0, 1, 2, 10, 11) for epoch in (0, 1, 2, 10, 11)
    ]
    for one, other in itertools.combinations(orders, 2):
        assert np.count_nonzero(one == other) <= 12  # 1 is expected
        assert abs(np.corrcoef(one, other)[0, 1]) * n**0.5 < 5


@pytest.mark.parametrize(("n", "trials"), [(3, 200), (5, 2500)])
def test_few_blocks_come_in_all_orders_equally_often(n: int, trials: int) -> None:
    counts = Counter(tuple(Permutation(n, seed, 0)(np.arange(n))) for seed in range(trials))
    expected = trials / factorial(n)
    assert len(counts) == factorial(n)
    chi = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi < factorial(n) + 3 * (2 * factorial(n)) ** 0.5


def test_any_shape() -> None:
    order = Permutation(100, 3, 0)
    flat = order(np.arange(6))
    assert order(np.arange(6).reshape(2, 3)).tolist() == flat.reshape(2, 3).tolist()
    assert order(np.arange(6)[::-2]).tolist() == flat[::-2].tolist()
    assert order(np.array(4)) == flat[4]
    assert order(np.arange(0)).shape == (0,)


def test_the_indices_given_are_left_as_they_are() -> None:
    indices = np.arange(1000)
    Permutation(1000, 0, 0)(indices)
    assert indices.tolist() == list(range(1000))


@pytest.mark.parametrize("n", [0, -1, 2**62 + 1])
def test_numbers_that_cannot_be_permuted(n: int) -> None:
    with pytest.raises(ValueError, match=f"a permutation of {n} numbers"):
        Permutation(n, 0, 0)


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_outside(index: int) -> None:
    with pytest.raises(IndexError, match=r"outside range\(10\)"):
        Permutation(10, 0, 0)(np.array([0, index]))


def test_speed(record_property: Callable[[str, object], None]) -> None:
    indices, order = np.arange(1 << 18), Permutation(10**9, 0, 0)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        order(indices)
        times.append(time.perf_counter() - started)
    speed = len(indices) / min(times)
    record_property("indices_per_s", round(speed))
    # Over 10 million on an idle core; a Python loop would do 0.1 million, a slow or busy machine more than this.
    assert speed > 500_000
