"""Where the lines of metrics.jsonl go as well (`train.log_to`): TensorBoard, Weights & Biases, MLflow, Trackio.

metrics.jsonl is the truth, and these are views of it.  TensorBoard's files are written anew from it at each start
and roll-back.  The others cannot forget: they get each line once, by its *position*, the number of updates made so
far, those that a roll-back undid counted as well.  It only grows, so what a tool has last seen tells what it still
needs: after a crash the lines that it missed, after a roll-back the same steps again.

Logging is never worth the run: a tool that fails is named once in a warning, and training goes on.
"""

import importlib
import json
import logging
import math
import os
import queue
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from corpora.errors import InputError, Unavailable
from corpora.files import read_json, write_json
from corpora.settings import read_toml

log = logging.getLogger(__name__)

Line = dict[str, Any]

PROJECT = "pileline"  # the project or experiment, where the tool's own variable names no other
CLOSING = 10.0  # seconds for the last lines; a cancelled flow kills what has not left after 20
RETRY = 60.0  # seconds until a tool that failed is tried again; they double at each failure, up to an hour

NAMES = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "tokens": "train/tokens",
    "val_loss": "val/loss",
    "val_bpb": "val/bits_per_byte",
    "tokens_per_s": "speed/tokens_per_s",
    "mfu": "speed/mfu",
    "memory_bytes": "speed/memory_bytes",
}


class Loggers:
    """The tools of a run; one that is not installed is an InputError now, any other failure a warning later."""

    def __init__(self, names: Sequence[str], run: Path, settings: Mapping[str, Any]) -> None:
        for name in names:
            check_installed(name)
        self.active: dict[str, Logger] = {
            name: TensorBoard(run, settings) if name == "tensorboard" else Remote(name, run, settings)
            for name in dict.fromkeys(names)
        }

    def start(self, lines: Sequence[Line], *, fresh: bool) -> None:
        """Begin, or go on after a roll-back, from these lines; `fresh`: the run begins at step 0."""
        self._each("start", lines, fresh)

    def add(self, line: Line) -> None:
        """Tell one more line."""
        self._each("add", line)

    def close(self) -> None:
        """Let the last lines leave, for at most `CLOSING` seconds."""
        self._each("stop")  # all at once, then wait for each
        self._each("close", time.monotonic() + CLOSING)
        self.active.clear()

    def _each(self, method: str, *arguments: Any) -> None:
        for name, logger in list(self.active.items()):
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:
                del self.active[name]
                _warn(name, error)
                with suppress(Exception):
                    logger.stop()


class Logger(Protocol):
    """What each tool does; any exception ends it for this session."""

    def start(self, lines: Sequence[Line], fresh: bool) -> None: ...
    def add(self, line: Line) -> None: ...
    def stop(self) -> None: ...
    def close(self, until: float) -> None: ...


def check_installed(name: str) -> None:
    """Import the tool called `name`; raise InputError where that fails."""
    # A submodule: a folder ./wandb, as W&B itself leaves behind, would be imported as an empty package.
    modules = {"tensorboard": "summary.writer.record_writer", "wandb": "sdk", "mlflow": "tracking"}
    if name == "mlflow":
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # off, like Prefect's
        # `Remote` tries again, and waits longer.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    try:
        importlib.import_module(f"{name}.{modules.get(name, 'run')}")
    except Exception as error:  # a package at odds with another one raises anything
        raise InputError(
            f'train.log_to "{name}" needs a package that cannot be imported ({type(error).__name__}: {error}); '
            f"run: pip install 'pileline[{name}]'"
        ) from error


