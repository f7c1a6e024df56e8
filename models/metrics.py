"""RUN/metrics.jsonl: one line for each logged step, and the same as an event or a line for a person."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

from corpora.files import write_aside
from corpora.progress import emit


class Metrics:
    """The lines of a run.  `write` is false in all processes but the first, `events` chooses JSON on stdout."""

    def __init__(self, run: Path, *, write: bool, events: bool) -> None:
        self.path, self.write, self.events = run / "metrics.jsonl", write, events

    def cut_after(self, step: int) -> None:
        """Remove the lines of later steps, which will be written again, and a torn last line."""
        if not self.write or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text("utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:
                continue
        with write_aside(self.path) as aside:
            aside.write_text("".join(f"{line}\n" for line in kept), "utf-8")

    def add(self, line: dict[str, Any]) -> None:
        """Write one line and tell it."""
        if not self.write:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.events:
            emit("metrics", **line)
        else:
            print(readable(line), flush=True)


def readable(line: dict[str, Any]) -> str:
    """Return a line for a person, with the time that the steps left will take (scoring not counted)."""
    parts = [f"step {line['step']:,}/{line['steps']:,}"]
    shown = {"loss": "loss {:.3f}", "val_loss": "held-out loss {:.3f}", "val_bpb": "{:.3f} bits per byte"}
    shown |= {"lr": "lr {:.2g}", "grad_norm": "gradient {:.2f}", "tokens_per_s": "{:,.0f} tokens/s"}
    parts += [form.format(line[key]) for key, form in shown.items() if line.get(key) is not None]
    if line.get("tokens_per_s") and line["step"] < line["steps"]:
        tokens_left = (line["steps"] - line["step"]) * line["tokens"] / line["step"]
        left = timedelta(seconds=round(tokens_left / line["tokens_per_s"]))
        parts.append(f"{left} left")
    return "  ".join(parts)
