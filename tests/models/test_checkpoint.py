"""Checkpoints are whole or absent, a damaged one is never used, and training does not wait for the disk."""

import errno
import json
import logging
import os
import shutil
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as serialized
from torch import nn

from corpora.errors import InputError, Unavailable
from corpora.files import sha256_file
from models import checkpoint, runs
from models.checkpoint import OPTIMIZER, STATE, WEIGHTS, Saver, Scores, State

CPU = torch.device("cpu")
ALL = (WEIGHTS, OPTIMIZER, STATE)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fsync do nothing: it is for power cuts, which no test makes, and slow where others write."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def state(step: int, bpb: float = 1.1, **changes: Any) -> State:
    scores = Scores(val_loss=2.5, val_bpb=bpb)
    fields = {
        "step": step,
        "tokens": step * 10,
        "settings": {"model": {"layers": 2}},
        "data": "d",
        "order": "o",
        "tokenizer": "t",
        "parameters": 6,
        "made_on": "here",
        "untrained": scores,
        "scores": scores,
        "scored_step": step,
    }
    return State(**{**fields, **changes})


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2, 3), float(value))}


def save(run: Path, step: int, keep: int = 3, bpb: float = 1.1, **changes: Any) -> Path:
    return checkpoint.save(
        run, state(step, bpb, **changes), weights(step), {"w:exp_avg": torch.ones(3).t()}, keep
    )


def value(folder: Path) -> float:
    return float(checkpoint.load(folder, WEIGHTS, CPU)["w"][0, 0])


def steps(run: Path) -> list[int]:
    return [step for step, _ in runs.checkpoints(run)]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# --- what is written, and read back


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    assert folder == tmp_path / "checkpoints" / "step-0000007" == checkpoint.folder_of(tmp_path, 7)
    assert {file.name for file in folder.iterdir()} == set(ALL)
    read = checkpoint.read_state(folder)
    assert read.model_copy(update={"files": {}}) == state(7)
    assert torch.equal(checkpoint.load(folder, WEIGHTS, CPU)["w"], torch.full((2, 3), 7.0))
    assert checkpoint.newest_sound(tmp_path) == runs.latest_checkpoint(tmp_path) == folder


def test_whoever_may_read_the_state_may_read_the_tensors(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in ALL} == {0o644}


def test_a_part_of_a_tensor_is_read_alone(tmp_path: Path) -> None:
    table = torch.arange(12.0).view(4, 3)
    folder = checkpoint.save(tmp_path, state(1), {"w": table, "none": torch.empty(0, 3)}, {}, keep=2)
    with checkpoint.open_tensors(folder, WEIGHTS) as handle:
        assert set(handle.keys()) == {"w", "none"}
        assert handle.get_slice("w").get_shape() == [4, 3]
        assert torch.equal(handle.get_slice("w")[1:3], table[1:3])
        assert torch.equal(handle.get_tensor("none"), torch.empty(0, 3))
    with (
        pytest.raises(InputError, match=r"model.safetensors: .*does not contain tensor nothing; remove"),
        checkpoint.open_tensors(folder, WEIGHTS) as handle,
    ):
        handle.get_tensor("nothing")
    with (
        pytest.raises(InputError, match=r"other.safetensors is missing"),
        checkpoint.open_tensors(folder, "other.safetensors"),
    ):
        pass


class Network(nn.Module):
    def __init__(self, rows: int = 2, dtype: torch.dtype = torch.float32, **more: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(rows, 3, dtype=dtype, device="meta"))
        for name, size in more.items():
            setattr(self, name, nn.Parameter(torch.empty(size, device="meta")))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Network(rows=4), r"\(w is F32 \[2, 3\] in the checkpoint, is F32 \[4, 3\] in the network\)"),
        (Network(dtype=torch.bfloat16), r"\(w is F32 \[2, 3\] in the checkpoint, is BF16 \[2, 3\] in the"),
        (Network(b=5), r"\(b is missing in the checkpoint, is F32 \[5\] in the network\)"),
        (Network(a=1, b=1, c=1, d=1), r"\(a is missing .*; b is .*; c is .*; and 1 more\)"),
        (nn.Module(), r"\(w is F32 \[2, 3\] in the checkpoint, is missing in the network\)"),
    ],
)
def test_weights_of_another_network_are_refused_by_name(
    network: nn.Module, message: str, tmp_path: Path
) -> None:
    folder = save(tmp_path, 1)
    checkpoint.check_shapes(folder, Network())
    with pytest.raises(InputError, match=message + ".*; make a run folder of its own"):
        checkpoint.check_shapes(folder, network)


