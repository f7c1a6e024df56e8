"""What a machine is known by: names as CUDA gives them, and files as the kernel writes them."""

from pathlib import Path

import pytest
import torch

from models import hardware
from models.hardware import peak_flops, this_machine


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756, 51.2),
        ("NVIDIA H100 NVL", 835.5, 60),
        ("NVIDIA H200", 989.4, 66.9),
        ("NVIDIA GH200 480GB", 989.4, 66.9),
        ("NVIDIA GH200 144G HBM3e", 989.4, 66.9),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA A100-SXM4-40GB", 312, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA A40", 149.7, 37.4),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA A10G", 70, 35),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA GeForce RTX 3090", 71, 35.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 5090", 209.5, 104.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2, 91.1),
        ("Tesla V100-SXM2-16GB", None, 15.7),
        ("Tesla V100-PCIE-32GB", None, 14),
        ("Tesla T4", None, 8.1),
        ("AMD Instinct MI300X", 1307.4, 163.4),
        # Other chips, or parts of one, of a similar name
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA GeForce GTX 1080", None, None),
        ("", None, None),
    ],
)
def test_peaks(name: str, bf16: float | None, fp32: float | None) -> None:
    for dtype, peak in ((torch.bfloat16, bf16), (torch.float32, fp32)):
        assert peak_flops(name, dtype) == (None if peak is None else pytest.approx(peak * 1e12))


def test_float32_is_tf32_where_torch_multiplies_with_it() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert peak_flops("NVIDIA H100 80GB HBM3", torch.float32) == 494.7e12
        assert peak_flops("Tesla T4", torch.float32) == 8.1e12  # has no TF32
    finally:
        torch.set_float32_matmul_precision(before)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_room_in_control_groups_of_version_2(tmp_path: Path) -> None:
    of = tmp_path / "cgroup"
    of.write_text("0::/jobs/one\n")
    root = tmp_path / "sys"
    stat = "anon 5\ninactive_file 30\n"
    write(root / "jobs/one", memory__max="max\n", memory__current="60\n", memory__stat=stat)
    write(root / "jobs", memory__max="100\n", memory__current="80\n", memory__stat=stat)
    assert list(hardware._room_in_groups(root, of)) == [50]


def test_room_in_control_groups_of_version_1(tmp_path: Path) -> None:
    of = tmp_path / "cgroup"
    of.write_text("4:cpuset:/elsewhere\n3:memory:/job\n")
    root = tmp_path / "sys"
    write(
        root / "memory/job",
        memory__limit_in_bytes="1000\n",
        memory__usage_in_bytes="1200\n",
        memory__stat="total_inactive_file 100\n",
    )
    assert list(hardware._room_in_groups(root, of)) == [0]
    assert list(hardware._room_in_groups(root, tmp_path / "absent")) == []


def test_the_smallest_of_all_limits_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_available", lambda: 1000)
    for rooms, free in (([], 1000), ([2000, 300], 300)):
        monkeypatch.setattr(hardware, "_room_in_groups", lambda rooms=rooms: iter(rooms))
        assert hardware.free_memory() == free


def test_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 << 26 < hardware.free_memory() < 1 << 50
    monkeypatch.setattr(hardware, "free_memory", lambda: 1 << 30)
    machine = this_machine(torch.device("cpu"), 4)
    assert (machine.kind, machine.name, machine.memory) == ("cpu", "CPU (1 thread)", 1 << 28)
    assert 1e8 < (machine.peak(torch.float32) or 0) < 1e14
    assert machine.peak(torch.float32) == machine.peak(torch.float32)  # measured once