def read_lines(path: Path) -> list[Line]:
    """Return the whole lines of a metrics.jsonl; one that is torn, or none of ours, is left out."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            if isinstance(line["step"], int):
                lines.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return lines


def note(line: Line) -> str | None:
    """Return what a line that is a note says, or None for a line of figures."""
    if "rolled_back_from" in line:
        return f"rolled back from step {line['rolled_back_from']:,}: {line.get('reason')}"
    if "skipped" in line:
        return f"update skipped: {line['skipped']}"
    return None


def figures(line: Line) -> dict[str, float]:
    """Return the finite numbers of a line by the names under which the tools show them."""
    if note(line) is not None:
        return {}
    return {
        NAMES.get(key, f"train/{key}"): float(value)
        for key, value in line.items()
        if key not in ("step", "steps", "time") and isinstance(value, int | float) and math.isfinite(value)
    }


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield settings as pairs such as ("train.lr", "0.01")."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def replay(run: Path, to: str) -> Path:
    """Show a run that was not logged to this tool: tell it all lines of metrics.jsonl; return where they are.

    What a tool has already is not told twice.  Raises InputError where the folder has no metrics or the tool is not
    installed, and Unavailable where the tool does not take the lines.
    """
    lines = read_lines(run / "metrics.jsonl")
    if not lines:
        raise InputError(f"{run / 'metrics.jsonl'} has no lines to show; is {run} a run that was trained?")
    if to not in ("tensorboard", *CLIENTS):
        raise InputError(f"{to!r} is none of tensorboard, {', '.join(CLIENTS)}")
    check_installed(to)
    recipe = run / "recipe.toml"
    settings = read_toml(recipe) if recipe.exists() else {}
    if to == "tensorboard":
        board = TensorBoard(run, settings)
        board.start(lines)
        board.stop()
        return board.folder
    remote = Remote(to, run, settings)
    remote.start(lines)
    remote.stop()
    remote.close(math.inf)
    if remote.unsent:
        raise Unavailable(f"{to} did not take {len(remote.unsent):,} of {len(lines):,} lines of {run}")
    return run


class TensorBoard:
    """Event files in RUN/tensorboard: what is there is always what metrics.jsonl has.

    A file that goes on after a crash would show points that were cut in every reader that does not know of
    `purge_step`; a new file from the first line on is right in all of them, and takes 0.1 ms a line.
    """

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.metrics, self.settings = run / "tensorboard", run / "metrics.jsonl", settings
        self.file: BinaryIO | None = None

    def start(self, lines: Sequence[Line], fresh: bool = False) -> None:
        """Write a new file with these lines, and empty the one before it."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.stop()
        self.folder.mkdir(exist_ok=True)
        before = sorted(self.folder.glob("events.out.tfevents.*.pileline"))
        newest = int(before[-1].name.split(".")[3]) if before else 0
        # Readers take a folder's files in the order of their names, and a part of it is the time in seconds.
        number = max(int(time.time()), newest + 1)
        self.path = self.folder / f"events.out.tfevents.{number:010d}.pileline"
        self.file = self.path.open("wb")
        self.records = RecordWriter(self.file)
        self.unknown_time = self.metrics.stat().st_mtime if self.metrics.exists() else time.time()
        begun = lines[0].get("time", self.unknown_time) if lines else time.time()
        self._write(Event(wall_time=begun, file_version="brain.Event:2"))
        # A TensorBoard that is running has read the files before: this makes it forget them.
        self._write(Event(wall_time=begun, step=0, session_log=SessionLog(status=SessionLog.START)))
        # Four blanks: Markdown leaves it as it stands.
        rows = [f"    {key} = {value}".replace("\n", "\\n") for key, value in flat(self.settings)]
        if rows:
            self._text("settings", "\n".join(rows), 0, begun)
        for line in lines:
            self._line(line)
        self.records.flush()
        # The one before stays, empty: without its data server, TensorBoard goes on to the next file only from a
        # file that is there.
        for path in before[:-1]:
            path.unlink(missing_ok=True)
        for path in before[-1:]:
            os.truncate(path, 0)

    def add(self, line: Line) -> None:
        """Write one line."""
        if (
            not self.path.exists() or not self.path.stat().st_size
        ):  # removed, or emptied by `replay` beside us
            return self.start(read_lines(self.metrics))
        self._line(line)
        self.records.flush()

    def stop(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()

    def close(self, until: float) -> None:
        """Everything is in the file already."""

    def _line(self, line: Line) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        when = line.get("time", self.unknown_time)
        text = note(line)
        if text is not None:
            return self._text("notes", text, line["step"], when)
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in figures(line).items()]
        self._write(Event(wall_time=when, step=line["step"], summary=Summary(value=values)))

    def _text(self, tag: str, text: str, step: int, when: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto

        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()])
        value = Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
        self._write(Event(wall_time=when, step=step, summary=Summary(value=[value])))

    def _write(self, event: Any) -> None:
        self.records.write(event.SerializeToString())