# --- saving in the background


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, writing = threading.Event(), []
    write = checkpoint.save_file

    def slow(tensors: dict[str, torch.Tensor], path: Path) -> None:
        writing.append(path.parent.name)
        assert go_on.wait(30)
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    saver, live, moments = Saver(tmp_path, 2), weights(1), {"w:exp_avg": torch.full((4,), 0.5)}
    folder = saver.save(state(1), live, moments)
    assert folder == checkpoint.folder_of(tmp_path, 1) and not folder.exists()  # `slow` waits for us
    live["w"].fill_(2)
    moments["w:exp_avg"].fill_(9)
    go_on.set()
    saver.wait()
    assert value(folder) == 1
    assert checkpoint.load(folder, OPTIMIZER, CPU)["w:exp_avg"].tolist() == [0.5] * 4

    go_on.clear()
    saver.save(state(2), live, moments)
    threading.Timer(0.05, go_on.set).start()
    live["w"].fill_(3)
    saver.save(state(3), live, moments)  # waits for the one before it, and so does not spoil its copy
    assert value(checkpoint.folder_of(tmp_path, 2)) == 2
    saver.wait()
    assert value(checkpoint.folder_of(tmp_path, 3)) == 3
    assert writing == [f".step-000000{step}.tmp" for step in (1, 1, 2, 2, 3, 3)]


def test_the_copies_memory_is_used_again_where_it_fits(tmp_path: Path) -> None:
    written = []
    with pytest.MonkeyPatch.context() as patched, Saver(tmp_path, 2) as saver:
        write = checkpoint.save_file

        def told(tensors: dict[str, torch.Tensor], path: Path) -> None:
            written.append({name: tensor.data_ptr() for name, tensor in tensors.items()})
            write(tensors, path)

        patched.setattr(checkpoint, "save_file", told)
        saver.save(state(1), weights(1), {})
        saver.save(state(2), weights(2), {})
        saver.save(state(3), {"w": torch.ones(5)}, {})
        saver.save(state(4), {"w": torch.ones(5, dtype=torch.bfloat16)}, {"v": torch.zeros(())})
    assert written[0] == written[2] and written[1] == written[3] == {}
    assert checkpoint.load(checkpoint.folder_of(tmp_path, 4), WEIGHTS, CPU)["w"].dtype == torch.bfloat16
    assert checkpoint.load(checkpoint.folder_of(tmp_path, 4), OPTIMIZER, CPU)["v"].shape == ()
    assert list(checkpoint.load(checkpoint.folder_of(tmp_path, 3), WEIGHTS, CPU)) == ["w"]


def test_tensors_come_one_at_a_time(tmp_path: Path) -> None:
    alive = []

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for name in "abc":
            tensor = nn.Parameter(torch.full((2, 4), float(ord(name))).t())  # not contiguous, with a gradient
            alive.append(name)
            yield name, tensor
            tensor.detach().fill_(0)

    with Saver(tmp_path, 2) as saver:
        folder = saver.save(state(1), gathered(), {})
        assert alive == ["a", "b", "c"]
    read = checkpoint.load(folder, WEIGHTS, CPU)
    assert {name: tensor.unique().tolist() for name, tensor in read.items()} == {
        "a": [97],
        "b": [98],
        "c": [99],
    }
    assert read["a"].shape == (4, 2)


