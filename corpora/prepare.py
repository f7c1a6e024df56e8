"""One shard to blocks, in one streamed pass: read, clean, encode, pack, write, account.

The manifest is written last and is the only record of done.  It holds what the blocks were made from (input,
settings, tokenizer, version of this step): the same again is skipped, anything else is made anew, in a folder
of its own.  The bytes are a function of these four and of nothing else.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from corpora import blocks, tokenizer
from corpora.clean import clean
from corpora.errors import InputError
from corpora.fetch import verified
from corpora.files import read_json, sha256_file, sha256_json, write_aside, write_json
from corpora.formats import read_shard
from corpora.ledger import Ledger, check_laws
from corpora.pack import PACKER, ConcatPacker, Rows
from corpora.read import BadRecord, Line, parse_record, suffix_of
from corpora.settings import DataSettings

PREPARE_VERSION = "prepare/1"  # raise it with any change that alters the blocks of the same input


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """A cleaned and encoded document.  `ids` includes BOS and EOS as declared."""

    line: int  # in its shard, from 1
    subset: str
    text: str
    ids: tokenizer.Ids


@dataclass(frozen=True)
class Prepared:
    """A shard's blocks; `skipped` when they were there already."""

    manifest_path: Path
    manifest: dict[str, Any] = field(repr=False)
    skipped: bool


def made_with(settings: DataSettings, encoder: tokenizer.Tokenizer) -> dict[str, Any]:
    """Return what decides the blocks of a given input: settings, tokenizer and step version, as JSON."""
    corpus = settings.corpus
    fields = [corpus.text_field, corpus.subset_field]
    if corpus.sample_by != "document":  # the default is left out, as it was before there was a choice
        fields.append(corpus.sample_by)
    return {
        "clean": settings.clean.model_dump(mode="json"),
        "tokenizer": {
            "name": settings.tokenizer.name or settings.tokenizer.kind,
            "sha256": encoder.fingerprint,
            "vocab_size": encoder.vocab_size,
            "bos": encoder.bos,
            "eos": encoder.eos,
        },
        "blocks": settings.blocks.model_dump(mode="json"),
        "fields": fields,
        "packer": PACKER,
        "step": PREPARE_VERSION,
    }


def shard_folder(settings: DataSettings, shard: str, data: Path, made: dict[str, Any]) -> Path:
    """Return the folder of a shard's blocks; its middle part is a key of everything in `made`."""
    key = f"{made['tokenizer']['name']}-{settings.blocks.length}-{sha256_json(made)[:8]}"
    return data / settings.corpus.name / "blocks" / key / shard


def prepare(
    settings: DataSettings, shard: str, data: Path, progress: Callable[[int], None] | None = None
) -> Prepared:
    """Make the blocks of a fetched shard, or find them made.

    `progress` is told the compressed bytes read.  Raises InputError for a shard that is not fetched, cut
    short or damaged, or that holds no document.
    """
    receipt = verified(settings.corpus, shard, data)
    path = data / receipt.path
    encoder = tokenizer.load(settings.tokenizer)
    made = made_with(settings, encoder)
    folder = shard_folder(settings, shard, data, made)
    made["input"] = {"corpus": settings.corpus.name, "shard": shard, "sha256": receipt.sha256}
    if (
        suffix := suffix_of(path.name)
    ) != ".jsonl.zst":  # the same bytes under another name are read otherwise
        made["input"]["format"] = suffix

    manifest_path = folder / "manifest.json"
    if manifest_path.exists():
        manifest = read_manifest(manifest_path)
        if manifest["made_from"] == made and _whole(folder, manifest):
            return Prepared(manifest_path, manifest, skipped=True)
        manifest_path.unlink()

    ledger = Ledger(settings.blocks.length)
    part = folder / f"part-0000.{settings.blocks.format}"
    quarantine = folder / "quarantine.jsonl"
    with write_aside(part) as part_aside, write_aside(quarantine) as quarantine_aside:
        with quarantine_aside.open("w", encoding="utf-8") as bad:
            documents = _documents(settings, shard, path, encoder, ledger, bad, progress)
            digest = _write_blocks(part_aside, settings, made, documents, encoder, ledger)
        if not ledger.kept:
            raise InputError(_nothing_kept(path, ledger))
        outputs = {
            part.name: {"size": part_aside.stat().st_size, "sha256": digest},
            quarantine.name: {
                "size": quarantine_aside.stat().st_size,
                "sha256": sha256_file(quarantine_aside),
            },
        }
    manifest = {"made_from": made, "ledger": ledger.as_dict(), "outputs": outputs}
    check_laws(manifest["ledger"], str(folder))
    write_json(manifest_path, manifest)
    return Prepared(manifest_path, read_json(manifest_path), skipped=False)