class Client(Protocol):
    """A run in a tool: `id` is kept in the run folder, `position` is of the last line that the tool had before."""

    id: str
    position: int

    def log(self, position: int, line: Line) -> None: ...
    def finish(self) -> None: ...


_one_writer = threading.Lock()  # of the ids of all tools


class Remote:
    """A tool that may be slow or away: a thread tells it, in order, and keeps what it does not take for later."""

    def __init__(self, name: str, run: Path, settings: Mapping[str, Any]) -> None:
        self.name, self.run, self.settings = name, run, settings
        self.client: Client | None = None
        self.queue: queue.SimpleQueue[tuple[int, Line] | None] = queue.SimpleQueue()
        self.unsent: deque[tuple[int, Line]] = deque()
        self.warned = False
        self.thread: threading.Thread | None = None
        self.undone = 0  # updates

    def start(self, lines: Sequence[Line], fresh: bool = False) -> None:
        """Find the run in the tool, or make it, and tell it the lines that it has not; it is `fresh` at step 0."""
        if self.thread is not None:
            return  # after a roll-back: these lines were told as they came
        self.fresh = fresh
        try:
            self._open()  # here and not in the thread, since a tool may ask for a login
        except Exception as error:
            self._warn(error)
        self.thread = threading.Thread(target=self._tell, name=f"log to {self.name}", daemon=True)
        self.thread.start()
        for line in lines:
            self.add(line)

    def add(self, line: Line) -> None:
        """Hand a line to the thread."""
        if "rolled_back_from" in line:
            self.undone += line["rolled_back_from"] - line["step"]
        if figures(line):
            self.queue.put((line["step"] + self.undone, line))

    def stop(self) -> None:
        """Let the thread end after the last line."""
        self.queue.put(None)

    def close(self, until: float) -> None:
        """Wait for the thread."""
        if self.thread is not None:
            self.thread.join(None if until == math.inf else max(0.0, until - time.monotonic()))
            if self.thread.is_alive():
                self._warn(TimeoutError("it did not take the last lines in time"))

    def _open(self) -> None:
        known = None if self.fresh else self._ids().get(self.name)
        self.client = CLIENTS[self.name](self.run, self.settings, known)
        with _one_writer:
            write_json(self.run / "loggers.json", {**self._ids(), self.name: self.client.id})

    def _ids(self) -> dict[str, str]:
        kept = self.run / "loggers.json"
        return read_json(kept) if kept.exists() else {}

    def _tell(self) -> None:
        again, wait = 0.0, RETRY
        more = True
        while more:
            item = self.queue.get()
            more = item is not None
            if item is not None:
                self.unsent.append(item)
            if more and time.monotonic() < again:
                continue
            try:
                self._send()
                wait = RETRY
            except Exception as error:
                self._warn(error)
                again, wait = time.monotonic() + wait, min(2 * wait, 3600.0)
        try:
            if self.client is not None:
                self.client.finish()
        except Exception as error:
            self._warn(error)

    def _send(self) -> None:
        if self.client is None:
            self._open()
        assert self.client is not None
        while self.unsent:
            position, line = self.unsent[0]
            if position > self.client.position:
                self.client.log(position, line)
            self.unsent.popleft()

    def _warn(self, error: Exception) -> None:
        if not self.warned:
            _warn(self.name, error)
        self.warned = True