def test_memory_that_cannot_be_pinned_is_not_needed(caplog: pytest.LogCaptureFixture) -> None:
    class OnCuda(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    if torch.cuda.is_available():
        pytest.skip("here it can be pinned")
    buffer = checkpoint._buffer(torch.ones(3, 2).t().as_subclass(OnCuda))
    assert buffer.shape == (2, 3) and buffer.is_contiguous() and not buffer.is_pinned()
    assert "no more memory can be pinned" in caplog.text


def test_a_state_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    saver = Saver(tmp_path, 2)
    broken = state(1).model_copy(update={"norms": (1.0, torch.inf)})
    with pytest.raises(ValueError, match="finite number"):
        saver.save(broken, weights(1), {})
    saver.wait()
    assert steps(tmp_path) == []


def test_one_is_too_few_to_keep(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Saver(tmp_path, 1)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_number_that_is_not_finite_is_never_saved(dtype: torch.dtype, bad: float, tmp_path: Path) -> None:
    saver = Saver(tmp_path, 2)
    good, spoilt = torch.ones(1000, dtype=dtype), torch.ones(1000, dtype=dtype)
    spoilt[[333, 334]] = torch.tensor([bad, -bad], dtype=dtype)
    saver.save(state(1), {"a": good, "b": good}, {"b:exp_avg": good})
    with pytest.raises(
        InputError, match=r"^step 2: b in model.safetensors holds numbers that are not finite"
    ):
        saver.save(state(2), {"a": good, "b": spoilt}, {"b:exp_avg": good})
    with pytest.raises(InputError, match=r"^step 2: b:exp_avg in optimizer.safetensors holds numbers"):
        saver.save(state(2), {"a": good, "b": good}, {"b:exp_avg": spoilt})
    saver.wait()
    assert names(tmp_path) == ["step-0000001"]
    saver.save(state(3), {"a": good, "b": good}, {"b:exp_avg": good})
    saver.wait()
    assert steps(tmp_path) == [1, 3]


def test_large_numbers_are_finite_though_their_sum_is_not() -> None:
    assert checkpoint.finite(torch.full((9,), 60_000.0, dtype=torch.float16))
    assert checkpoint.finite(torch.full((9,), 3e38))
    assert checkpoint.finite(torch.tensor(2**62)) and checkpoint.finite(torch.empty(0))


# --- what goes wrong in the thread is told


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_error_is_raised_by_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, 2)
    saver.save(state(1), weights(1), {})
    saver.wait()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        saver.save(state(2), weights(2), {})
        with pytest.raises(InputError, match=r"step-0000002.*: no space left on the disk; free some space"):
            saver.save(state(3), weights(3), {})
    saver.wait()  # told once
    assert names(tmp_path) == ["step-0000001"]
    saver.save(state(4), weights(4), {})
    saver.wait()
    assert steps(tmp_path) == [1, 4]


def test_an_error_is_raised_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="no space left"), Saver(tmp_path, 2) as saver:
        saver.save(state(1), weights(1), {})


def test_the_first_error_ends_the_run_and_the_other_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="the loss is nan"), Saver(tmp_path, 2) as saver:
        saver.save(state(1), weights(1), {})
        raise InputError("the loss is nan")
    assert "no space left" in caplog.text


def test_a_full_disk_in_safetensors_itself(tmp_path: Path) -> None:
    """A file size limit stops its Rust code, whose error has the system's number only in its text."""

    def limited() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        with pytest.raises(InputError, match=r"step-0000002: no space left on the disk") as told:
            checkpoint.save(tmp_path, state(2), {"w": torch.zeros(1 << 16)}, {}, keep=2)
        assert "\n" not in str(told.value)
        assert names(tmp_path) == ["step-0000001"]

    save(tmp_path, 1)
    assert in_a_child(limited) == 0


def test_a_bug_is_not_dressed_as_a_full_disk(tmp_path: Path) -> None:
    saver = Saver(tmp_path, 2)
    saver.save(state(1), {"w": torch.zeros(2, dtype=torch.complex128)}, {})  # safetensors has no such format
    with pytest.raises(Exception, match="complex128"):
        saver.wait()
    assert names(tmp_path) == []


PLACES: dict[str, tuple[Any, str]] = {
    "save_file": (checkpoint, "save_file"),
    "sha256": (checkpoint, "sha256_file"),
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "mkdir": (os, "mkdir"),
    "chmod": (os, "chmod"),
    "unlink": (os, "unlink"),
    "rmdir": (os, "rmdir"),
    "scandir": (os, "scandir"),
}


