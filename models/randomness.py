"""The states of all random generators, as tensors: nothing that would have to be unpickled.

random:python        int64 [625]    625 words, the last one is the position
random:numpy         int64 [626]    624 words, the position, whether a Gaussian waits
random:cpu           uint8          torch's own form
random:cuda          uint8          torch's own form
random:*:gauss       float64 [0..1] the Gaussian that waits: both draw them in pairs
"""

import random

import numpy as np
import torch
from torch import Tensor

from corpora.errors import InputError

WORDS = 624  # of the Mersenne Twister, which Python and NumPy share
VERSION = 3  # of Python's own state, since 2.4


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of Python's, NumPy's global and torch's generators, the device's too if it is CUDA."""
    _, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    inner = numpy["state"]
    tensors = {
        "random:python": torch.tensor(words),
        "random:python:gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "random:numpy": torch.tensor([*inner["key"].tolist(), inner["pos"], numpy["has_gauss"]]),
        "random:numpy:gauss": torch.tensor([numpy["gauss"]], dtype=torch.float64),
        "random:cpu": torch.get_rng_state(),
    }
    if device.type == "cuda":
        tensors["random:cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def restore_random(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Put all generators back where they were; what was saved without CUDA leaves CUDA's as it is.

    Raises InputError for states that no generator can have.
    """
    try:
        python, numpy = tensors["random:python"].tolist(), tensors["random:numpy"].tolist()
        waiting, (gauss,) = tensors["random:python:gauss"].tolist(), tensors["random:numpy:gauss"].tolist()
        if len(numpy) != WORDS + 2 or not 0 <= numpy[WORDS] <= WORDS:  # NumPy would read beyond its words
            raise ValueError("random:numpy is no state of a Mersenne Twister")
        random.setstate((VERSION, tuple(python), waiting[0] if waiting else None))
        np.random.set_state(
            {
                "bit_generator": "MT19937",
                "state": {"key": np.array(numpy[:WORDS], np.uint32), "pos": numpy[WORDS]},
                "has_gauss": numpy[WORDS + 1],
                "gauss": gauss,
            }
        )
        torch.set_rng_state(tensors["random:cpu"])
        if device.type == "cuda" and "random:cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random:cuda"], device)
    except (KeyError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise InputError(
            f"the checkpoint's random states cannot be restored ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); "
            "go on from another checkpoint"
        ) from None
