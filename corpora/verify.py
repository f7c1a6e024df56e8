"""Prove what is on disk: hashes of shards and blocks, the ledger's laws, counts made anew from the blocks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from corpora.blocks import Blocks
from corpora.errors import InputError
from corpora.files import sha256_file
from corpora.ledger import broken_laws
from corpora.prepare import block_files, read_manifest
from corpora.read import suffix_of
from corpora.receipts import RECEIPT, read_receipt


def manifests(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the path and content of every manifest under a folder, sorted.  Raises InputError for none."""
    found = sorted(folder.rglob("manifest.json"))
    if not found:
        raise InputError(f"{folder}: no manifest.json under it, so no shard is prepared there")
    return [(path, read_manifest(path)) for path in found]


def fetched(folder: Path) -> list[Path]:
    """Return every fetched shard under a folder, sorted: what has a receipt, and what lies beside such."""
    folder = folder.resolve()
    receipts = sorted(folder.rglob(f"*{RECEIPT}"))
    shards = {path.with_name(path.name.removesuffix(RECEIPT)) for path in receipts}
    for raw in {next((p for p in path.parents if p.name == "raw"), path.parent) for path in receipts}:
        shards |= {
            path
            for path in raw.rglob("*")
            if suffix_of(path.name) and not path.name.startswith(".") and path.is_relative_to(folder)
            if not path.name.endswith((RECEIPT, ".part.json"))
        }
    return sorted(shards)


def raw_faults(file: Path) -> Iterator[str]:
    """Yield what is wrong with a fetched shard; each in one line.  It is read and hashed anew."""
    if not file.is_file():
        yield f"{file}: missing, its receipt is there; fetch it again"
        return
    receipt = read_receipt(file)
    if receipt is None:
        yield f"{file}: its receipt is missing or torn; fetch it again (what is right is not downloaded twice)"
    elif (size := file.stat().st_size) != receipt.size:
        yield f"{file}: has {size:,} bytes, its receipt says {receipt.size:,}; fetch it again"
    elif (got := sha256_file(file)) != receipt.sha256:
        yield f"{file}: sha256 is {got}, its receipt says {receipt.sha256}; fetch it again"


def faults(path: Path) -> Iterator[str]:
    """Yield every fault of a prepared shard, given its manifest's path; each in one line."""
    try:
        manifest = read_manifest(path)
    except InputError as error:
        yield str(error)
        return
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
