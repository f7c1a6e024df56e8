"""A corpus of a few kilobytes and a recipe of a two-layer model for it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import zstandard


def make_corpus(
    folder: Path, shards: Mapping[str, range], broken: Sequence[str] = (), unknown: Sequence[str] = ()
) -> Path:
    """Write compressed shards and their lock; return the lock's path.

    A broken shard is cut off in the middle, and its hash in the lock is that of the half; an unknown one has
    no hash there.
    """
    entries = []
    for shard, numbers in shards.items():
        lines = [
            {
                "text": f"Page {n}. " + "The cat sat on the mat and the dog ran to the park. " * 12,
                "meta": {"pile_set_name": "cats" if n % 2 else "dogs"},
            }
            for n in numbers
        ]
        data = zstandard.compress(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        if shard in broken:
            data = data[: len(data) // 2]
        path = folder / f"{shard}.jsonl.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        entry = {"name": shard, "path": f"{shard}.jsonl.zst", "size": len(data), "sha256": sha256}
        entries.append(
            {key: value for key, value in entry.items() if key != "sha256" or shard not in unknown}
        )
    lock = folder / "lock.json"
    lock.write_text(json.dumps({"corpus": folder.name, "url": ".", "revision": None, "files": entries}))
    return lock


def make_recipe(path: Path, lock: Path, train: str = "steps = 6\nlog_every = 2\neval_every = 3") -> Path:
    """Write a recipe of a two-layer model."""
    path.write_text(
        f"""
description = "A tiny model for the tests."
[corpus]
name = "{lock.parent.name}"
train = ["train/00", "train/01"]
val = ["val"]
lock = "{lock}"
[tokenizer]
kind = "tiktoken"
name = "r50k_base"
bos = 50256
eos = 50256
[blocks]
length = 32
[model]
norm = "rmsnorm"
positions = "rope"
mlp = "swiglu"
layers = 2
width = 16
heads = 2
ffn = 32
vocab = 50304
context = 32
[train]
{train}
batch = 4
lr = 0.01
eval_blocks = 4
[evaluate]
bytes = 2000
[generate]
prompts = ["The cat"]
max_new_tokens = 8
"""
    )
    return path
