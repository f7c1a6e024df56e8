"""Each tool has what metrics.jsonl has, by its own files: after a crash, a roll-back, and while it is away."""

import json
import logging
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora.errors import InputError, Unavailable
from models import loggers
from models.loggers import Line, Loggers, figures, replay
from models.metrics import Metrics

SETTINGS = {
    "train": {"lr": 0.01, "log_to": ["wandb"]},
    "generate": {"prompts": ["a|b\n", ""], "note": "two\nlines"},
}


def make(run: Path, *names: str) -> Metrics:
    run.mkdir(exist_ok=True)
    return Metrics(run, write=True, events=False, steps=100, log_to=names, settings=SETTINGS)


def step(number: int, loss: float | None = None) -> Line:
    line = {"step": number, "steps": 100, "tokens": 1024 * number, "loss": loss or number / 2, "lr": 0.5}
    return {**line, "mfu": None, "memory_bytes": 2**30} | ({"val_bpb": 2.0} if number % 4 == 0 else {})


def back(to: int, start: int) -> Line:
    return {"step": to, "rolled_back_from": start, "reason": "4 bad steps"}


def train_with_a_crash_and_a_roll_back(run: Path, *names: str) -> None:
    """Steps 0 to 6 and a crash; on from step 4 to 8, back to step 6, and on to step 9."""
    crashed = make(run, *names)
    crashed.cut_after(-1)
    for number in range(7):
        crashed.add(step(number))
    crashed.close()
    resumed = make(run, *names)
    resumed.cut_after(4)
    for number in range(5, 9):
        resumed.add(step(number))
    resumed.cut_after(6)
    resumed.add(back(6, 8))
    for number in range(7, 10):
        resumed.add(step(number, loss=number + 0.25))
    resumed.close()


def test_the_numbers_of_a_line_by_their_names() -> None:
    line = {"step": 4, "steps": 9, "time": 1.5, "tokens": 9, "loss": 3.5, "lr": 0.1, "grad_norm": 1.0}
    line |= {"tokens_per_s": 10.5, "mfu": None, "memory_bytes": 5, "val_loss": float("nan"), "val_bpb": 2}
    assert figures({**line, "not_finite": {"mfu": "nan"}, "new": 7}) == {
        "train/tokens": 9.0,
        "train/loss": 3.5,
        "train/lr": 0.1,
        "train/grad_norm": 1.0,
        "train/new": 7.0,
        "speed/tokens_per_s": 10.5,
        "speed/memory_bytes": 5.0,
        "val/bits_per_byte": 2.0,
    }
    assert figures(back(6, 8)) == {}


# TensorBoard


def points(folder: Path, tag: str, **options: Any) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}, **options)
    read.Reload()
    if tag in read.Tags()["tensors"]:
        return [(one.step, one.tensor_proto.string_val[0].decode()) for one in read.Tensors(tag)]
    return [(one.step, one.value) for one in read.Scalars(tag)]


@pytest.mark.parametrize("purge", [True, False])  # whether the reader obeys the order to forget
def test_tensorboard_has_what_the_metrics_have(tmp_path: Path, purge: bool) -> None:
    run = tmp_path / "demo"
    train_with_a_crash_and_a_roll_back(run, "tensorboard")

    def read(tag: str) -> list[tuple[int, float]]:
        return points(run / "tensorboard", tag, purge_orphaned_data=purge)

    losses = [(n, n / 2) for n in range(7)] + [(n, n + 0.25) for n in range(7, 10)]
    assert read("train/loss") == losses
    assert read("val/bits_per_byte") == [(0, 2.0), (4, 2.0), (8, 2.0)]
    assert read("speed/memory_bytes") == [(n, 2.0**30) for n in range(10)]
    assert read("notes") == [(6, "rolled back from step 8: 4 bad steps")]
    ((_, told),) = read("settings")
    assert told.splitlines() == [
        "    train.lr = 0.01",
        '    train.log_to = ["wandb"]',
        '    generate.prompts = ["a|b\\n", ""]',
        "    generate.note = two\\nlines",
    ]


