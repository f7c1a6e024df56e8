"""The line of a step, as a person reads it."""

from typing import Any

import pytest

from models.metrics import readable


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            {"step": 0, "steps": 350, "tokens": 0, "loss": None, "val_loss": 10.3252, "val_bpb": 6.4852},
            "step 0/350  held-out loss 10.325  6.485 bits per byte",
        ),
        (
            {"step": 100, "steps": 350, "tokens": 102_000, "loss": 3.5, "lr": 0.01, "tokens_per_s": 1020.0},
            "step 100/350  loss 3.500  lr 0.01  1,020 tokens/s  0:04:10 left",
        ),
        (
            {
                "step": 2000,
                "steps": 2000,
                "tokens": 9,
                "loss": 3.5,
                "grad_norm": 0.514,
                "tokens_per_s": 1020.0,
            },
            "step 2,000/2,000  loss 3.500  gradient 0.51  1,020 tokens/s",
        ),
    ],
)
def test_what_is_told(line: dict[str, Any], told: str) -> None:
    assert readable(line) == told
