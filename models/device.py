"""Where the arithmetic happens: the device, its number format, the threads."""

import ctypes
import os
from typing import Literal

import torch

from corpora.errors import InputError
from corpora.parallel import cores

Device = Literal["auto", "cpu", "cuda"]
MOST_THREADS = 16  # small matrices get slower, not faster, beyond


def choose(wanted: Device, local_rank: int = 0) -> torch.device:
    """Return the device; auto is CUDA when there is one.  On a CPU, use all cores that we may use."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device cuda: torch {torch.__version__} finds no CUDA device here; "
            "install a CUDA build of torch on a machine with a GPU, or use --device cpu"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(min(cores(), MOST_THREADS))
        _keep_memory()
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"process {local_rank + 1} of this machine has no GPU for itself: torch finds "
            f"{torch.cuda.device_count()}; start as many processes as there are GPUs"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _keep_memory() -> None:
    """Let glibc keep what is freed.

    It maps each large tensor anew and gives it back to the kernel at once, so every step pays for clearing the
    same pages again: half the time of a step with a large vocabulary.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is given back


def make_deterministic() -> None:
    """Use only algorithms that give the same bits each time; call it before anything runs on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def choose_dtype(wanted: Literal["fp32", "bf16", "auto"], device: torch.device) -> torch.dtype:
    """Return the number format of matrix products; auto is bf16 where that is fast."""
    if wanted == "auto":
        return torch.bfloat16 if fast_bf16(device) else torch.float32
    return torch.bfloat16 if wanted == "bf16" else torch.float32


def fast_bf16(device: torch.device) -> bool:
    """Tell whether the device multiplies bf16 natively; emulated, it is many times slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def describe(device: torch.device) -> str:
    """Return what decides the last bits of a result: device, threads, torch version."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
    return f"{name}, torch {torch.__version__}"
