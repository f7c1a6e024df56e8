"""Prove what is on disk: hashes, the ledger's laws, and counts made anew from the blocks themselves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from corpora.blocks import Blocks
from corpora.errors import InputError
from corpora.files import read_json, sha256_file
from corpora.ledger import broken_laws
from corpora.prepare import block_files


def manifests(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the path and content of every manifest under a folder, sorted.  Raises InputError for none."""
    found = sorted(folder.rglob("manifest.json"))
    if not found:
        raise InputError(f"{folder}: no manifest.json under it, so no shard is prepared there")
    return [(path, read_json(path)) for path in found]


def faults(path: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Yield every fault of a prepared shard, given its manifest; each in one line."""
    damaged = False
    for name, output in manifest["outputs"].items():
        file = path.parent / name
        if not file.is_file():
            yield f"{file}: missing"
            damaged = True
        elif (got := sha256_file(file)) != output["sha256"]:
            yield f"{file}: sha256 is {got}, the manifest says {output['sha256']}"
            damaged = True
    yield from (f"{path}: {law}" for law in broken_laws(manifest["ledger"]))
    if not damaged:
        yield from (f"{path.parent}: {fault}" for fault in _recount(path, manifest))


def _recount(path: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Count rows, tokens, documents' ends and the largest id in the block files."""
    ledger, tokenizer = manifest["ledger"], manifest["made_from"]["tokenizer"]
    blocks = Blocks([path.parent / name for name in block_files(manifest)])
    tokens, largest, specials = 0, 0, {tokenizer["bos"]: 0, tokenizer["eos"]: 0}
    for ids, real in blocks.batches():
        tokens += int(real.sum())
        largest = max(largest, int(ids.max()))
        inside = np.arange(blocks.length) < real[:, None]
        for special in specials:
            if special is not None:
                specials[special] += int(((ids == special) & inside).sum())
    if len(blocks) != ledger["blocks"]:
        yield f"{len(blocks)} rows, the ledger says {ledger['blocks']}"
    if tokens != ledger["text_tokens"] + ledger["special_tokens"]:
        yield f"{tokens} tokens, the ledger says {ledger['text_tokens'] + ledger['special_tokens']}"
    if largest >= tokenizer["vocab_size"]:
        yield f"id {largest} is outside the tokenizer's {tokenizer['vocab_size']} ids"
    for special, count in specials.items():
        ends = (tokenizer["bos"], tokenizer["eos"]).count(special)
        if special is not None and count != ends * ledger["kept"]:
            yield f"special id {special} occurs {count} times, {ledger['kept']} documents want {ends * ledger['kept']}"
