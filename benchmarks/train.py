"""Tokens per CPU-second of a full training step, beside Hugging Face's Trainer and a plain PyTorch loop.

Each contestant is a process of its own with one thread and the same random ids; after two steps of warm-up
they take turns, BENCH_ROUNDS (7) rounds of BENCH_STEPS (3) steps each.  A step is everything from the batch to
the updated weights: forward, loss, backward, clipping at 1.0, optimizer.  Speeds are medians over the rounds,
with the fastest; ratios are taken within a round, to the peer's faster precision, and are the figures to quote.

The two shapes of 13 million parameters spend most of a step in the output head; the third does in its body.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from models import device

ROWS, LENGTH = 8, 128
HF, PLAIN = "HF Trainer", "plain PyTorch loop"
SCRIPTS = Path(__file__).with_name("peers")
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT": {"norm": "layernorm", "positions": "learned", "mlp": "relu", "tie": False, "bias": True},
    "LLaMA": {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "tie": True, "bias": False},
}
SHAPES = (  # family, layers, width, heads, feed-forward, vocabulary
    ("GPT", 1, 128, 8, 512, 50304),
    ("LLaMA", 8, 192, 6, 512, 50304),
    ("LLaMA", 4, 128, 4, 384, 8192),
)


def main() -> None:
    """Print a table for each shape."""
    rounds, steps = (int(os.environ.get(name) or n) for name, n in (("BENCH_ROUNDS", 7), ("BENCH_STEPS", 3)))
    from benchmarks import peers  # here: it needs zstandard, which is not everywhere that benchmarks.gpu runs

    python = peers.environment()
    for family, layers, width, heads, ffn, vocab in SHAPES:
        title = f"{family}, {layers} x {width}, {heads} heads, {vocab:,} ids"
        shape = {**FAMILIES[family], "layers": layers, "width": width, "heads": heads, "ffn": ffn}
        shape |= {"vocab": vocab, "context": LENGTH, "head_bias": False}
        try:
            told, speeds = _race(title, _contestants(shape, steps, python), rounds, steps)
        except RuntimeError as error:
            sys.exit(f"error: {title}: {error}")
        if len({about["parameters"] for about in told.values()}) != 1:
            sys.exit(f"error: {title}: the contestants' shapes differ: {told}")
        _print(title, told, speeds)


def _race(
    title: str, contestants: dict[str, list[str]], rounds: int, steps: int
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Return what each contestant tells of itself, and its tokens per CPU-second in every round."""
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory(prefix="pileline-bench-") as folder, contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(loop(command, Path(folder), environment()))
            for name, command in contestants.items()
        }
        told = {name: one.ready() for name, one in running.items()}
        for turn in range(rounds):
            for name, one in running.items():
                speeds[name].append(steps * ROWS * LENGTH / one.turn()["cpu"])
            print(f"{title}: round {turn + 1}/{rounds}", file=sys.stderr, flush=True)
    return told, speeds


def _contestants(shape: dict[str, Any], steps: int, python: Path | None) -> dict[str, list[str]]:
    spec = {"shape": shape, "rows": ROWS, "length": LENGTH, "steps": steps, "warm": 2}
    rows = [("bf16", "adamw"), ("bf16", "muon"), ("fp32", "adamw")]
    if not device.fast_bf16(torch.device("cpu")):
        rows = [("fp32", "adamw"), ("fp32", "muon")]
    names = {"adamw": "AdamW", "muon": "Muon"}
    found = {
        f"ours, {precision}, {names[optimizer]}": command(
            "ours", {**spec, "precision": precision, "optimizer": optimizer}
        )
        for precision, optimizer in rows
    }
    for precision in ("fp32", "bf16"):
        if python is not None:
            found[f"{HF}, {precision}"] = command(
                "hf_trainer", {**spec, "precision": precision}, python, str(Path(torch.__file__).parents[1])
            )
        found[f"{PLAIN}, {precision}"] = command("plain_loop", {**spec, "precision": precision})
    return found


def command(
    script: str, spec: dict[str, Any], python: Path | str = sys.executable, *arguments: str
) -> list[str]:
    """Return the command of a loop of benchmarks/peers."""
    return [str(python), str(SCRIPTS / f"{script}.py"), json.dumps(spec), *arguments]


def environment() -> dict[str, str]:
    """Return that of processes with one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Loop:
    """A process of benchmarks/peers that trains when told to; its answers are lines of JSON."""

    def __init__(self, process: "subprocess.Popen[str]", errors: Path) -> None:
        self.process, self.errors = process, errors

    def ready(self) -> dict[str, Any]:
        """Wait for the end of the warm-up."""
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(self.errors.read_text("utf-8", "replace")[-3000:])
        return dict(json.loads(line))

    def turn(self) -> dict[str, Any]:
        """Let it make its steps; return what they took."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.ready()


@contextlib.contextmanager
def loop(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[Loop]:
    """Start a loop; end it at the end."""
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as errors:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield Loop(process, Path(errors.name))
        finally:
            process.kill()
            process.wait()


def _print(title: str, told: dict[str, dict[str, Any]], speeds: dict[str, list[float]]) -> None:
    def ratio(name: str, peer: str) -> str:
        """To the peer's precision whose median is the higher one."""
        others = [other for other in speeds if other.startswith(peer)]
        if not name.startswith("ours") or not others:
            return ""
        faster = max(others, key=lambda other: statistics.median(speeds[other]))
        return f"{statistics.median(a / b for a, b in zip(speeds[name], speeds[faster], strict=True)):.2f}"

    versions: dict[str, str] = {}
    for about in told.values():
        versions |= {name: about[name] for name in ("torch", "transformers", "accelerate") if name in about}
    (parameters,) = {about["parameters"] for about in told.values()}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"**{title}**: {parameters:,} parameters, {ROWS} x {LENGTH} tokens in a step; {shown}.\n")
    print(f"| step | tokens/CPU-s, median | fastest | to {HF} | to {PLAIN} |")
    print("|---|---|---|---|---|")
    for name, every in speeds.items():
        cells = (
            f"{statistics.median(every):,.0f} | {max(every):,.0f} | {ratio(name, HF)} | {ratio(name, PLAIN)}"
        )
        print(f"| {name} | {cells} |")
    print(flush=True)


if __name__ == "__main__":
    main()
