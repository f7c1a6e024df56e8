"""`python -m corpora prepare` beside a bare tiktoken loop, datatrove and Hugging Face datasets; its memory.

Every configuration gets the same text, in a process of its own, once in each round, in turn.  Speed is MB
(10^6 bytes of UTF-8 text) per CPU second, user + system of the whole process tree with start-up, and per
second of wall time; medians over the rounds.  Ratios are taken within a round, and are the figures to quote.

The text: the demo corpus' documents, each once in a pass, every pass in another order.  One thread to each
worker (TOKENIZERS_PARALLELISM=false, which favours the peers per CPU second).  Ours does all that it does for
its users: zstd, JSON, cleaning, hashes of documents and files, packing to 2,048 with BOS and EOS, Arrow.

BENCH_MB (100), BENCH_ROUNDS (3), BENCH_PEERS (1; 0: without), BENCH_TIKTOKEN_MB (1000) and BENCH_FAST_MB (5000;
0: leave out) change what is done; BENCH_MB=5 BENCH_ROUNDS=1 BENCH_TIKTOKEN_MB=0 BENCH_FAST_MB=0 takes a minute.
"""

import hashlib
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from benchmarks import peers
from corpora import demo

WORKERS = (1, 2)
SMALL_PART = 8_000_000  # bytes: two workers need several parts, and a small shard has but one of the default


def main() -> None:
    """Print speed, ratios and memory; fail when our bytes differ between runs, or a peer left text out."""
    megabytes, rounds = _number("BENCH_MB", 100), _number("BENCH_ROUNDS", 3)
    with tempfile.TemporaryDirectory(prefix="pileline-bench-") as folder:
        root = Path(folder)
        lines = demo_lines(root)
        corpus = Corpus.make(root / "speed", lines, megabytes * 1e6)
        configurations = _configurations(root, corpus)
        runs: dict[str, list[Run]] = {c.name: [] for c in configurations}
        for turn in range(rounds):
            for c in configurations:
                runs[c.name].append(run := c.run(root))
                _say(f"round {turn + 1}/{rounds}: {c.name}: {run.cpu:.1f} CPU s, {run.wall:.1f} s")
        _check(runs, corpus)
        distinct = min(corpus.text_bytes, sum(size for size, _ in lines)) / 1e6
        print(
            f"{corpus.text_bytes / 1e6:.0f} MB of text, {distinct:.0f} MB of it distinct, in {corpus.documents:,} "
            f"documents; parts of {(corpus.part_bytes or 0) / 1e6:.1f} MB; rounds: {rounds}\n"
        )
        _print_speeds(runs, corpus.text_bytes)
        _print_ratios(runs, corpus.text_bytes)
        shutil.rmtree(corpus.folder)
        _print_memory(root, lines, megabytes)


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def demo_lines(root: Path) -> list[tuple[int, bytes]]:
    """Return the demo corpus' JSON lines, each with the size of its text."""
    lock = demo.build(root)
    lines = []
    for entry in lock.files:
        with zstandard.open(root / "demo" / "source" / entry.path, "rb") as file:
            lines += [(len(json.loads(line)["text"].encode()), line) for line in file.read().splitlines(True)]
    return lines


