"""Random reads of blocks for training batches, beside a training step and beside Hugging Face datasets.

Batches of 8 and of 64 rows of 1,024 ids at random places, by `corpora.blocks.Blocks.rows` on Arrow and on
Parquet, and by `datasets` on the same Arrow files (load_dataset, numpy format); files in the page cache, all
readers in turn, medians of 5 rounds.  The step is one of the recipe 13m on this CPU, with 8 such blocks.

BENCH_IDS_MB (100) is the size of the ids; BENCH_STEPS (5) is how many steps are timed; the fastest counts.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.prepare import Corpus, demo_lines
from corpora.blocks import Blocks
from models import data, device
from models.optimize import learning_rate
from models.processes import Processes
from models.settings import RunSettings
from models.step import Stepper

LENGTH = 1024
ROWS = (8, 64)
ROUNDS = 5
SECONDS = 0.5  # of reading, for each reader and size in each round
BYTES_OF_TEXT = 1.3  # for each byte of ids, to have enough

Reader = Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]]


def main() -> None:
    """Print batches per second, and how many times a step takes as long; fail when readers disagree."""
    megabytes, steps = int(os.environ.get("BENCH_IDS_MB") or 100), int(os.environ.get("BENCH_STEPS") or 5)
    with tempfile.TemporaryDirectory(prefix="pileline-bench-") as folder:
        root = Path(folder)
        arrow, parquet = _make(root, megabytes)
        blocks = Blocks(arrow)
        with _datasets(arrow, root) as theirs:
            others = Blocks(parquet)
            readers: dict[str, Reader] = {
                "ours, Arrow": lambda wanted: blocks.rows(wanted)[0],
                "ours, Parquet": lambda wanted: others.rows(wanted)[0],
                "datasets, the same Arrow files": theirs,
            }
            _compare(readers, len(blocks))
            speeds = _read(readers, len(blocks))
        _say("training steps")
        step = _step(blocks, steps)
        print(f"{len(blocks):,} blocks, {2e-6 * LENGTH * len(blocks):.0f} MB of ids.\n")
        print("| reader | batches/s of 8 x 1,024 | of 64 x 1,024 | a step's time / a read's, 8 x 1,024 |")
        print("|---|---|---|---|")
        for name, by_size in speeds.items():
            eight, many = (statistics.median(by_size[rows]) for rows in ROWS)
            print(f"| {name} | {eight:,.0f} | {many:,.0f} | {step * eight:,.0f} |")
        threads = f"on {torch.get_num_threads()} CPU threads"
        print(f"\nA step of the recipe 13m, 8 x 1,024, {threads}: {step:.2f} s, the fastest of {steps}.")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _make(root: Path, megabytes: int) -> tuple[list[Path], list[Path]]:
    """Prepare so many MB of ids as Arrow, and convert them to Parquet; return the block files."""
    size = megabytes * 1e6 * BYTES_OF_TEXT
    corpus = Corpus.make(root / "reads", demo_lines(root), size, part_bytes=None, halves=False)
    converted = root / "parquet"
    convert = [sys.executable, "-m", "corpora", "convert", str(corpus.blocks), str(converted)]
    for command in (corpus.prepare(corpus.recipe("auto", LENGTH), 1), convert):
        subprocess.run(command, env=corpus.environment, check=True, stdout=subprocess.DEVNULL)
    return sorted(corpus.blocks.rglob("part-*.arrow")), sorted(converted.rglob("part-*.parquet"))


@contextmanager
def _datasets(files: list[Path], root: Path) -> Iterator[Reader]:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    from datasets import load_dataset

    names = [str(path) for path in files]
    rows = load_dataset("arrow", data_files=names, split="train", cache_dir=str(root / "datasets"))
    rows = rows.select_columns("input_ids").with_format("numpy")
    yield lambda wanted: np.asarray(rows[wanted]["input_ids"])


def _compare(readers: dict[str, Reader], count: int) -> None:
    wanted = np.random.default_rng(1).integers(0, count, 256)
    rows = [read(wanted) for read in readers.values()]
    if not all(np.array_equal(rows[0], other) for other in rows):
        sys.exit("error: the readers give different ids")


def _read(readers: dict[str, Reader], count: int) -> dict[str, dict[int, list[float]]]:
    """Return batches per second by reader and rows in a batch, one figure for each round."""
    chance = np.random.default_rng(2)
    speeds: dict[str, dict[int, list[float]]] = {name: {rows: [] for rows in ROWS} for name in readers}
    for turn in range(ROUNDS):
        for name, read in readers.items():
            for rows in ROWS:
                done, start = 0, time.perf_counter()
                while (took := time.perf_counter() - start) < SECONDS:
                    read(chance.integers(0, count, rows))
                    done += 1
                speeds[name][rows].append(done / took)
        _say(f"reads: round {turn + 1}/{ROUNDS}")
    return speeds


def _step(blocks: Blocks, steps: int) -> float:
    """Return the shortest time of a training step with 8 blocks, as models.train makes it."""
    settings, cpu = RunSettings.read("13m"), device.choose("cpu")
    train = settings.train
    dtype = device.choose_dtype(train.dtype, cpu)
    stepper = Stepper(settings.model, train, Processes(0, 1, cpu), dtype=dtype)
    stepper.init(train.seed)
    order = data.Order(len(blocks), ROWS[0], train.seed)
    took = []
    for step in range(steps):
        start = time.perf_counter()
        batch = data.batch(blocks, order.step(step), settings.model.vocab, cpu)
        stepper.update([batch], learning_rate(train, step))
        took.append(time.perf_counter() - start)
    return min(took)  # two threads that wait for each other are many times slower on a busy machine


if __name__ == "__main__":
    main()
