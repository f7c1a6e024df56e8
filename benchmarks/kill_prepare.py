"""SIGKILL `python -m corpora prepare` at random moments, then let it end: are the blocks the same?

One, two or three workers, in small parts.  Two kills of three hit the whole process group, as a machine that
loses its power would; every third hits only the parent, and its workers must notice.  A rerun is killed too,
as often as not.  The last one ends, and every file under blocks/ is compared with an undisturbed run's.

BENCH_KILLS (100) is the number of random moments.
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

from benchmarks.prepare import Corpus, demo_lines

MEGABYTES = 20
PART_BYTES = 1_000_000
WORKERS = (1, 2, 3)
PATIENCE = 10  # seconds in which workers must notice that their parent is gone


def main() -> None:
    """Print how many kills there were and what they left; fail when they left anything."""
    wanted = int(os.environ.get("BENCH_KILLS") or 100)
    chance = random.Random(5)
    with tempfile.TemporaryDirectory(prefix="pileline-bench-") as folder:
        root = Path(folder)
        lines = demo_lines(root)
        corpus = Corpus.make(root / "kill", lines, MEGABYTES * 1e6, part_bytes=PART_BYTES, halves=False)
        took, whole = _undisturbed(corpus)
        moments = killed = alone = cases = resumed = kept = different = left_over = orphans = 0
        while moments < wanted:
            shutil.rmtree(corpus.blocks, ignore_errors=True)
            cases += 1
            groups, again = [], True
            while again and moments < wanted:
                workers = chance.choice(WORKERS)
                process = _start(corpus, workers)
                groups.append(process.pid)
                only_parent = moments % 3 == 2
                moments += 1
                hit = _kill(process, chance.uniform(0, took[workers]), only_parent)
                killed, alone = killed + hit, alone + (hit and only_parent)
                again = hit and chance.random() < 0.5
            before = _parts(corpus.blocks)
            _end(_start(corpus, chance.choice(WORKERS)))
            after = _parts(corpus.blocks)
            resumed += bool(before)
            kept += sum(after.get(path) == stamp for path, stamp in before.items())
            orphans += sum(not _gone(group) for group in groups)
            tree = _tree(corpus.blocks)
            different += tree != whole
            left_over += sum(path.name.endswith(".part") for path in corpus.folder.rglob("*"))
            if cases % 10 == 0:
                print(f"{moments} of {wanted} moments: {different} differ", file=sys.stderr, flush=True)
    times = ", ".join(f"{seconds:.1f} s with {workers}" for workers, seconds in took.items())
    print(f"{MEGABYTES} MB of text, {len(whole)} files; undisturbed {times} (workers).\n")
    print("| figure | value |")
    print("|---|---|")
    print(f"| random moments | {moments} |")
    print(f"| killed in flight | {killed} |")
    print(f"| of these only the parent | {alone} |")
    print(f"| last reruns, and of these with parts done already | {cases}, {resumed} |")
    print(f"| finished parts found and kept | {kept} |")
    print(f"| trees that differ from the undisturbed run's | {different} |")
    print(f"| files left over (*.part) | {left_over} |")
    print(f"| orphaned workers alive {PATIENCE} s later | {orphans} |")
    if different or left_over or orphans:
        sys.exit("error: a killed run left its mark")


def _undisturbed(corpus: Corpus) -> tuple[dict[int, float], dict[str, str]]:
    """Return the time that each number of workers takes, and the files, which must be the same for all."""
    took, trees = {}, []
    for workers in WORKERS:
        shutil.rmtree(corpus.blocks, ignore_errors=True)
        start = time.monotonic()
        _end(_start(corpus, workers))
        took[workers] = time.monotonic() - start
        trees.append(_tree(corpus.blocks))
    if any(tree != trees[0] for tree in trees):
        sys.exit("error: undisturbed runs with 1, 2 and 3 workers made different files")
    return took, trees[0]


def _start(corpus: Corpus, workers: int) -> "subprocess.Popen[bytes]":
    command = corpus.prepare(corpus.recipe(), workers)
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        command, env=corpus.environment, stdout=quiet, stderr=quiet, start_new_session=True
    )


def _kill(process: "subprocess.Popen[bytes]", after: float, only_parent: bool) -> bool:
    """Kill a run after so many seconds; tell whether it was still running."""
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        (os.kill if only_parent else os.killpg)(process.pid, signal.SIGKILL)
    code = process.wait()
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"error: prepare ended with exit code {code}")
    return code != 0


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.wait():
        sys.exit(f"error: prepare ended with exit code {process.returncode}")


def _parts(blocks: Path) -> dict[Path, tuple[int, int]]:
    """Return what tells a finished part from one made anew: the inode and the time of its record."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in blocks.rglob("part-*.json")}


def _gone(group: int) -> bool:
    """Tell whether a group's processes end by themselves; kill them if not."""
    deadline = time.monotonic() + PATIENCE
    while _alive(group):
        if time.monotonic() > deadline:
            os.killpg(group, signal.SIGKILL)
            return False
        time.sleep(0.1)
    return True


def _alive(group: int) -> bool:
    """Tell whether a group has a process that is no zombie (nobody may be there to bury it)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, found, *_ = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(found) == group and state != "Z":
            return True
    return False


def _tree(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