def documents(settings: DataSettings, shard: str, data: Path) -> Iterator[Document]:
    """Yield a fetched shard's documents, cleaned and encoded by the code that makes the blocks."""
    path = data / verified(settings.corpus, shard, data).path
    encoder = tokenizer.load(settings.tokenizer)
    yield from _documents(settings, shard, path, encoder, Ledger(settings.blocks.length), None, None)


def find_manifest(
    settings: DataSettings, shard: str, data: Path, made: dict[str, Any] | None = None
) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the manifest of a prepared shard.  Raises InputError when it is not prepared.

    `made` is what `made_with` gave, for a caller who asks for many.
    """
    made = made or made_with(settings, tokenizer.load(settings.tokenizer))
    folder = shard_folder(settings, shard, data, made)
    if not (folder / "manifest.json").exists():
        raise InputError(
            f"shard {shard} of {settings.corpus.name} is not prepared with these settings "
            f"(no {folder / 'manifest.json'}); run: python -m corpora prepare RECIPE --shard {shard}"
        )
    manifest = read_manifest(folder / "manifest.json")
    if not _whole(folder, manifest):
        raise InputError(
            f"{folder}: a block file is missing or has another size; prepare shard {shard} again"
        )
    return folder, manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a prepared shard's manifest.  Raises InputError for one that is missing, torn or none of ours."""
    manifest = read_json(path)
    parts = (
        [manifest.get(key) for key in ("made_from", "ledger", "outputs")]
        if isinstance(manifest, dict)
        else []
    )
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise InputError(
            f"{path}: is not the manifest of a prepared shard; delete it and prepare the shard again"
        )
    return dict(manifest)


def open_blocks(settings: DataSettings, shards: Sequence[str], data: Path) -> blocks.Blocks:
    """Open the blocks of prepared shards as one sequence.  Raises InputError when one is not prepared."""
    files = []
    for shard in shards:
        folder, manifest = find_manifest(settings, shard, data)
        files += [folder / name for name in block_files(manifest)]
    return blocks.Blocks(files)


def blocks_fingerprint(settings: DataSettings, shards: Sequence[str], data: Path) -> str:
    """Return the sha256 over the block files' hashes of these shards, in this order."""
    manifests = [find_manifest(settings, shard, data)[1] for shard in shards]
    return sha256_json([m["outputs"][name]["sha256"] for m in manifests for name in block_files(m)])


def block_files(manifest: dict[str, Any]) -> list[str]:
    """Return the names of a manifest's block files, in order."""
    return sorted(name for name in manifest["outputs"] if name.startswith("part-"))


