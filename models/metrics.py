"""RUN/metrics.jsonl: one line for each logged step; the same as an event or for a person, and to other tools."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from time import monotonic, time
from typing import Any

from tqdm import tqdm

from corpora.files import write_aside
from corpora.progress import emit, say
from models.loggers import Line, Loggers, note, read_lines, title

REFRESH = 0.25  # seconds between two pictures of the bar


class Metrics:
    """The lines of a run.  `write` is false in all processes but the first, `events` chooses JSON on stdout.

    Without events, and with a terminal on stderr, a bar stands below the lines.  `log_to` names the tools that get
    the lines as well; one that is not installed is an InputError.
    """

    def __init__(
        self,
        run: Path,
        *,
        write: bool,
        events: bool,
        steps: int,
        log_to: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.write, self.events, self.steps = run / "metrics.jsonl", write, events, steps
        self.pace = Pace(steps)
        self.loggers = Loggers(log_to if write else (), run, settings or {})
        self.bar: tqdm[Any] | None = None
        self.with_bar = write and not events and sys.stderr.isatty()
        self.shown: dict[str, float] = {}  # what the bar tells
        self.refreshed = 0.0

    def cut_after(self, step: int, roll_backs: int = 0, data_steps: int = 0) -> None:
        """Begin, go on or go back: keep the lines up to `step`, and of roll-backs the first so many.

        Of steps that were passed over those of the first `data_steps` data steps are kept.

        Later lines will be written again; one that is torn goes too.  A step below 0 begins a run anew.
        """
        if not self.write:
            return
        kept = []
        for line in read_lines(self.path):
            if "rolled_back_from" in line:
                roll_backs -= 1
                if roll_backs < 0:
                    continue
            if line["data_step"] < data_steps if "data_step" in line else line["step"] <= step:
                kept.append(line)
        with write_aside(self.path) as aside:
            aside.write_text("".join(f"{json.dumps(_finite(line))}\n" for line in kept), "utf-8")
        self.pace.pause()
        self.loggers.start(kept, fresh=step < 0)

    def at(self, step: int, loss: float | None = None) -> None:
        """Tell the bar that this step is done; called after each, so it costs a microsecond."""
        now = monotonic()
        self.pace.at(step, now)
        if loss is not None:
            self.shown["loss"] = loss
        if not self.with_bar or not (now - self.refreshed >= REFRESH or step >= self.steps):
            return
        self.refreshed = now
        if self.bar is None:
            form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
            self.bar = tqdm(
                desc=title(self.path.parent),
                initial=step,
                total=self.steps,
                bar_format=form,
                dynamic_ncols=True,
                file=sys.stderr,
            )
        self.bar.n = step
        self.bar.set_postfix_str(_short(self.shown, self.pace.left(step)), refresh=False)
        self.bar.refresh()

    def add(self, line: Line) -> None:
        """Write one line with the time, and tell it.

        A number that is not finite is null, as JSON has none, and named under "not_finite".
        """
        if not self.write:
            return
        line = {**_finite(line), "time": round(time(), 3)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        self.shown |= {key: line[key] for key in _SHORT if line.get(key) is not None}
        if self.events:
            emit("metrics", **{"steps": self.steps, **line})
        else:
            text = readable({"steps": self.steps, **line}, self.pace.left(line["step"]))
            say(text) if self.bar is not None else print(text, flush=True)
        self.loggers.add(line)

    def close(self) -> None:
        """Leave the bar as it is, and let the last lines reach the other tools."""
        if self.bar is not None:
            self.bar.refresh()
            self.bar.close()
            self.bar = None
        self.loggers.close()


class Pace:
    """Seconds per step, scoring and saving counted: the mean of this session; what is long ago counts less and less."""

    def __init__(self, steps: int) -> None:
        self.steps, self.memory = steps, max(50, steps // 10)
        self.seconds, self.counted = 0.0, 0
        self.last: tuple[int, float] | None = None
        self.warm = False

    def at(self, step: int, now: float) -> None:
        """Count the time since the last call, unless it is the session's first: kernels are made in it."""
        if self.last is not None and step > self.last[0]:
            if self.warm:
                done = step - self.last[0]
                self.counted = min(self.counted + done, self.memory)
                each = (now - self.last[1]) / done
                self.seconds += (each - self.seconds) * min(1.0, done / self.counted)
            self.warm = True
        self.last = (step, now)

    def pause(self) -> None:
        """Leave out the time until the next call."""
        self.last = None

    def left(self, step: int) -> float | None:
        """Return the seconds from this step to the last one, or None as long as they are not known."""
        return (self.steps - step) * self.seconds if self.counted and step < self.steps else None


_SHORT = {"loss": "loss {:.3f}", "val_bpb": "{:.3f} bits per byte", "tokens_per_s": "{:,.0f} tokens/s"}


def readable(line: Line, seconds_left: float | None = None) -> str:
    """Return a line for a person.

    Without `seconds_left`, the time that the steps left will take is told from the line's own tokens per second
    (scoring not counted), except in the first step, which is slow.
    """
    parts = [f"step {line['step']:,}" + (f"/{line['steps']:,}" if "steps" in line else "")]
    told = note(line)
    if told is not None:
        return "  ".join([*parts, told])
    shown = {"loss": "loss {:.3f}", "val_loss": "held-out loss {:.3f}", "val_bpb": "{:.3f} bits per byte"}
    shown |= {"lr": "lr {:.2g}", "grad_norm": "gradient {:.2f}", "tokens_per_s": "{:,.0f} tokens/s"}
    shown |= {"mfu": "MFU {:.1%}"}
    figures = {**line, **{key: float(value) for key, value in line.get("not_finite", {}).items()}}
    parts += [form.format(figures[key]) for key, form in shown.items() if figures.get(key) is not None]
    if line.get("memory_bytes"):
        parts.append(f"{line['memory_bytes'] / 2**30:.1f} GiB")
    if seconds_left is None and line.get("tokens_per_s") and 1 < line["step"] < line["steps"]:
        seconds_left = (line["steps"] - line["step"]) * line["tokens"] / line["step"] / line["tokens_per_s"]
    if seconds_left is not None:
        parts.append(_left(seconds_left))
    return "  ".join(parts)


def _short(shown: Mapping[str, float], seconds_left: float | None) -> str:
    parts = [form.format(shown[key]) for key, form in _SHORT.items() if key in shown]
    return ", ".join(parts if seconds_left is None else [*parts, _left(seconds_left)])


def _left(seconds: float) -> str:
    return f"{timedelta(seconds=round(seconds))} left"


def _finite(line: Line) -> Line:
    wrong = {k: str(v) for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
    return {**line, **dict.fromkeys(wrong), "not_finite": wrong} if wrong else line
