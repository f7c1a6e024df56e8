"""The whole of `make demo` from empty folders: wall time of each part, and what the model has learned."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from models.runs import newest


def main() -> None:
    """Run the demo's flow, then once more over what is there."""
    with tempfile.TemporaryDirectory(prefix="pileline-bench-") as folder:
        root = Path(folder)
        environment = {**os.environ, "PILELINE_DATA": str(root / "data"), "PILELINE_RUNS": str(root / "runs")}
        first, again = _flow(environment), _flow(environment)
        run = newest(root / "runs")["demo"]
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
        scored = [line for line in metrics if line.get("val_bpb") is not None]
        (evaluation,) = (run / "evaluations").glob("*.json")
        scores = json.loads(evaluation.read_text("utf-8"))
    print("| figure | value |")
    print("|---|---|")
    print(f"| the whole flow, from nothing | {first:.0f} s |")
    print(f"| the same again, all of it found done but evaluation and samples | {again:.0f} s |")
    print(f"| tokens trained on | {scored[-1]['tokens']:,} |")
    print(f"| held-out bits per byte, untrained | {scored[0]['val_bpb']:.3f} |")
    print(f"| held-out bits per byte in the end, first blocks | {scored[-1]['val_bpb']:.3f} |")
    print(f"| held-out bits per byte in the end, documents | {scores['bits_per_byte']:.3f} |")
    for name, subset in scores["subsets"].items():
        print(f"| ... of {name} | {subset['bits_per_byte']:.3f} |")


def _flow(environment: dict[str, str]) -> float:
    start = time.monotonic()
    command = [sys.executable, "-m", "flows.pretrain", "demo"]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start
