"""Which steps are bad."""

import math

import pytest

from models.settings import Spikes
from models.spikes import FEWEST, WINDOW, Watch


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (2.0, 1.0, None),
        (math.nan, 1.0, "the loss is nan, the gradient norm 1"),
        (math.inf, 1.0, "the loss is inf, the gradient norm 1"),
        (2.0, math.nan, "the loss is 2, the gradient norm nan"),
        (2.0, -math.inf, "the loss is 2, the gradient norm -inf"),
        (2.0, 9.99, None),
        (2.0, 10.01, "the gradient norm is 10.01, more than 10 times the usual 1"),
        (1e9, 1.0, None),
    ],
)
def test_a_step_is_judged_by_what_is_usual(loss: float, norm: float, reason: str | None) -> None:
    watch = Watch(Spikes(), [1.0] * FEWEST)
    assert watch.judge(loss, norm) == reason
    assert watch.norms == [1.0] * FEWEST + ([norm] if reason is None else [])


def test_the_first_steps_are_not_judged_by_size() -> None:
    watch = Watch(Spikes())
    assert [watch.judge(2.0, 10.0**n) for n in range(FEWEST)] == [None] * FEWEST
    usual = (10.0**7 + 10.0**8) / 2
    assert watch.judge(2.0, 10.01 * usual) is not None
    assert watch.judge(2.0, 9.99 * usual) is None
    assert watch.judge(2.0, math.nan) is not None


def test_a_factor_of_zero_judges_only_what_is_finite() -> None:
    watch = Watch(Spikes(factor=0), [1.0] * WINDOW)
    assert watch.judge(2.0, 1e30) is None
    assert watch.judge(2.0, math.inf) is not None


def test_only_the_last_norms_count() -> None:
    watch = Watch(Spikes(), [1.0] * 100)
    for _ in range(WINDOW):
        assert watch.judge(2.0, 9.0) is None
    assert watch.norms == [9.0] * WINDOW
    assert watch.judge(2.0, 89.0) is None
    assert watch.judge(2.0, 91.0) is not None