@dataclass
class Corpus:
    """One shard "a" of so much text, fetched; and the same documents dealt to two files, for the peers."""

    folder: Path
    text_bytes: int
    documents: int
    part_bytes: int | None  # None: the default

    @classmethod
    def make(
        cls,
        folder: Path,
        lines: list[tuple[int, bytes]],
        size: float,
        *,
        part_bytes: int | None = 0,  # 0: so that there are some
        level: int = 3,
        halves: bool = True,
    ) -> "Corpus":
        """Write so many bytes of text, and fetch the shard."""
        (folder / "one").mkdir(parents=True)
        shard = folder / "one" / "a.jsonl.zst"
        outs = [zstandard.open(shard, "wb", cctx=zstandard.ZstdCompressor(level))]
        if halves:
            (folder / "two").mkdir()
            outs += [zstandard.open(folder / "two" / f"{n}.jsonl.zst", "wb") for n in range(2)]
        written = documents = 0
        order = random.Random(1)
        while written < size:
            for text_bytes, line in order.sample(lines, len(lines)):
                outs[0].write(line)
                if halves:
                    outs[1 + documents % 2].write(line)
                written, documents = written + text_bytes, documents + 1
                if written >= size:
                    break
        for out in outs:
            out.close()
        with shard.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entry = {"path": shard.name, "size": shard.stat().st_size, "sha256": digest}
        lock = {
            "corpus": "bench",
            "url": shard.parent.as_uri(),
            "files": [{**entry, "name": name} for name in ("a", "v")],
        }
        (folder / "lock.json").write_text(json.dumps(lock))
        if part_bytes == 0:
            part_bytes = min(SMALL_PART, written // 6)
        corpus = cls(folder, written, documents, part_bytes)
        corpora = [sys.executable, "-m", "corpora", "fetch", str(corpus.recipe()), "--shard", "a"]
        subprocess.run(corpora, env=corpus.environment, check=True, stdout=subprocess.DEVNULL)
        return corpus

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PILELINE_DATA": str(self.folder / "data")}

    @property
    def blocks(self) -> Path:
        return self.folder / "data" / "bench" / "blocks"

    def recipe(self, backend: str = "own", length: int = 2048) -> Path:
        """Write a recipe and return its path."""
        recipe = self.folder / f"{backend}-{length}.toml"
        part = "" if self.part_bytes is None else f"part_bytes = {self.part_bytes}\n"
        recipe.write_text(
            f'[corpus]\nname = "bench"\ntrain = ["a"]\nval = ["v"]\nlock = "{self.folder}/lock.json"\n'
            f'[tokenizer]\nname = "r50k_base"\nbos = 50256\neos = 50256\nbackend = "{backend}"\n'
            f"[blocks]\nlength = {length}\n{part}"
        )
        return recipe

    def prepare(self, recipe: Path, workers: int) -> list[str]:
        """Return the command that makes the blocks."""
        command = [sys.executable, "-m", "corpora", "prepare", str(recipe)]
        return [*command, "--shard", "a", "--workers", str(workers)]


@dataclass
class Run:
    """What one run took: CPU s, wall s, bytes of memory; and what it told."""

    cpu: float
    wall: float
    largest: int  # peak resident size of the largest process
    tree: int  # peak sum of the processes' proportional shares, 5 times a second; 0 if not known
    told: dict[str, Any]


@dataclass
class Configuration:
    """A command, the folders that it fills, and how its result is read from them."""

    name: str
    command: list[str]
    environment: dict[str, str]
    out: Path
    read: Callable[[str], dict[str, Any]] = field(default=lambda out: dict(json.loads(out.splitlines()[-1])))

    def run(self, root: Path) -> Run:
        """Run it in empty folders, which are removed afterwards."""
        result, out, err = (root / f"run.{name}" for name in ("json", "out", "err"))
        shutil.rmtree(self.out, ignore_errors=True)
        measure = [sys.executable, "-I", "-S", str(peers.SCRIPTS / "measure.py")]
        command = [*measure, str(result), str(out), str(err), *self.command]
        subprocess.run(command, env=self.environment, check=True)
        took = json.loads(result.read_text())
        if took.pop("code"):
            sys.exit(f"error: {' '.join(self.command)}:\n{err.read_text('utf-8', 'replace')[-3000:]}")
        run = Run(**took, told=self.read(out.read_text("utf-8", "replace")))
        shutil.rmtree(self.out, ignore_errors=True)
        return run


def _ours(corpus: Corpus, backend: str, workers: int) -> Configuration:
    def read(_: str) -> dict[str, Any]:
        digests = []
        for path in sorted(corpus.blocks.rglob("*")):
            if path.is_dir() or path.suffix == ".json":
                continue  # those name the engine that encoded
            with path.open("rb") as file:
                digests.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
        (manifest,) = corpus.blocks.rglob("manifest.json")
        ledger = json.loads(manifest.read_bytes())["ledger"]
        return {"tokens": ledger["text_tokens"] + ledger["special_tokens"], "blocks": digests}

    recipe = corpus.recipe(backend)
    name = {"own": "tiktoken", "fastokens": "fastokens"}[backend]
    title = f"ours, {name}, {_workers(workers)}"
    return Configuration(title, corpus.prepare(recipe, workers), corpus.environment, corpus.blocks, read)


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def _backends() -> list[str]:
    if importlib.util.find_spec("fastokens"):
        return ["own", "fastokens"]
    _say("fastokens is not installed: its rows are left out")
    return ["own"]


LOOP = "bare tiktoken loop"
PEERS = ("datatrove", "datasets, tokenizers", "datasets, tiktoken")


def _configurations(root: Path, corpus: Corpus) -> list[Configuration]:
    ranks, hugging_face = peers.vocabulary(root)
    out, scripts = root / "out", peers.SCRIPTS
    own = dict(os.environ)
    loop = [
        sys.executable,
        str(scripts / "tiktoken_loop.py"),
        str(ranks),
        str(corpus.folder / "one/a.jsonl.zst"),
    ]
    found = [Configuration(LOOP, loop, own, out)]
    found += [_ours(corpus, backend, count) for backend in _backends() for count in WORKERS]
    python = peers.environment() if _number("BENCH_PEERS", 1) else None
    if python is None:
        return found
    theirs = {
        **own,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(out / "home"),
    }
    for count in WORKERS:
        shards = str(corpus.folder / ("one", "two")[count - 1])
        tail = [shards, str(out), str(count)]
        blocks = str(scripts / "datasets_blocks.py")
        commands = (
            [str(scripts / "datatrove_tokens.py"), str(hugging_face), *tail],
            [blocks, "tokenizers", str(hugging_face), *tail],
            [blocks, "tiktoken", str(ranks), *tail],
        )
        for name, command in zip(PEERS, commands, strict=True):
            found.append(Configuration(f"{name}, {_workers(count)}", [str(python), *command], theirs, out))
    return found


def _check(runs: dict[str, list[Run]], corpus: Corpus) -> None:
    """Fail when blocks of ours differ in one byte, or when someone encoded less than the whole text."""
    ours = {json.dumps(run.told["blocks"]) for name in runs if name.startswith("ours") for run in runs[name]}
    if len(ours) != 1:
        sys.exit(f"error: our blocks differ between workers, backends or rounds: {len(ours)} kinds of them")
    text_tokens = runs[LOOP][0].told["tokens"]
    for name, done in runs.items():
        specials = {LOOP: 0, "datatrove": 1}.get(name.split(",")[0], 2) * corpus.documents
        for run in done:
            # Cleaning, literal <|endoftext|>s and the ends that datasets drops are less than this.
            if abs(run.told["tokens"] / (text_tokens + specials) - 1) > 0.02:
                sys.exit(f"error: {name} made {run.told['tokens']:,} tokens of {text_tokens + specials:,}")


def _range(values: Iterable[float]) -> str:
    every = sorted(values)
    return f"{statistics.median(every):.2f} ({every[0]:.2f}-{every[-1]:.2f})"


def _print_speeds(runs: dict[str, list[Run]], size: int) -> None:
    print(
        "| configuration | MB/CPU-s (range) | MB/s wall (range) | largest process, MB | all processes (PSS), MB |"
    )
    print("|---|---|---|---|---|")
    for name, done in runs.items():
        cpu = _range(size / 1e6 / run.cpu for run in done)
        wall = _range(size / 1e6 / run.wall for run in done)
        print(f"| {name} | {cpu} | {wall} | {_memory(done)} |")
        if name == LOOP:
            alone = _range(size / 1e6 / run.told["loop_cpu"] for run in done)
            print(f"| the same, CPU time in the loop only | {alone} | | | |")
    print(flush=True)


def _memory(done: list[Run]) -> str:
    largest, tree = (max(sizes) / 1e6 for sizes in ([r.largest for r in done], [r.tree for r in done]))
    return f"{largest:,.0f} | {tree:,.0f}" if tree else f"{largest:,.0f} |"


def _print_ratios(runs: dict[str, list[Run]], size: int) -> None:
    """Print ours to each peer, worker for worker, and ours to the loop."""
    backends = [name for name in ("tiktoken", "fastokens") if f"ours, {name}, 1 worker" in runs]

    def ratio(ours: str, other: str, took: Callable[[Run], float], theirs: Callable[[Run], float]) -> str:
        pairs = zip(runs[ours], runs[other], strict=True)
        return f"{statistics.median(theirs(b) / took(a) for a, b in pairs):.2f}"

    cpu, wall = (lambda run: run.cpu), (lambda run: run.wall)
    print("| ours to | " + " | ".join(f"{b}, per CPU-s | {b}, wall" for b in backends) + " |")
    print("|---" * (1 + 2 * len(backends)) + "|")
    alone: Callable[[Run], float] = lambda run: run.told["loop_cpu"]  # noqa: E731
    rows = [(f"{LOOP}, CPU time in the loop only, 1 worker", LOOP, 1, alone)]
    rows += [(f"{LOOP}, 1 worker", LOOP, 1, cpu)]
    for peer in PEERS:
        rows += [(name, name, n, cpu) for n in WORKERS if (name := f"{peer}, {_workers(n)}") in runs]
    for title, other, count, theirs in rows:
        cells = []
        for backend in backends:
            ours = f"ours, {backend}, {_workers(count)}"
            cells += [
                ratio(ours, other, cpu, theirs),
                "" if theirs is alone else ratio(ours, other, wall, wall),
            ]
        print(f"| {title} | " + " | ".join(cells) + " |")
    cells = []
    for b in backends:
        one, two = f"ours, {b}, 1 worker", f"ours, {b}, 2 workers"
        cells += [ratio(two, one, cpu, cpu), ratio(two, one, wall, wall)]
    print("| ours with 2 workers to 1 worker | " + " | ".join(cells) + " |\n", flush=True)


def _print_memory(root: Path, lines: list[tuple[int, bytes]], small: int) -> None:
    """Print our memory, and speed without much of a start, for shards of several sizes."""
    rows = [(small, "own"), (_number("BENCH_TIKTOKEN_MB", 1000), "own")]
    rows.append((_number("BENCH_FAST_MB", 5000), "fastokens"))
    backends = _backends()
    print("Parts of the default size.\n")
    print(
        "| shard | workers | largest process, MB | all processes (PSS), MB | MB/CPU-s | MB/s wall | to 1 worker |"
    )
    print("|---|---|---|---|---|---|---|")
    for size, backend in rows:
        if not size or backend not in backends:
            continue
        if shutil.disk_usage(root).free < 2e6 * size:  # its ids are nearly as large as the text itself
            print(f"| {size:,} MB: left out, the disk is too full | | | | | | |", flush=True)
            continue
        # zstd level 1: quick to make, and no slower to read.
        corpus = Corpus.make(root / "memory", lines, size * 1e6, part_bytes=None, level=1, halves=False)
        wall = 0.0  # of one worker
        for count in WORKERS:
            c = _ours(corpus, backend, count)
            _say(f"memory: {size} MB, {c.name}")
            run = c.run(root)
            wall = wall or run.wall
            speeds = (corpus.text_bytes / 1e6 / run.cpu, corpus.text_bytes / 1e6 / run.wall)
            speed = f"{speeds[0]:.1f} | {speeds[1]:.1f} | {wall / run.wall:.2f}"
            title = f"{size:,} MB, {'tiktoken' if backend == 'own' else backend}"
            print(f"| {title} | {count} | {_memory([run])} | {speed} |", flush=True)
        shutil.rmtree(corpus.folder)


if __name__ == "__main__":
    main()
