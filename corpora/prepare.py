"""One shard to blocks: its parts, one file each, and the manifest that says they are done.

The manifest is written last and is the only record of done.  It holds what the blocks were made from (input,
settings, tokenizer, version of this step): the same again is skipped, anything else is made anew, in a folder
of its own.  The bytes are a function of these four and of nothing else.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corpora import blocks, tokenizer
from corpora.clean import Cleaner
from corpora.documents import Outputs
from corpora.errors import InputError
from corpora.fetch import verified
from corpora.files import read_json, sha256_file, sha256_json, write_aside, write_json
from corpora.formats import read_shard
from corpora.ledger import Ledger, broken_laws, check_laws, total
from corpora.make_part import Job, is_whole, read_document
from corpora.pack import packer
from corpora.read import BadRecord, suffix_of
from corpora.settings import DataSettings, Tokenizer
from corpora.workers import ALWAYS_LET_PASS, make_parts, too_many_bad

PREPARE_VERSION = "prepare/2"  # raise it with any change that alters the blocks of the same input
MODEL = "tokenizer.model"  # a SentencePiece model beside the blocks


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
    return {
        "clean": Cleaner(settings.clean).made(),
        "tokenizer": {
            "kind": settings.tokenizer.kind,
            "name": settings.tokenizer.name or settings.tokenizer.kind,
            "sha256": encoder.fingerprint,
            "vocab_size": encoder.vocab_size,
            "bos": encoder.bos,
            "eos": encoder.eos,
        },
        "blocks": settings.blocks.model_dump(mode="json"),
        "packer": packer(settings.blocks, "uint32", 0).version,
        "records": {
            name: getattr(corpus, name)
            for name in ("text_field", "subset_field", "sample_by", "max_record_bytes")
        },
        "step": PREPARE_VERSION,
    }


def key_folder(settings: DataSettings, data: Path, made: dict[str, Any]) -> Path:
    """Return the folder of all blocks that are made alike: its name is a key of everything in `made`."""
    key = f"{made['tokenizer']['name']}-{settings.blocks.length}-{sha256_json(made)[:8]}"
    return data / settings.corpus.name / "blocks" / key


def prepare(
    settings: DataSettings,
    shard: str,
    data: Path,
    progress: Callable[[int], None] | None = None,
    workers: int = 1,
) -> Prepared:
    """Make the blocks of a fetched shard, or find them made, with up to `workers` processes.

    `progress` is told the compressed bytes read.  Raises InputError for a shard that is not fetched, cut
    short or damaged, that holds no document, or too much that is none.
    """
    receipt = verified(settings.corpus, shard, data)
    path = data / receipt.path
    encoder = tokenizer.for_recipe(settings, data)
    made = made_with(settings, encoder)
    alike = key_folder(settings, data, made)
    folder = alike / shard
    made["input"] = {"corpus": settings.corpus.name, "shard": shard, "sha256": receipt.sha256}
    made["input"]["format"] = suffix_of(path.name)  # the same bytes under another name are read otherwise

    manifest_path = folder / "manifest.json"
    job = Job(settings, path, folder, made, data)
    if manifest_path.exists():
        manifest = read_manifest(manifest_path)
        if manifest["made_from"] == made and is_whole(folder, manifest["outputs"]):
            _check_quarantine(job, manifest["ledger"])
            return Prepared(manifest_path, manifest, skipped=True)
        manifest_path.unlink(missing_ok=True)

    records = make_parts(job, encoder, workers, progress or (lambda _: None))
    empty = [Ledger(settings.blocks.length).as_dict()]
    ledger = total([record["ledger"] for record in records] or empty)
    if not ledger["kept"]:
        raise InputError(_nothing_kept(path, ledger))
    _check_quarantine(job, ledger)
    outputs: Outputs = {}
    for record in records:
        outputs |= record["outputs"]
    manifest = {
        "made_from": made,
        "ledger": ledger,
        "outputs": outputs,
        "parts": [
            {"part": record["part"], **record["lines"], "blocks": record["ledger"]["blocks"]}
            for record in records
        ],
        "engines": dict(Counter(record["engine"] for record in records)),
    }
    check_laws(ledger, str(folder))
    keep_model(encoder, alike)
    _remove_others(folder, records, outputs)
    write_json(manifest_path, manifest)
    return Prepared(manifest_path, manifest, skipped=False)


def _check_quarantine(job: Job, ledger: dict[str, Any]) -> None:
    limit = job.settings.clean.quarantine_limit * ledger["lines"]
    if sum(ledger["quarantined"].values()) > max(ALWAYS_LET_PASS, limit):
        raise InputError(too_many_bad(job, ledger, "the whole shard"))


def beside(done: Prepared) -> Path:
    """Return the folder of all blocks that were made alike, this shard's among them."""
    return done.manifest_path.parents[len(Path(done.manifest["made_from"]["input"]["shard"]).parts)]


def tokenizer_of(manifest_path: Path, manifest: dict[str, Any]) -> tokenizer.Tokenizer:
    """Return the tokenizer that a prepared shard was made with, by what lies beside its blocks.

    Raises InputError where that is another one now, Unavailable where its vocabulary is not on this machine.
    """
    made = manifest["made_from"]["tokenizer"]
    folder = beside(Prepared(manifest_path, manifest, skipped=True))
    wanted = Tokenizer(
        kind=made["kind"],
        name=made["name"] if made["kind"] == "tiktoken" else None,
        model=folder / MODEL if made["kind"] == "sentencepiece" else None,
        bos=made["bos"],
        eos=made["eos"],
    )
    encoder = tokenizer.load(wanted)
    if encoder.fingerprint != made["sha256"]:
        raise InputError(
            f"{manifest_path}: made with another {made['name']} tokenizer (fingerprint {made['sha256'][:8]}) than "
            f"there is now ({encoder.fingerprint[:8]}); put the old vocabulary back, or prepare the shard again"
        )
    return encoder


