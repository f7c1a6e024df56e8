"""SIGKILL `python -m flows.pretrain demo` at random moments, then let it end: are the blocks the same?

The flow and all of its children are killed at once, as by a machine that loses its power.  A run that was
killed is followed by one that is left to end; its blocks, manifests and ledgers are compared with those of
an undisturbed run, byte for byte.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KILLS = 10
STEPS = "3"  # of training: this is about the data


def main() -> None:
    """Print how many kills there were, and how many of the results differed."""
    with tempfile.TemporaryDirectory(prefix="pileline-bench-") as folder:
        root = Path(folder)
        start = time.monotonic()
        _end(_start(root / "data"))
        took = time.monotonic() - start
        whole = _tree(root / "data" / "demo")
        moments = random.Random(2)
        killed = different = left_over = 0
        for _ in range(KILLS):
            shutil.rmtree(root / "data")
            process = _start(root / "data")
            try:
                process.wait(moments.uniform(0.25, 0.8) * took)  # from the first shard to the last checkpoint
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                killed += 1
            process.wait()
            _end(_start(root / "data"))
            after = _tree(root / "data" / "demo")
            different += after != whole
            left_over += sum(name.endswith(".part") for name in after)
    print("| figure | value |")
    print("|---|---|")
    print(f"| killed | {killed} of {KILLS} |")
    print(f"| folders of files that differ from the undisturbed run | {different} |")
    print(f"| parts left behind | {left_over} |")
    if different or left_over:
        sys.exit("error: a killed run left its mark")


def _start(data: Path) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PILELINE_DATA": str(data), "PILELINE_RUNS": str(data.parent / "runs")}
    command = [sys.executable, "-m", "flows.pretrain", "demo", "--steps", STEPS]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet, start_new_session=True)


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.wait():
        sys.exit(f"error: the flow ended with exit code {process.returncode}")


def _tree(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file, receipts aside: these hold the time of their file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not path.name.endswith(".receipt.json")
    }
