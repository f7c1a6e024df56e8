"""From any block back to where it came from: documents, shard, line, text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corpora.blocks import Blocks
from corpora.documents import read_table
from corpora.errors import InputError
from corpora.prepare import block_files, tokenizer_of


def explain(found: list[tuple[Path, dict[str, Any]]], block: int, characters: int) -> Iterator[str]:
    """Yield lines that say what block number `block` is made of; the blocks of these manifests are counted in order.

    Of each document's text in it, `characters` are shown from the beginning and from the end.  Raises InputError
    for a number that is out of range.
    """
    owner = {
        path.parent / name: (path, manifest) for path, manifest in found for name in block_files(manifest)
    }
    blocks = Blocks(list(owner))
    if not 0 <= block < len(blocks):
        raise InputError(f"block {block}: there are {len(blocks):,} here, numbered from 0")
    file, row, columns = blocks.where(block)
    path, manifest = owner[file]
    encoder = tokenizer_of(path, manifest)
    made = manifest["made_from"]
    table = read_table(file.with_name(f"documents-{file.stem.removeprefix('part-')}.arrow"))
    yield f"block {block:,}: row {row:,} of {file}"
    yield f"{columns['tokens']:,} ids and {blocks.length - columns['tokens']:,} of padding"
    yield f"shard {columns['shard']} of {made['input']['corpus']}, sha256 {made['input']['sha256']}"
    start = 0
    for piece in columns["segments"]:
        one = {
            name: table[name][piece["document"]].as_py()
            for name in ("offset", "size", "tokens", "subset", "bytes")
        }
        ids = columns["input_ids"][start : start + piece["length"]]
        text = encoder.decode([i for i in ids if i not in (encoder.bos, encoder.eos)])
        whole = one["tokens"] + encoder.specials_per_document
        last = piece["offset"] + piece["length"]
        yield ""
        yield (
            f"ids {start:,} to {start + piece['length'] - 1:,}: document {piece['document']:,} of its part, "
            f"{one['subset']}, line {piece['line']:,} (byte {one['offset']:,}, {one['size']:,} bytes)"
        )
        yield f"  ids {piece['offset']:,} to {last - 1:,} of its {whole:,}; {one['bytes']:,} bytes of cleaned text"
        shown = text if len(text) <= 2 * characters else f"{text[:characters]} [...] {text[-characters:]}"
        yield from (f"  | {line}" for line in shown.split("\n"))
        start += piece["length"]
