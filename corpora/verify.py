"""Prove what is on disk: hashes of shards and blocks, the ledger's laws, counts made anew from the blocks."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from corpora.blocks import Blocks
from corpora.documents import content_hash, read_table
from corpora.errors import InputError, PilelineError
from corpora.files import sha256_file
from corpora.ledger import broken_laws
from corpora.pack import Numbers
from corpora.prepare import block_files, read_manifest, tokenizer_of
from corpora.read import Lines, open_bytes, suffix_of
from corpora.receipts import RECEIPT, read_receipt
from corpora.tokenizer import Tokenizer

SAMPLE = 64  # documents of a part that are decoded, unless all are


def manifests(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the path and content of every manifest under a folder, sorted.  Raises InputError for none."""
    found = manifest_paths(folder)
    if not found:
        raise InputError(f"{folder}: no manifest.json under it, so no shard is prepared there")
    return [(path, read_manifest(path)) for path in found]


def manifest_paths(folder: Path) -> list[Path]:
    """Return the paths of all manifests of shards under a folder, sorted; trained tokenizers have others."""
    return sorted(path for path in folder.rglob("manifest.json") if path.parent.parent.name != "tokenizers")


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


def faults(path: Path, deep: bool = False) -> Iterator[str]:
    """Yield every fault of a prepared shard, given its manifest's path; each in one line.

    Hashes, laws, rows, segments and counts are made anew; a sample of the documents, or all with `deep`, is
    decoded and compared with the hash of its cleaned text; with `deep` encoded again, too.
    """
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
            yield (
                f"{file}: sha256 is {got}, the manifest says {output['sha256']}; delete it and prepare the shard again"
            )
            damaged = True
    yield from (f"{path}: {law}" for law in broken_laws(manifest["ledger"]))
    if not damaged:
        yield from (f"{path.parent}: {fault}" for fault in _recount(path, manifest, deep))


@dataclass
class _Counts:
    rows: int = 0
    tokens: int = 0
    largest: int = 0
    documents: int = 0
    specials: Counter[int] = field(default_factory=Counter)
    subsets: dict[str, Counter[str]] = field(default_factory=dict)


def _recount(path: Path, manifest: dict[str, Any], deep: bool) -> Iterator[str]:
    """Count everything anew in the files of all parts, and hold it against the ledger."""
    ledger, made = manifest["ledger"], manifest["made_from"]["tokenizer"]
    try:
        encoder = tokenizer_of(path, manifest)
    except PilelineError as error:  # no vocabulary here: all else can still be checked
        yield f"its text cannot be decoded: {error}"
        encoder = None
    counts = _Counts()
    lines = 0
    yield from _strangers(path, manifest)
    quarantined: Counter[str] = Counter()
    for part in manifest["parts"]:
        if part["first"] != lines + 1:
            yield f"part {part['part']} begins with line {part['first']}, the parts before it have {lines}"
        lines += part["count"]
        yield from (f"part {part['part']}: {fault}" for fault in _count_quarantine(path, part, quarantined))
        yield from (
            f"part {part['part']}: {fault}"
            for fault in _check_part(path, manifest, part, counts, encoder, deep)
        )
    tokens = ledger["text_tokens"] + ledger["special_tokens"]
    for what, got, wanted in (
        ("lines in its parts", lines, ledger["lines"]),
        ("rows", counts.rows, ledger["blocks"]),
        ("tokens", counts.tokens, tokens),
        ("documents", counts.documents, ledger["kept"]),
    ):
        if got != wanted:
            yield f"{got} {what}, the ledger says {wanted}"
    if counts.largest >= made["vocab_size"]:
        yield f"id {counts.largest} is outside the tokenizer's {made['vocab_size']} ids"
    for special in {made["bos"], made["eos"]} - {None}:
        ends = (made["bos"], made["eos"]).count(special)
        if counts.specials[special] != ends * ledger["kept"]:
            yield (
                f"special id {special} occurs {counts.specials[special]} times, {ledger['kept']} documents want "
                f"{ends * ledger['kept']}"
            )
    if quarantined != Counter(ledger["quarantined"]):
        yield f"the quarantine holds {dict(quarantined)}, the ledger says {ledger['quarantined']}"
    for name in {*counts.subsets, *(n for n, subset in ledger["subsets"].items() if subset["documents"])}:
        found, told = counts.subsets.get(name, Counter()), ledger["subsets"].get(name, {})
        for key in ("documents", "bytes", "tokens", "duplicates"):
            if found[key] != told.get(key, 0):
                yield f"{name}: {found[key]} {key}, the ledger says {told.get(key, 0)}"