def failing_at(nth: int, code: int, patched: pytest.MonkeyPatch) -> Iterator[str]:
    """Make the nth call of all in PLACES fail; yields where, once it has."""
    calls, failed = 0, []

    def counted(place: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def maybe(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                failed.append(place)
                raise OSError(code, os.strerror(code))
            return real(*arguments, **options)

        return maybe

    for place, (module, name) in PLACES.items():
        patched.setattr(module, name, counted(place, getattr(module, name)))
    while True:
        yield failed[0] if failed else ""


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
@pytest.mark.parametrize("again", [False, True], ids=["new", "again"])
def test_whatever_call_fails_older_checkpoints_stay_and_the_next_save_works(
    again: bool, code: int, tmp_path: Path
) -> None:
    """Of a new step, where the oldest is removed after it; or of a step that is there, with other numbers."""
    places = set()
    for step in (1, 2, 3):
        save(tmp_path / "before", step, keep=3, bpb=1 / step)
    for nth in range(1, 200):
        run = shutil.copytree(tmp_path / "before", tmp_path / str(nth))
        saver = Saver(run, 2)
        with pytest.MonkeyPatch.context() as patched:
            failed = failing_at(nth, code, patched)
            next(failed)
            told = None
            try:
                saver.save(state(3 if again else 4, 0.1), weights(40), {})
                saver.wait()
            except (InputError, Unavailable) as error:
                told = str(error)
            where = next(failed)
        left = {step: value(folder) for step, folder in runs.checkpoints(run)}
        assert left.keys() >= {2, 3} or left.keys() == {3, 4}
        assert left[3] in ((3, 40) if again else (3,)) and left.get(4) in (None, 40)
        assert all(checkpoint.fault(folder) is None for _, folder in runs.checkpoints(run))
        assert told is None or ("\n" not in told and f"{run}" in told)
        with Saver(run, 2) as saver:
            saver.save(state(5, 0.1), weights(5), {})
        assert names(run) == [f"step-{step:07d}" for step in [*left, 5][-2:]]
        if not where:
            break
        assert told is not None, (where, nth)
        places.add(where)
    assert not where, "the loop has reached the end of the save"
    assert places >= {"save_file", "sha256", "fsync", "rename", "mkdir", "chmod", "unlink", "rmdir"}


# --- order of the commit


def test_files_are_durable_before_the_name_and_the_name_before_anything_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, ...]] = []
    fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree

    def of(path: Any) -> str:
        return str(Path(path).relative_to(tmp_path))

    def synced(handle: int) -> None:
        done.append(("fsync", of(Path(f"/proc/self/fd/{handle}").readlink())))
        fsync(handle)

    def renamed(old: Any, new: Any) -> None:
        done.append(("rename", of(old), of(new)))
        rename(old, new)

    def removed(path: Any, ignore_errors: bool = False) -> None:
        if Path(path).exists():
            done.append(("remove", of(path)))
            rmtree(path)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(shutil, "rmtree", removed)

    def commit(step: int) -> list[tuple[str, ...]]:
        aside = f"checkpoints/.step-{step:07d}.tmp"
        return [
            *(("fsync", f"{aside}/{name}") for name in ALL),
            ("fsync", aside),
            ("rename", aside, f"checkpoints/step-{step:07d}"),
            ("fsync", "checkpoints"),
        ]

    save(tmp_path, 1, keep=2)
    assert done == [("fsync", "."), *commit(1)]
    save(tmp_path, 2, keep=2)
    done.clear()
    save(tmp_path, 3, keep=2, bpb=0.5)
    gone = [("rename", "checkpoints/step-0000001", "checkpoints/.step-0000001.tmp")]
    assert done == [*commit(3), *gone, ("remove", "checkpoints/.step-0000001.tmp")]
    done.clear()
    save(tmp_path, 3, keep=2, bpb=0.25)
    made_way = commit(3)
    made_way.insert(4, ("rename", "checkpoints/step-0000003", "checkpoints/.step-0000003.old"))
    assert done == [*made_way, ("remove", "checkpoints/.step-0000003.old")]


# --- kill -9


