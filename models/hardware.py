"""What a machine can do: its GPU's peak by the data sheet, the memory that is free, how fast its CPU multiplies."""

import math
import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from models.device import fast_bf16


class Peak(NamedTuple):
    """Operations in a second, in 1e12, on dense matrices; None: the chip has no unit for that format."""

    bf16: float | None
    tf32: float | None
    fp32: float


# From the makers' data sheets and architecture papers: sums in float32, and without sparsity, with which the
# sheets' larger figures are twice these.
PEAKS = {
    "B300": Peak(2250, 1125, 75),
    "B200": Peak(2250, 1125, 75),
    "GB300": Peak(2500, 1250, 80),
    "GB200": Peak(2500, 1250, 80),
    "H200": Peak(989.4, 494.7, 66.9),
    "H200 NVL": Peak(835.5, 417.5, 60),
    "GH200": Peak(989.4, 494.7, 66.9),
    "H100": Peak(989.4, 494.7, 66.9),
    "H100 PCIE": Peak(756, 378, 51.2),
    "H100 NVL": Peak(835.5, 417.5, 60),
    "H800": Peak(989.4, 494.7, 66.9),
    "H20": Peak(148, 74, 44),
    "A100": Peak(312, 156, 19.5),
    "A100 PCIE": Peak(312, 156, 19.5),
    "A800": Peak(312, 156, 19.5),
    "A800 PCIE": Peak(312, 156, 19.5),
    "A40": Peak(149.7, 74.8, 37.4),
    "A30": Peak(165, 82, 10.3),
    "A10": Peak(125, 62.5, 31.2),
    "A10G": Peak(70, 35, 35),
    "L4": Peak(121, 60, 30.3),
    "L40": Peak(181, 90.5, 90.5),
    "L40S": Peak(362, 183, 91.6),
    "RTX PRO 6000 BLACKWELL WORKSTATION EDITION": Peak(503.8, 251.9, 126),
    "RTX 6000 ADA GENERATION": Peak(364.2, 182.1, 91.1),
    "RTX A6000": Peak(154.8, 77.4, 38.7),
    "RTX A5000": Peak(111.1, 55.5, 27.8),
    "RTX 5090": Peak(209.5, 104.8, 104.8),
    "RTX 5080": Peak(112.6, 56.3, 56.3),
    "RTX 5070 TI": Peak(87.9, 43.9, 43.9),
    "RTX 4090": Peak(165.2, 82.6, 82.6),
    "RTX 4080": Peak(97.5, 48.7, 48.7),
    "RTX 4070 TI": Peak(80.2, 40.1, 40.1),
    "RTX 3090 TI": Peak(80, 40, 40),
    "RTX 3090": Peak(71, 35.6, 35.6),
    "RTX 3080": Peak(59.5, 29.8, 29.8),
    "RTX 3060": Peak(25.5, 12.7, 12.7),
    "V100": Peak(None, None, 15.7),
    "V100 PCIE": Peak(None, None, 14),
    "T4": Peak(None, None, 8.1),
    "MI325X": Peak(1307.4, 653.7, 163.4),
    "MI300X": Peak(1307.4, 653.7, 163.4),
}
# Words of a CUDA name that say nothing about the speed: NVIDIA A100-SXM4-40GB, NVIDIA H100 80GB HBM3.
_NO_MATTER = re.compile(r"NVIDIA|AMD|INSTINCT|TESLA|GEFORCE|\d+GB?|HBM\d\w?|SXM\d?|AC|OAM")


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """Return the dense peak of the device that CUDA calls `name`, in floating-point operations per second.

    None for a device that the table has not: another chip of a similar name ("RTX 4090 Laptop GPU", a MIG
    slice) is none of its own.  float32 is TF32 where torch is set to multiply with it.
    """
    words = [word for word in re.split(r"[ -]", name.upper()) if not _NO_MATTER.fullmatch(word)]
    found = PEAKS.get(" ".join(words))
    if found is None:
        return None
    if dtype == torch.bfloat16:
        best = found.bf16
    else:
        fast = torch.get_float32_matmul_precision() != "highest"
        best = (found.tf32 if fast else None) or found.fp32
    return None if best is None else best * 1e12


@dataclass(frozen=True)
class Machine:
    """What one process of training may have.

    memory: bytes of the device
    peak: operations in a second by number format, None where nobody knows; a GPU's by its data sheet, a CPU's
        as measured
    bf16: the device has instructions for it
    host: bytes of main memory beside a GPU, where the copy of a checkpoint lies; None: no limit known
    """

    name: str
    kind: Literal["cpu", "cuda"]
    memory: int
    peak: Callable[[torch.dtype], float | None]
    bf16: bool = True
    host: int | None = None


def this_machine(device: torch.device, processes: int = 1, *, idle: bool = False) -> Machine:
    """Return what each of `processes` may have here, of which those of a CPU share its memory.

    idle: count all of a GPU's memory, as if nothing else were on it, instead of what is free now
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        free, total = torch.cuda.mem_get_info(device)
        host = free_memory()
        return Machine(
            name, "cuda", total if idle else free, partial(peak_flops, name), fast_bf16(device), host
        )
    threads = torch.get_num_threads()
    name = f"CPU ({threads} thread{'s' if threads > 1 else ''})"
    return Machine(name, "cpu", free_memory() // processes, cpu_flops, fast_bf16(device))


def peak_memory() -> int:
    """Return the most bytes of main memory that this process has had.

    Linux' ru_maxrss would not do: a process that was forked by a larger one begins with the size of that.
    """
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text("ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


def free_memory() -> int:
    """Return the bytes of main memory that this process can still have, by the kernel and by its control groups."""
    return min([_available(), *_room_in_groups()])


def _available() -> int:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # not Linux: all that is built in


def _room_in_groups(
    root: Path = Path("/sys/fs/cgroup"), of: Path = Path("/proc/self/cgroup")
) -> Iterator[int]:
    """Yield what is left of each limit of this process's control groups, version 1 or 2, and of those around them.

    Cached pages of files count as used, but the kernel gives them up: they count as free here.
    """
    try:
        lines = of.read_text("utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base, names = (root, ("memory.max", "memory.current", "inactive_file"))
        if controllers:
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        group = base / path.strip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(base))):
            with suppress(OSError, ValueError):  # no limit there is the word "max", or no file at all
                limit, used = (int((folder / name).read_text("ascii")) for name in names[:2])
                counts = dict(
                    line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines()
                )
                yield max(0, limit - used + int(counts.get(names[2], 0)))


@cache
def cpu_flops(dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Measure the operations per second that this CPU makes in a product as large as one of a small model's."""
    a, b = torch.randn(512, 256).to(dtype), torch.randn(256, 8192).to(dtype)
    best, until = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < until:
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * 512 * 256 * 8192 / best