def _strangers(path: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Yield block files that the manifest does not name, and files that it should name."""
    for file in sorted([*path.parent.glob("part-*.arrow"), *path.parent.glob("part-*.parquet")]):
        if file.name not in manifest["outputs"]:
            yield f"{file.name} is not in the manifest, but would be read with the others; delete it"
    for part in manifest["parts"]:
        documents = f"documents-{part['part']:05}.arrow"
        if part["blocks"] and documents not in manifest["outputs"]:
            yield f"{documents} is not in the manifest; prepare the shard again"


def _count_quarantine(path: Path, part: dict[str, Any], quarantined: Counter[str]) -> Iterator[str]:
    """Count a part's quarantined lines by reason, and compare the index with the lines that are there."""
    index = path.parent / f"quarantine-{part['part']:05}.index.jsonl"
    if not index.is_file():
        return
    told = [json.loads(line) for line in index.read_bytes().splitlines()]
    quarantined.update(one["reason"] for one in told)
    with open_bytes(path.parent / f"quarantine-{part['part']:05}.jsonl.zst") as file:
        rows = sum(1 for _ in Lines(file, 1 << 20))
    if rows != sum(one["row"] is not None for one in told):
        yield f"the quarantine has {rows} lines, its index says otherwise"


def _check_part(
    path: Path,
    manifest: dict[str, Any],
    part: dict[str, Any],
    counts: _Counts,
    encoder: Tokenizer | None,
    deep: bool,
) -> Iterator[str]:
    """Check one part's rows, segments and documents, and add up what they hold."""
    made = manifest["made_from"]["tokenizer"]
    own = [name for name in block_files(manifest) if Path(name).stem == f"part-{part['part']:05}"]
    if not part["blocks"]:
        return
    if not own:
        yield "its block file is not in the manifest; prepare the shard again"
        return
    blocks = Blocks([path.parent / own[0]])
    if blocks.metadata | {"padding": None} != {
        **manifest["made_from"],
        "part": part["part"],
        "padding": None,
    }:
        yield "its blocks say that they were made from something else than the manifest does"
    table = read_table(path.parent / f"documents-{part['part']:05}.arrow")
    ids, tokens = blocks.rows(range(len(blocks)))
    real = np.arange(blocks.length) < tokens[:, None]
    counts.rows += len(blocks)
    counts.tokens += int(tokens.sum())
    counts.documents += len(table)
    counts.largest = max(counts.largest, int(ids.max()))
    for special in {made["bos"], made["eos"]} - {None}:
        counts.specials[special] += int(((ids == special) & real).sum())
    subsets = table["subset"].to_pylist()
    for subset, size, count, twice in zip(
        subsets, *(table[key].to_pylist() for key in ("bytes", "tokens", "duplicate")), strict=True
    ):
        counts.subsets.setdefault(subset, Counter()).update(
            documents=1, bytes=size, tokens=count, duplicates=twice
        )

    pieces = _segments(blocks)
    sums = np.bincount(pieces.row, pieces.length, len(blocks))
    if (sums != tokens).any():
        yield f"the segments of row {int(np.flatnonzero(sums != tokens)[0])} do not add up to its tokens"
        return
    order = np.lexsort((pieces.offset, pieces.document))
    document, offset, length = pieces.document[order], pieces.offset[order], pieces.length[order]
    specials = (made["bos"] is not None) + (made["eos"] is not None)
    wanted = table["tokens"].to_numpy().astype(np.int64) + specials
    starts = np.cumsum([0, *wanted])
    if (
        not np.array_equal(np.unique(document), np.arange(len(table)))
        or not np.array_equal(starts[document] + offset, np.cumsum(length) - length)
        or int(length.sum()) != int(wanted.sum())
    ):
        yield "the segments do not hold every document once, from its first id to its last"
        return
    line = table["line"].to_numpy()
    rising = (line[1:] > line[:-1]).all()  # not np.diff: of unsigned numbers it is never below 0
    if not (part["first"] <= line[0] and line[-1] < part["first"] + part["count"] and rising):
        yield "its documents are not of the lines that the manifest says"
    if not np.array_equal(line[pieces.document], pieces.line):
        yield "the lines of the segments are not those of the documents file"
    if encoder is None or int(ids.max()) >= encoder.vocab_size:
        return
    flat = ids.reshape(-1)
    first = np.searchsorted(document, np.arange(len(table) + 1))
    places = (pieces.row * blocks.length + pieces.start)[order]
    step = 1 if deep else max(1, len(table) // SAMPLE)
    hashes = table["xxh3_128"]
    exact = table["exact"].to_numpy()
    for number in (n for n in range(0, len(table), step) if exact[n]):
        its = range(first[number], first[number + 1])
        whole = np.concatenate([flat[places[n] : places[n] + length[n]] for n in its])
        text = whole[made["bos"] is not None : len(whole) - (made["eos"] is not None)]
        decoded = encoder.decode_bytes(text.tolist())
        if content_hash(decoded) != hashes[number].as_py():
            yield f"document {number} (line {line[number]}) does not decode to the text that was cleaned"
        elif deep and not np.array_equal(encoder.encode(decoded.decode()), text):
            yield f"document {number} (line {line[number]}) has other ids than {encoder.library} gives"


@dataclass(frozen=True)
class _Segments:
    """All segments of a file: their rows, where in the row they start, and their columns."""

    row: Numbers
    start: Numbers
    document: Numbers
    line: npt.NDArray[np.uint64]
    offset: Numbers
    length: Numbers


def _segments(blocks: Blocks) -> _Segments:
    rows, found = [], []
    first = 0
    for batch in blocks.batches():
        column = batch.column("segments")
        counts = np.diff(column.offsets.to_numpy())
        rows.append(first + np.repeat(np.arange(batch.num_rows), counts))
        found.append(column.flatten())
        first += batch.num_rows
    columns = {
        name: np.concatenate([pieces.field(name).to_numpy() for pieces in found])
        for name in ("document", "line", "offset", "length")
    }
    row = np.concatenate(rows)
    length = columns["length"].astype(np.int64)
    ends = np.cumsum(length)
    begins = np.flatnonzero(np.r_[True, row[1:] != row[:-1]])
    of_row = np.cumsum(np.r_[True, row[1:] != row[:-1]]) - 1
    start = (ends - length) - (ends - length)[begins][of_row]
    return _Segments(
        row,
        start,
        columns["document"].astype(np.int64),
        columns["line"],
        columns["offset"].astype(np.int64),
        length,
    )