def in_a_child(work: Callable[[], object]) -> int:
    """Run work in a fork of this process; return its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode() + b"\n")
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


STAGES = {
    *(
        "tensors copied",
        "half of model.safetensors",
        "all of model.safetensors",
        "half of optimizer.safetensors",
    ),
    *("all of optimizer.safetensors", "fsync", "os.rename", "open state.json", "os.mkdir", "os.chmod"),
}


def killed_at(nth: int, told: Path) -> None:
    """Arrange that this process is killed at its nth step of saving; writes into a file which one that is.

    Steps are: the copies are made, half and all of a file is written, an fsync, and whatever Python tells its
    auditors: each opening of a file, rename, mkdir, chmod, unlink, rmdir.
    """
    count = 0
    busy = False

    def step(what: str) -> None:
        nonlocal count, busy
        if busy:
            return
        count += 1
        if count == nth:
            busy = True
            told.write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)

    def audited(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(STATE):
            step(f"open {STATE}")
        elif event in ("os.rename", "os.mkdir", "os.chmod", "os.remove", "os.rmdir"):
            step(event)

    write, fsync, work = checkpoint.save_file, os.fsync, Saver._write

    def half(tensors: dict[str, torch.Tensor], path: Path) -> None:
        write(tensors, path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        step(f"half of {path.name}")
        path.write_bytes(whole)
        step(f"all of {path.name}")

    def synced(handle: int) -> None:
        step("fsync")
        fsync(handle)

    def begun(*arguments: Any) -> None:
        step("tensors copied")
        work(*arguments)

    checkpoint.save_file, os.fsync, Saver._write = half, synced, begun  # type: ignore[assignment]
    sys.addaudithook(audited)


@pytest.mark.parametrize("case", ["the first", "one more", "again", "again, the only one"])
def test_killed_at_any_moment_of_a_save(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = {"the first": [], "one more": [1, 2, 3], "again": [1, 2, 3], "again, the only one": [3]}[case]
    step = {"the first": 1, "one more": 4}.get(case, 3)
    stages, seen = set(), set()
    (tmp_path / "before").mkdir()
    for old in before:
        save(tmp_path / "before", old, keep=3, bpb=1 / old)
    for nth in range(1, 100):
        run, told = shutil.copytree(tmp_path / "before", tmp_path / str(nth)), tmp_path / f"{nth}.txt"

        def work(run: Path = run, told: Path = told, nth: int = nth) -> None:
            killed_at(nth, told)
            with Saver(run, 2) as saver:
                saver.save(state(step, 0.1), weights(40), {})

        ended = in_a_child(work)
        caplog.clear()
        newest = checkpoint.newest_sound(run)
        if newest is None:
            assert not before and ended
        else:
            was = float(before[-1]) if before else None
            assert value(newest) in (was, 40.0)
            assert checkpoint.folder_of(run, checkpoint.read_state(newest).step) == newest
            seen.add(value(newest))
        assert caplog.text == ""  # nothing looks like a checkpoint that is not whole

        with Saver(run, 2) as saver:  # the next start goes on as ever
            saver.save(state(5, 0.05), weights(5), {})
        kept = names(run)
        assert len(kept) == min(2, len(before) + 1) or not before
        assert (
            all(not name.startswith(".") or name.endswith(".old") for name in kept) and "step-0000005" in kept
        )
        assert all(checkpoint.fault(folder) is None for _, folder in runs.checkpoints(run))
        if ended == 0:
            break
        assert ended == -signal.SIGKILL, ended
        stages.add(told.read_text())
    assert ended == 0, "the loop has reached the end of the save"
    assert stages >= STAGES
    assert seen >= {40.0, *(float(old) for old in before[-1:])}
    if case == "one more":
        assert {"os.remove", "os.rmdir"} <= stages


def test_left_overs_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".step-0000009.tmp"
    left.mkdir(parents=True)
    (left / WEIGHTS).write_bytes(b"half")
    (left.parent / ".step-0000008.tmp").symlink_to(tmp_path)
    assert checkpoint.newest_sound(tmp_path) is None
    save(tmp_path, 1)
    assert names(tmp_path) == ["step-0000001"] and tmp_path.is_dir()


def test_what_made_way_counts_until_its_successor_is_there(tmp_path: Path) -> None:
    made_way = save(tmp_path, 3).rename(tmp_path / "checkpoints" / ".step-0000003.old")
    assert checkpoint.newest_sound(tmp_path) == checkpoint.folder_of(tmp_path, 3) == made_way
    assert steps(tmp_path) == [3]
    save(tmp_path, 4)
    assert names(tmp_path) == ["step-0000003", "step-0000004"]
    shutil.copytree(save(tmp_path, 3, bpb=0.5), made_way)
    assert checkpoint.newest_sound(tmp_path) == checkpoint.folder_of(tmp_path, 4)
    assert checkpoint.folder_of(tmp_path, 3).name == "step-0000003"
    save(tmp_path, 5)
    assert names(tmp_path) == ["step-0000003", "step-0000004", "step-0000005"]


def test_a_step_is_written_again_over_itself(tmp_path: Path) -> None:
    flip(save(tmp_path, 1) / WEIGHTS, -2)
    folder = save(tmp_path, 1)
    assert checkpoint.newest_sound(tmp_path) == folder


def test_the_same_checkpoint_again_leaves_the_one_that_is_there(tmp_path: Path) -> None:
    before = (save(tmp_path, 1) / WEIGHTS).stat().st_ino
    assert (save(tmp_path, 1) / WEIGHTS).stat().st_ino == before
    assert (save(tmp_path, 1, bpb=0.9) / WEIGHTS).stat().st_ino != before
    assert checkpoint.read_state(checkpoint.folder_of(tmp_path, 1)).scores.val_bpb == 0.9
    assert names(tmp_path) == ["step-0000001"]


# --- what is kept


@pytest.mark.parametrize(
    ("keep", "bpb_of_step", "kept"),
    [
        (2, {1: 1.5, 2: 1.4, 3: 1.3, 4: 1.2}, [3, 4]),
        (2, {1: 1.5, 2: 1.1, 3: 1.3, 4: 1.2, 5: 1.2}, [2, 4, 5]),
        (2, {1: 0.9, 2: 1.1, 3: 0.8, 4: 1.2, 5: 1.2}, [3, 4, 5]),
        (3, {1: 0.9, 2: 1.1, 3: 0.9, 4: 1.2, 5: 1.2, 6: 1.3}, [3, 4, 5, 6]),
        (2, {1: 0.5, 30: 0.7, 4: 0.6}, [1, 4, 30]),
        (2, {1: 1.0, 2: None, 3: None, 4: None}, [1, 3, 4]),
        (2, {1: None, 2: None, 3: None}, [2, 3]),
        (5, {1: 1.0, 2: 2.0}, [1, 2]),
    ],
)
def test_the_newest_and_the_best_are_kept(
    keep: int, bpb_of_step: dict[int, float | None], kept: list[int], tmp_path: Path
) -> None:
    """None: the newest held-out loss is that of an earlier step."""
    best = (
        min((bpb, -step) for step, bpb in bpb_of_step.items() if bpb) if any(bpb_of_step.values()) else None
    )
    for step, bpb in bpb_of_step.items():
        save(tmp_path, step, keep=keep, bpb=bpb or 0.1, scored_step=step if bpb else 0)
    assert steps(tmp_path) == kept
    assert checkpoint.best(tmp_path) == (None if best is None else checkpoint.folder_of(tmp_path, -best[1]))


def test_a_damaged_one_does_not_count_among_the_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=9, bpb=1.0 if step == 2 else 1.5)
    os.truncate(checkpoint.folder_of(tmp_path, 2) / WEIGHTS, 50)
    (checkpoint.folder_of(tmp_path, 3) / STATE).write_text("{}")
    (checkpoint.folder_of(tmp_path, 4) / OPTIMIZER).unlink()
    save(tmp_path, 5, keep=2, bpb=2.0)
    assert steps(tmp_path) == [1, 5]


def test_a_damaged_best_is_stepped_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step, bpb in {1: 1.2, 2: 1.0, 3: 1.1}.items():
        save(tmp_path, step, bpb=bpb)
    flip(checkpoint.folder_of(tmp_path, 2) / WEIGHTS, -2)
    assert checkpoint.best(tmp_path, [OPTIMIZER]) == checkpoint.folder_of(tmp_path, 2)
    assert checkpoint.best(tmp_path) == checkpoint.folder_of(tmp_path, 3)
    assert "step-0000002: model.safetensors is not as it was written" in caplog.text
    assert "taking the next best" in caplog.text
    for step in (1, 3):
        (checkpoint.folder_of(tmp_path, step) / STATE).write_text("")
    assert checkpoint.best(tmp_path) is None


def test_later_ones_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    checkpoint.folder_of(tmp_path, 3).rename(tmp_path / "checkpoints" / ".step-0000003.old")
    checkpoint.remove_after(tmp_path, 1)
    assert names(tmp_path) == ["step-0000001"]


# --- damage


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("name", ALL)
def test_a_checkpoint_cut_anywhere_is_stepped_over(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, file = save(tmp_path, 1), save(tmp_path, 2) / name
    whole = file.read_bytes()
    for size in {
        *range(0, len(whole), len(whole) // 40),
        *range(len(whole) - 9, len(whole) - (name == STATE)),
    }:
        file.write_bytes(whole[:size])  # without its last line break the state is as good
        caplog.clear()
        assert checkpoint.newest_sound(tmp_path) == before, size
        assert f"step-0000002: {name} is not as it was written" in caplog.text
        assert "stepping back" in caplog.text and "step-0000001" not in caplog.text
    shutil.rmtree(before)
    with pytest.raises(InputError, match=r"every checkpoint is damaged \(step-0000002: .* as it was written"):
        checkpoint.newest_sound(tmp_path)


@pytest.mark.parametrize("name", ALL)
def test_a_flipped_bit_anywhere_is_found(name: str, tmp_path: Path) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2, norms=(0.1, 1e-7), made_on="hér\u2028e")
    whole, right = (newest / name).read_bytes(), checkpoint.read_state(newest)
    logging.getLogger("models").setLevel(logging.ERROR)
    try:
        for position in range(0, len(whole), 1 + len(whole) // 300):
            flip(newest / name, position, position % 8)
            sound = checkpoint.newest_sound(tmp_path)
            # 1e-07 and 1E-07 are the same number.
            assert sound == before or (name == STATE and checkpoint.read_state(newest) == right), position
            (newest / name).write_bytes(whole)
    finally:
        logging.getLogger("models").setLevel(logging.NOTSET)
    assert checkpoint.newest_sound(tmp_path) == newest


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER])
def test_a_missing_file_is_told(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    (newest / name).unlink()
    assert checkpoint.newest_sound(tmp_path) == before
    assert f"step-0000002: {name} is missing; stepping back" in caplog.text


def test_only_the_files_that_are_asked_for_are_hashed(tmp_path: Path) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    flip(newest / OPTIMIZER, -2)
    assert checkpoint.newest_sound(tmp_path, [WEIGHTS]) == newest
    assert checkpoint.newest_sound(tmp_path) == before


def test_a_bad_sector_is_damage_and_a_lack_of_rights_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)

    def unreadable(path: Path, code: int = errno.EIO) -> str:
        if path == newest / WEIGHTS:
            raise OSError(code, os.strerror(code), str(path))
        return sha256_file(path)

    monkeypatch.setattr("models.sound.sha256_file", unreadable)
    assert checkpoint.newest_sound(tmp_path) == before
    monkeypatch.setattr("models.sound.sha256_file", lambda path: unreadable(path, errno.EACCES))
    with pytest.raises(PermissionError):
        checkpoint.newest_sound(tmp_path)


def test_a_folder_under_another_steps_name_is_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = save(tmp_path, 1)
    shutil.copytree(before, tmp_path / "checkpoints" / "step-0000002")
    assert checkpoint.newest_sound(tmp_path) == before
    assert "step-0000002: state.json is of step 1" in caplog.text


def test_a_checkpoint_that_a_trainer_removes_meanwhile_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only, later = save(tmp_path, 1), []

    def slow(path: Path) -> str:
        if not later:
            later.append(save(tmp_path, 2))
            shutil.rmtree(only)
        return sha256_file(path) if path.exists() else ""

    monkeypatch.setattr("models.sound.sha256_file", slow)
    assert checkpoint.newest_sound(tmp_path) == checkpoint.folder_of(tmp_path, 2)


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert checkpoint.newest_sound(tmp_path) is None
    assert checkpoint.best(tmp_path) is None
    assert runs.latest_checkpoint(tmp_path) is None


# --- a stranger's folder


def test_a_header_that_promises_more_than_there_is(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    for content in (
        len(header).to_bytes(8, "little") + header,
        (1 << 60).to_bytes(8, "little") + header,
        serialized({"w": torch.ones(2)}) + b"more",
        b"",
    ):
        (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(InputError, match=r"model.safetensors: ") as told:
            checkpoint.load(folder, WEIGHTS, CPU)
        assert "\n" not in str(told.value)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    for name in (OPTIMIZER, WEIGHTS, STATE):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert checkpoint.fault(folder) == f"{name} is missing"
    with pytest.raises(InputError, match=r"is missing"):
        checkpoint.load(folder, WEIGHTS, CPU)


def test_nothing_is_unpickled() -> None:
    for source in Path(checkpoint.__file__).parent.glob("*.py"):
        text = source.read_text("utf-8")
        assert "pickle" not in text.replace("unpickled", "") and "torch.load(" not in text, source
