"""Memory and speed of `python -m corpora prepare`, on a small shard and on one of 1 GB of text.

The floor is a bare loop over the same documents: tiktoken's encode_ordinary and nothing else.  MB are 10^6
UTF-8 bytes of text; CPU seconds are user + system of the child process, start-up included.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import zstandard

from corpora import demo, tokenizer
from corpora.read import parse_record, read_lines
from corpora.settings import DataSettings

SIZES_MB = (50, 1000)
FLOOR_MB = 50


def main() -> None:
    """Print one row for each shard size, and the floor."""
    with tempfile.TemporaryDirectory(prefix="pileline-bench-") as folder:
        root = Path(folder)
        texts = _demo_texts(root)
        floor = _floor(texts)
        print("| shard | text MB/CPU-s | of a bare tiktoken loop | MB/s wall | peak memory MB |")
        print("|---|---|---|---|---|")
        print(f"| bare tiktoken loop | {floor:.1f} | 100 % | | |")
        for size in SIZES_MB:
            cpu, wall, memory = _prepare(root, texts, size)
            share = 100 * size / cpu / floor
            print(
                f"| {size} MB | {size / cpu:.1f} | {share:.0f} % | {size / wall:.1f} | {memory:.0f} |",
                flush=True,
            )


def _demo_texts(root: Path) -> list[str]:
    """Return the demo corpus' documents."""
    settings = DataSettings.read("demo")
    lock = demo.build(root)
    source = root / "demo" / "source"
    lines = (line for entry in lock.files for line in read_lines(source / entry.path))
    return [parse_record(line.data, settings.corpus).text for line in lines if line.data]


def _floor(texts: list[str]) -> float:
    """Return the MB/CPU-s of encoding alone."""
    encoding = tokenizer.load(DataSettings.read("demo").tokenizer)
    done = 0
    start = time.process_time()
    for text in texts * (1 + FLOOR_MB // 20):
        encoding.encode(text)
        done += len(text.encode())
        if done > FLOOR_MB * 1e6:
            break
    return done / 1e6 / (time.process_time() - start)


def _prepare(root: Path, texts: list[str], megabytes: int) -> tuple[float, float, float]:
    """Make and prepare a shard of that much text; return CPU s, wall s and peak memory in MB."""
    source = root / f"source-{megabytes}"
    source.mkdir()
    shard = source / "a.jsonl.zst"
    shuffled = random.Random(megabytes)
    written = 0
    with zstandard.open(shard, "wb") as out:
        while written < megabytes * 1e6:
            text = shuffled.choice(texts)
            written += len(text.encode())
            out.write(json.dumps({"text": text, "meta": {"pile_set_name": "bench"}}).encode() + b"\n")
    entry = {"name": "a", "path": shard.name, "size": shard.stat().st_size}
    with shard.open("rb") as file:
        entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    lock = {"corpus": "bench", "url": source.as_uri(), "files": [entry, {**entry, "name": "v"}]}
    (source / "lock.json").write_text(json.dumps(lock))
    recipe = source / "bench.toml"
    recipe.write_text(
        f'[corpus]\nname = "bench"\ntrain = ["a"]\nval = ["v"]\nlock = "{source}/lock.json"\n'
        '[tokenizer]\nname = "r50k_base"\nbos = 50256\neos = 50256\n[blocks]\nlength = 2048\n'
    )
    environment = {**os.environ, "PILELINE_DATA": str(source / "data")}
    command = [sys.executable, "-m", "corpora"]
    subprocess.run(
        [*command, "fetch", str(recipe), "--shard", "a"],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    start = time.monotonic()
    prepare = [*command, "prepare", str(recipe), "--shard", "a"]
    child = subprocess.Popen(prepare, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"error: {' '.join(prepare)} ended with {child.returncode}")
    wall = time.monotonic() - start
    return usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss * 1024 / 1e6