def keep_model(encoder: tokenizer.Tokenizer, folder: Path) -> None:
    """Lay a SentencePiece model into a folder beside what it made: blocks or a run, which it has to go with."""
    if isinstance(encoder, tokenizer.SentencePieceTokenizer):
        kept = folder / MODEL
        if not kept.is_file() or sha256_file(kept) != sha256_file(encoder.path):
            with write_aside(kept) as aside:
                shutil.copyfile(encoder.path, aside)


def _remove_others(folder: Path, records: list[dict[str, Any]], outputs: Outputs) -> None:
    """Remove what an earlier input left in the folder."""
    own = {"manifest.json", *outputs, *(f"part-{record['part']:05}.json" for record in records)}
    for path in folder.iterdir():
        if path.is_file() and path.name not in own and not path.name.startswith("."):
            path.unlink()


def documents(settings: DataSettings, shard: str, data: Path) -> Iterator[Document]:
    """Yield a fetched shard's documents, cleaned and encoded as for the blocks (duplicates are not looked for)."""
    path = data / verified(settings.corpus, shard, data).path
    encoder, cleaner = tokenizer.for_recipe(settings, data), Cleaner(settings.clean)
    for line in read_shard(path, settings.corpus):
        try:
            read = read_document(line, settings.corpus, cleaner)
            if read is None or read.cleaned.dropped:
                continue
            text = read.cleaned.text
            yield Document(line.number, read.subset, text, encoder.encode_document(text))
        except (BadRecord, tokenizer.Unencodable):
            continue


def find_manifest(
    settings: DataSettings, shard: str, data: Path, made: dict[str, Any] | None = None
) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the manifest of a prepared shard.  Raises InputError when it is not prepared.

    `made` is what `made_with` gave, for a caller who asks for many.
    """
    made = made or made_with(settings, tokenizer.for_recipe(settings, data))
    folder = key_folder(settings, data, made) / shard
    if not (folder / "manifest.json").exists():
        raise InputError(
            f"shard {shard} of {settings.corpus.name} is not prepared with these settings "
            f"(no {folder / 'manifest.json'}); run: python -m corpora prepare RECIPE --shard {shard}"
        )
    manifest = read_manifest(folder / "manifest.json")
    if not is_whole(folder, manifest["outputs"]):
        raise InputError(
            f"{folder}: a block file is missing or has another size; prepare shard {shard} again"
        )
    return folder, manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a prepared shard's manifest.  Raises InputError for one that is missing, torn or none of ours."""
    manifest = read_json(path)
    try:
        step = manifest["made_from"]["step"]
        sound = (
            isinstance(broken_laws(manifest["ledger"]), list)
            and all({"size", "sha256"} <= output.keys() for output in manifest["outputs"].values())
            and all(
                {"part", "first", "count", "from", "to", "blocks"} <= part.keys()
                for part in manifest["parts"]
            )
            and {"input", "tokenizer", "blocks"} <= manifest["made_from"].keys()
        )
    except (KeyError, TypeError, AttributeError):
        step, sound = None, False
    if isinstance(step, str) and step != PREPARE_VERSION:
        raise InputError(
            f"{path}: made by {step}, this is {PREPARE_VERSION}; prepare the shard again, and delete the old folder"
        )
    if not sound:
        raise InputError(
            f"{path}: is not the manifest of a prepared shard; delete it and prepare the shard again"
        )
    return dict(manifest)


def open_blocks(settings: DataSettings, shards: Sequence[str], data: Path) -> blocks.Blocks:
    """Open the blocks of prepared shards as one sequence.  Raises InputError when one is not prepared."""
    files = [
        folder / name for folder, manifest in _found(settings, shards, data) for name in block_files(manifest)
    ]
    return blocks.Blocks(files)


def blocks_fingerprint(settings: DataSettings, shards: Sequence[str], data: Path) -> str:
    """Return the sha256 over the block files' hashes of these shards, in this order."""
    found = _found(settings, shards, data)
    return sha256_json([m["outputs"][name]["sha256"] for _, m in found for name in block_files(m)])


def _found(settings: DataSettings, shards: Sequence[str], data: Path) -> list[tuple[Path, dict[str, Any]]]:
    made = made_with(settings, tokenizer.for_recipe(settings, data))
    return [find_manifest(settings, shard, data, made) for shard in shards]


def block_files(manifest: dict[str, Any]) -> list[str]:
    """Return the names of a manifest's block files, in order."""
    return sorted(name for name in manifest["outputs"] if name.startswith("part-"))


def _nothing_kept(path: Path, ledger: dict[str, Any]) -> str:
    found = Counter(ledger["quarantined"]) + Counter(ledger["dropped"])
    reasons = ", ".join(f"{count} {reason}" for reason, count in found.most_common(3))
    why = f"{ledger['lines']} lines: {reasons}" if ledger["lines"] else "it has no lines"
    return f"{path}: no document to keep ({why}); do text_field and sample_by in [corpus] fit it?"