class WandB:
    """A run of Weights & Biases; its files, and all of it with WANDB_MODE=offline, are in RUN/wandb."""

    def __init__(self, run: Path, settings: Mapping[str, Any], known: str | None) -> None:
        import wandb

        # Not the folder's name alone: a run that was removed and made again is another one, and a colleague
        # may train the same recipe.
        self.id = known or f"{re.sub(r'[^A-Za-z0-9_.-]', '-', title(run))}-{secrets.token_hex(4)}"
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=self.id,
            name=title(run),
            resume="allow",
            dir=os.environ.get("WANDB_DIR", run),
            config=dict(settings),
            allow_val_change=True,
            settings=wandb.Settings(console="off", reinit="create_new", finish_timeout=CLOSING - 2),
        )
        self.run.define_metric("train/step")
        self.run.define_metric("*", step_metric="train/step")
        self.position = self.run.step - 1

    def log(self, position: int, line: Line) -> None:
        """Log a line; W&B takes positions in rising order only, and shows it over its step."""
        self.run.log({"train/step": line["step"], **figures(line)}, step=position, commit=True)

    def finish(self) -> None:
        """Upload what is left."""
        self.run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI; a tag of it holds the position."""

    TAG = "pileline.position"

    def __init__(self, run: Path, settings: Mapping[str, Any], known: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        self.mlflow, self.position = MlflowClient(), -1
        if known is not None:
            try:
                self.position = int(self.mlflow.get_run(known).data.tags.get(self.TAG, "-1"))
                self.mlflow.update_run(known, status="RUNNING")
                self.id = known
                return
            except MlflowException as error:  # another server than the last time: the whole run goes there
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if experiment is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self.mlflow.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self.mlflow.create_experiment(name)
        self.id = self.mlflow.create_run(experiment, run_name=title(run)).info.run_id
        params = [Param(key, value[:6000]) for key, value in flat(settings)]  # the longest that it takes
        for start in range(0, len(params), 100):  # the most that it takes at once
            self.mlflow.log_batch(self.id, params=params[start : start + 100])

    def log(self, position: int, line: Line) -> None:
        """Log a line and its position, in one request."""
        from mlflow.entities import Metric, RunTag

        when = int(1000 * line.get("time", time.time()))
        metrics = [Metric(key, value, when, line["step"]) for key, value in figures(line).items()]
        self.mlflow.log_batch(self.id, metrics=metrics, tags=[RunTag(self.TAG, str(position))])

    def finish(self) -> None:
        """Say that nothing more comes."""
        self.mlflow.set_terminated(self.id)


class Trackio:
    """A run of Trackio, in TRACKIO_DIR or at TRACKIO_SPACE_ID or TRACKIO_SERVER_URL."""

    def __init__(self, run: Path, settings: Mapping[str, Any], known: str | None) -> None:
        import trackio

        self.id = title(run)  # by which it finds the newest run of that name
        self.run = trackio.init(
            PROJECT,
            name=title(run),
            resume="never" if known is None else "allow",
            config=dict(settings),
            embed=False,
        )
        self.position = self.run._next_step - 1  # the only way to ask, local or not

    def log(self, position: int, line: Line) -> None:
        """Log a line at its position, and its step as a number."""
        self.run.log({"train/step": line["step"], **figures(line)}, step=position)

    def finish(self) -> None:
        """Send what is left."""
        self.run.finish()


CLIENTS: dict[str, Callable[[Path, Mapping[str, Any], str | None], Client]] = {
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def title(run: Path) -> str:
    """Return a run's name in the tools: that of its folder."""
    return run.resolve().name


def _warn(name: str, error: Exception) -> None:
    log.warning(
        "logging to %s failed (%s: %s); training does not wait for it, and metrics.jsonl has every line",
        name,
        type(error).__name__,
        " ".join(str(error).split())[:500],
    )