def test_a_tensorboard_that_is_running_forgets_what_was_cut(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    for cut, loss in [(-1, 4.0), (-1, 2.0), (2, 1.0)]:
        made = make(tmp_path, "tensorboard")
        made.cut_after(cut)
        for number in range(cut + 1, 6 if cut < 0 else 4):
            made.add(step(number, loss))
        shown.Reload()
        made.close()
    shown.Reload()
    assert [(one.step, one.value) for one in shown.Scalars("train/loss")] == [(0, 2), (1, 2), (2, 2), (3, 1)]


def test_tensorboard_keeps_one_file_and_an_empty_one(tmp_path: Path) -> None:
    train_with_a_crash_and_a_roll_back(tmp_path, "tensorboard")
    sizes = [path.stat().st_size for path in sorted((tmp_path / "tensorboard").iterdir())]
    assert len(sizes) == 2 and sizes[0] == 0 and sizes[1] > 0


def test_tensorboard_shows_the_time_of_each_line(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 2.0, "time": 1700000000.5}, {"step": 2, "loss": 1.0, "time": 1700000009.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(replay(tmp_path, "tensorboard")))
    read.Reload()
    assert [event.wall_time for event in read.Scalars("train/loss")] == [1700000000.5, 1700000009.0]
    assert read.FirstEventTimestamp() == 1700000000.5


def test_tensorboard_after_a_kill_in_the_middle_of_a_record(tmp_path: Path) -> None:
    first = make(tmp_path, "tensorboard")
    first.cut_after(-1)
    for number in range(3):
        first.add(step(number))
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    second = make(tmp_path, "tensorboard")
    second.cut_after(1)
    second.add(step(2))
    second.close()
    assert points(tmp_path / "tensorboard", "train/loss") == [(0, 0.0), (1, 0.5), (2, 1.0)]
    first.close()


def test_an_older_run_is_replayed_and_a_running_one_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    plain = make(run)
    plain.cut_after(-1)
    plain.add(step(1))
    plain.add({"step": 2, "skipped": "bad"})
    plain.close()
    (run / "recipe.toml").write_text("[train]\nlr = 0.25\n")
    foreign = run / "tensorboard" / "events.out.tfevents.9.other"
    foreign.parent.mkdir()
    foreign.write_bytes(b"")
    folder = replay(run, "tensorboard")
    assert folder == run / "tensorboard" and foreign.exists()
    assert points(folder, "train/loss") == [(1, 0.5)]
    assert points(folder, "notes") == [(2, "update skipped: bad")]
    assert points(folder, "settings")[0][1] == "    train.lr = 0.25"

    logged = make(run, "tensorboard")
    logged.cut_after(2)
    replay(run, "tensorboard")
    logged.add(step(3))
    logged.add(step(4))
    logged.close()
    assert points(folder, "train/loss") == [(1, 0.5), (3, 1.5), (4, 2.0)]


@pytest.mark.parametrize(
    ("lines", "to", "fault"),
    [
        ("", "tensorboard", "has no lines to show"),
        ('{"step": 1}\n', "excel", "'excel' is none of tensorboard, wandb, mlflow, trackio"),
    ],
)
def test_what_cannot_be_replayed(tmp_path: Path, lines: str, to: str, fault: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(InputError, match=fault):
        replay(tmp_path, to)


def test_a_full_disk_ends_tensorboard_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = make(tmp_path, "tensorboard")
    made.cut_after(-1)
    made.add(step(1))
    board = made.loggers.active["tensorboard"]
    assert isinstance(board, loggers.TensorBoard) and board.file is not None
    board.file.close()
    board.file = board.path.open("rb")  # type: ignore[assignment]
    board.records._writer = board.file  # not writable: any write fails
    for number in (2, 3):
        made.add(step(number))
    made.close()
    assert [line["step"] for line in loggers.read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    (told,) = caplog.messages
    assert told.startswith("logging to tensorboard failed (UnsupportedOperation: ")


# What is not installed


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_missing_package_is_told_before_anything_starts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()  # such as the folder that W&B writes; to Python an empty package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [one for one in sys.meta_path if "PathFinder" in repr(one)])
    others = {key: module for key, module in sys.modules.items() if key.split(".")[0] != name}
    with mock.patch.dict(sys.modules, others, clear=True):
        with pytest.raises(InputError, match=rf'"{name}" needs .*: pip install \'pileline\[{name}\]\''):
            make(tmp_path / "run", name)
        Metrics(tmp_path, write=False, events=False, steps=1, log_to=(name,))  # another process
    assert list((tmp_path / "run").iterdir()) == []


# A tool that takes its lines from a thread


class Tool:
    """A tool that keeps runs by id, in memory, and can be slow or away."""

    def __init__(self) -> None:
        self.runs: dict[str, list[tuple[int, Line]]] = {}
        self.away = False
        self.hangs = threading.Event()
        self.hangs.set()

    def __call__(self, run: Path, settings: Mapping[str, Any], known: str | None) -> "Tool.Run":
        return Tool.Run(self, known or f"run{len(self.runs)}")

    class Run:
        def __init__(self, tool: "Tool", id: str) -> None:
            tool.answer()
            self.tool, self.id = tool, id
            told = tool.runs.setdefault(id, [])
            self.position = told[-1][0] if told else -1

        def log(self, position: int, line: Line) -> None:
            self.tool.answer()
            self.tool.runs[self.id].append((position, line))

        def finish(self) -> None:
            self.tool.answer()

    def answer(self) -> None:
        self.hangs.wait()
        if self.away:
            raise ConnectionError("no route\nto host")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Tool:
    made = Tool()
    monkeypatch.setitem(loggers.CLIENTS, "wandb", made)
    monkeypatch.setattr(loggers, "check_installed", lambda name: None)
    return made


def told(tool: Tool, run: str = "run0") -> list[tuple[int, int, float]]:
    return [(position, line["step"], line["loss"]) for position, line in tool.runs[run]]


AFTER_ALL = [(n, n, n / 2) for n in range(9)] + [(n + 2, n, n + 0.25) for n in range(7, 10)]


def test_a_tool_gets_each_line_once_and_the_steps_after_a_roll_back_again(tmp_path: Path, tool: Tool) -> None:
    train_with_a_crash_and_a_roll_back(tmp_path, "wandb")
    assert told(tool) == AFTER_ALL
    assert replay(tmp_path, "wandb") == tmp_path
    assert told(tool) == AFTER_ALL


def test_a_tool_that_is_named_later_gets_the_lines_before(tmp_path: Path, tool: Tool) -> None:
    train_with_a_crash_and_a_roll_back(tmp_path)
    later = make(tmp_path, "wandb")
    later.cut_after(8, 1)
    later.add(step(9))
    later.close()
    assert [(position, n) for position, n, _ in told(tool)] == [(n, n) for n in range(7)] + [
        (9, 7),
        (10, 8),
        (11, 9),
    ]


def test_a_run_that_begins_anew_is_another_one_in_the_tool(tmp_path: Path, tool: Tool) -> None:
    for loss in (1.5, 2.5):
        made = make(tmp_path, "wandb")
        made.cut_after(-1)
        made.add(step(1, loss))
        made.close()
    assert told(tool, "run0") == [(1, 1, 1.5)] and told(tool, "run1") == [(1, 1, 2.5)]
    assert json.loads((tmp_path / "loggers.json").read_text()) == {"wandb": "run1"}


def test_a_tool_that_is_away_is_named_once_and_gets_its_lines_later(
    tmp_path: Path, tool: Tool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "RETRY", 0.0)
    tool.away = True
    made = make(tmp_path, "wandb")
    made.cut_after(-1)
    made.add(step(1))
    remote = made.loggers.active["wandb"]
    assert isinstance(remote, loggers.Remote)
    wait_until(lambda: len(remote.unsent) == 1)
    tool.away = False
    made.add(step(2))
    wait_until(lambda: not remote.unsent)
    tool.away = True
    made.add(step(3))
    wait_until(lambda: len(remote.unsent) == 1)
    tool.away = False
    made.add(step(4))
    made.close()
    assert told(tool) == [(n, n, n / 2) for n in (1, 2, 3, 4)]
    assert caplog.messages == [
        "logging to wandb failed (ConnectionError: no route to host); training does not wait for it, and "
        "metrics.jsonl has every line"
    ]


def test_a_tool_that_failed_is_left_alone_for_a_while(tmp_path: Path, tool: Tool) -> None:
    made = make(tmp_path, "wandb")
    made.cut_after(-1)
    asked = []
    tool.away = True
    with mock.patch.object(tool, "answer", side_effect=lambda: asked.append(1) or 1 / 0):
        for number in range(20):
            made.add(step(number))
        made.close()
    assert len(asked) == 3  # the first line, the last one, and to finish


def test_a_tool_that_never_came_is_told_at_the_next_start(tmp_path: Path, tool: Tool) -> None:
    tool.away = True
    made = make(tmp_path, "wandb")
    made.cut_after(-1)
    made.add(step(1))
    made.close()
    assert not (tmp_path / "loggers.json").exists()
    with pytest.raises(Unavailable, match="wandb did not take 1 of 1 lines"):
        replay(tmp_path, "wandb")
    tool.away = False
    again = make(tmp_path, "wandb")
    again.cut_after(1)
    again.close()
    assert told(tool) == [(1, 1, 0.5)]


def test_a_tool_that_hangs_holds_up_neither_a_step_nor_the_end(
    tmp_path: Path, tool: Tool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "CLOSING", 0.05)
    made = make(tmp_path, "wandb")
    made.cut_after(-1)
    tool.hangs.clear()
    started = time.monotonic()
    for number in range(1, 100):
        made.add(step(number))
    made.close()
    assert time.monotonic() - started < 5.0
    assert len(caplog.messages) == 1 and "did not take the last lines in time" in caplog.messages[0]
    tool.hangs.set()
    assert not [one for one in threading.enumerate() if one.name == "log to wandb" and not joined(one)]


def joined(thread: threading.Thread) -> bool:
    thread.join(10.0)
    return not thread.is_alive()


def wait_until(true: Any) -> None:
    deadline = time.monotonic() + 10.0
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@settings(max_examples=30, deadline=None)
@given(spikes=st.sets(st.integers(3, 40), max_size=4), lives=st.lists(st.integers(1, 25), max_size=4))
def test_crashes_and_roll_backs_in_any_order(
    spikes: set[int], lives: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Train to step 15 with a checkpoint each 3 steps; updates named in `spikes` fail, `lives` end in a crash."""
    tool = Tool()
    run = tmp_path_factory.mktemp("run")
    with (
        mock.patch.dict(loggers.CLIENTS, wandb=tool),
        mock.patch.object(loggers, "check_installed"),
        mock.patch.object(os, "fsync"),  # no power cut here, and it takes most of the time
    ):
        saved: tuple[int, int, int] | None = None  # step, updates, roll-backs
        for life in [*lives, 10_000]:
            made = make(run, "wandb")
            now, updates, roll_backs = saved or (0, 0, 0)
            made.cut_after(now if saved else -1, roll_backs)
            if saved is None:
                made.add(step(0, 0.5))
            for _ in range(life):
                if now == 15:
                    break
                now, updates = now + 1, updates + 1
                if updates in spikes and saved is not None:
                    made.cut_after(saved[0], roll_backs)
                    roll_backs += 1
                    made.add(back(saved[0], now))
                    now = saved[0]
                    continue
                made.add(step(now, updates + 0.5))
                if now % 3 == 0:
                    saved = (now, updates, roll_backs)
            made.close()
    lines = tool.runs[json.loads((run / "loggers.json").read_text())["wandb"]]
    positions = [position for position, _ in lines]
    assert positions == sorted(set(positions))  # none twice
    assert all(line["loss"] == position + 0.5 for position, line in lines)  # each in its place
    kept = [line for line in loggers.read_lines(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in kept] == list(range(16))
    assert all(line["loss"] in {told["loss"] for _, told in lines} for line in kept)  # none is missing


# The real tools


def records(path: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file: a LevelDB log of protocol buffers behind 7 bytes of W&B's own."""
    from wandb.proto import wandb_internal_pb2

    content, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # full, or the last piece
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    run = tmp_path / "demo-1234"
    import wandb

    try:
        train_with_a_crash_and_a_roll_back(run, "wandb")
    finally:
        wandb.teardown()  # ends its process
    sessions = sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert len(sessions) == 2
    read = [list(records(path)) for path in sessions]
    (begun,) = [one.run for one in read[1] if one.HasField("run")]
    assert begun.display_name == "demo-1234" and begun.project == "pileline" and begun.resumed is False
    assert begun.run_id == json.loads((run / "loggers.json").read_text())["wandb"]
    assert {one.run.run_id for one in read[0] if one.HasField("run")} == {begun.run_id}
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert config["train"] == {"lr": 0.01, "log_to": ["wandb"]}
    # Offline it does not know what it had before, so the second session has all of it.
    history = [{x.nested_key[0]: json.loads(x.value_json) for x in one.history.item} for one in read[1]]
    losses = [(one["_step"], one["train/step"], one["train/loss"]) for one in history if one]
    assert losses == AFTER_ALL


def test_wandb_goes_on_after_what_its_server_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No server of W&B can be had here; this is what its documents say of `step` and `resume`."""
    stub = mock.MagicMock()
    stub.init.return_value.step = 8  # the next: it has 0 to 7
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    known = loggers.WandB(tmp_path / "a b", SETTINGS, "id-1")
    asked = stub.init.call_args.kwargs
    assert (known.id, known.position) == ("id-1", 7)
    assert (asked["id"], asked["resume"], asked["project"], asked["name"]) == ("id-1", "allow", "ours", "a b")
    known.log(12, {"step": 10, "loss": 0.5})
    told = mock.call({"train/step": 10, "train/loss": 0.5}, step=12, commit=True)
    assert stub.init.return_value.log.call_args == told
    others = {loggers.WandB(tmp_path / "a b", SETTINGS, None).id for _ in range(3)}
    assert len(others) == 3 and all(one.startswith("a-b-") for one in others)


def test_mlflow_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its database takes seconds to make
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "my experiment")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "demo-1234"
    train_with_a_crash_and_a_roll_back(run, "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("my experiment")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "demo-1234" and found.info.status == "FINISHED"
    assert found.data.params["train.lr"] == "0.01" and found.data.tags["pileline.position"] == "11"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted((one.step, one.value) for one in history) == sorted((n, loss) for _, n, loss in AFTER_ALL)

    again = loggers.MLflow(run, SETTINGS, json.loads((run / "loggers.json").read_text())["mlflow"])
    assert (again.id, again.position) == (found.info.run_id, 11)
    assert client.get_run(again.id).info.status == "RUNNING"
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    elsewhere = loggers.MLflow(run, SETTINGS, "0" * 32)  # not in this store
    assert elsewhere.id not in ("0" * 32, again.id) and elsewhere.position == -1
    assert client.get_experiment_by_name("pileline").experiment_id != experiment.experiment_id


def test_trackio_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio", reason="it brings uvloop, and so is not among the tests' packages")
    from trackio.sqlite_storage import SQLiteStorage

    run = tmp_path / "demo-1234"
    train_with_a_crash_and_a_roll_back(run, "trackio")
    (found,) = SQLiteStorage.get_run_records("pileline")
    logs = SQLiteStorage.get_logs("pileline", "demo-1234", run_id=found["id"])
    assert [(one["step"], one["train/step"], one["train/loss"]) for one in logs] == AFTER_ALL
    assert SQLiteStorage.get_run_config("pileline", "demo-1234")["train"]["lr"] == 0.01


def test_the_tools_of_the_settings_are_those_that_there_are() -> None:
    from models.settings import Train

    named = Train(steps=1, batch=1, lr=1.0, log_to=("tensorboard", "wandb", "mlflow", "trackio")).log_to
    assert set(named) == {"tensorboard", *loggers.CLIENTS}
    with mock.patch.object(loggers, "check_installed"):
        assert list(Loggers(named, Path("nowhere"), {}).active) == list(named)


def test_logging_is_quiet_by_default(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.DEBUG):
        train_with_a_crash_and_a_roll_back(tmp_path / "demo", "tensorboard")
    assert caplog.messages == []