def _whole(folder: Path, manifest: dict[str, Any]) -> bool:
    """Tell whether every output is there in its size (its hash is for `verify`)."""
    paths = {folder / name: output["size"] for name, output in manifest["outputs"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def _documents(
    settings: DataSettings,
    shard: str,
    path: Path,
    encoder: tokenizer.Tokenizer,
    ledger: Ledger,
    bad: IO[str] | None,
    progress: Callable[[int], None] | None,
) -> Iterator[Document]:
    """Yield the documents to keep and account for every line; write what is quarantined to `bad`."""
    for line in read_shard(path, settings.corpus, progress):
        ledger.lines += 1
        try:
            document = _document(line, settings, encoder, ledger)
        except BadRecord as error:
            ledger.quarantined[str(error)] += 1
            if bad is not None:
                bad.write(_quarantine_line(shard, line, str(error)))
            continue
        if document is not None:
            specials = encoder.specials_per_document
            text_bytes = len(document.text.encode())
            ledger.keep(document.subset, text_bytes, len(document.ids) - specials, specials)
            yield document


def _document(
    line: Line, settings: DataSettings, encoder: tokenizer.Tokenizer, ledger: Ledger
) -> Document | None:
    """Make a line's document, or None for one that a rule drops (counted).  Raises BadRecord."""
    if line.data is None:
        raise BadRecord("line too long")
    content = line.data
    if line.number == 1 and content.startswith(b"\xef\xbb\xbf"):
        content = content[3:]
        ledger.cleaned["byte order mark"] += 1
    if not content.strip():
        ledger.dropped["blank line"] += 1
        return None
    record = parse_record(content, settings.corpus)
    cleaned = clean(record.text, settings.clean)
    ledger.cleaned.update(cleaned.changed)
    if record.repaired:
        ledger.cleaned["lone surrogates"] += 1
    if cleaned.dropped:
        ledger.dropped[cleaned.dropped] += 1
        return None
    return Document(line.number, record.subset, cleaned.text, _encode(cleaned.text, encoder))


def _encode(text: str, encoder: tokenizer.Tokenizer) -> tokenizer.Ids:
    """Encode a document.  Raises BadRecord when the tokenizer cannot."""
    try:
        return encoder.encode_document(text)
    except BaseException as error:
        # A million spaces and then a letter are more than the stack of tiktoken's regex: a ValueError, or on
        # other paths Rust's panic, which is a BaseException.
        if isinstance(error, ValueError) or type(error).__name__ == "PanicException":
            raise BadRecord("tokenizer failed") from None
        raise


def _quarantine_line(shard: str, line: Line, reason: str) -> str:
    where = {"shard": shard, "line": line.number, "offset": line.offset, "bytes": line.size, "reason": reason}
    start = b"" if line.data is None else line.data[:200]
    return json.dumps(where | {"start": start.decode("utf-8", "backslashreplace")}, ensure_ascii=False) + "\n"


def _write_blocks(
    path: Path,
    settings: DataSettings,
    made: dict[str, Any],
    documents: Iterator[Document],
    encoder: tokenizer.Tokenizer,
    ledger: Ledger,
) -> str:
    """Pack documents into a block file; return its sha256."""
    length = settings.blocks.length
    pad = encoder.eos if encoder.eos is not None else encoder.bos or 0
    packer = ConcatPacker(length, encoder.vocab_size, pad)
    schema = blocks.schema(length, packer.buffer.dtype, {**made, "padding": pad})
    writer = blocks.BlockWriter(path, settings.blocks.format, schema)

    def write(rows: Rows) -> None:
        writer.write(rows, np.full(len(rows), length, np.uint32))

    with contextlib.closing(writer.file):
        for document in documents:
            for rows in packer.add(document.ids):
                write(rows)
        rows, ledger.padding = packer.finish()
        if len(rows):
            tokens = np.full(len(rows), length, np.uint32)
            tokens[-1] -= ledger.padding
            writer.write(rows, tokens)
        digest = writer.close()
    ledger.blocks = writer.rows
    return digest


def _nothing_kept(path: Path, ledger: Ledger) -> str:
    reasons = [f"{count} {reason}" for reason, count in (ledger.quarantined + ledger.dropped).most_common(3)]
    why = f"{ledger.lines} lines: {', '.join(reasons)}" if ledger.lines else "it has no lines"
    return f"{path}: no document to keep ({why}); do text_field and sample_by in [corpus] fit it?"
