"""The dataset card: a README.md beside the blocks, for people, for the Hugging Face hub and for `datasets`.

Its front matter names each split's block files, so `datasets.load_dataset(FOLDER)` finds these and none of the
other files beside them.  Its figures are those of the manifests, added up: the same manifests give the same
bytes.
"""

import fcntl
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from corpora.errors import InputError
from corpora.files import write_aside
from corpora.ledger import total
from corpora.prepare import block_files, read_manifest
from corpora.settings import DataSettings

NAME = "README.md"
SUBSETS = 100  # rows of their table: a subset_field that holds something else could give a million
CHARACTERS = 100  # of a subset's name, for the same reason
_SIZES = (
    "n<1K",
    "1K<n<10K",
    "10K<n<100K",
    "100K<n<1M",
    "1M<n<10M",
    "10M<n<100M",
    "100M<n<1B",
    "1B<n<10B",
    "10B<n<100B",
    "100B<n<1T",
    "n>1T",
)

_CARD = """\
---
{front}
---

<!-- Written by Pileline from the manifests of the shards, and again with each shard: what you change here is lost. -->

# {title}

Texts of the corpus {corpus}, cleaned, tokenized and packed into rows of {length:,} token ids, to train a language
model on. Their licence is that of the corpus, which this card does not know: see there.

{made}

## Loading

```python
import datasets

blocks = datasets.load_dataset("FOLDER")  # where this file lies, or its name on the hub
row = blocks["{split}"][0]
print(row["input_ids"][: row["tokens"]])
```

`load_dataset` makes a copy in its cache; with `streaming=True` it does not.

## Columns

| column | type | what it is |
|---|---|---|
| `input_ids` | {length:,} ids | the block: pieces of documents, then padding |
| `tokens` | integer | how many of these ids are real; the rest, at the end, is padding |
| `shard` | string | the shard that its documents come from |
| `segments` | list | the pieces, in order: `document`, its number in `documents-*.arrow`; `line`, that of the shard, \
from 1; `offset`, where in the document's ids the piece begins; `length`, in ids |

## Splits

{splits}

## Account

Every line that was read has one end, and every token of what was kept is in a block:

- {lines:,} lines = {kept:,} kept + {dropped:,} dropped + {quarantined:,} quarantined
- {tokens:,} tokens = {blocks:,} blocks x {length:,} - {padding:,} padding ({text_tokens:,} of text, \
{special_tokens:,} BOS and EOS)

Documents equal to an earlier one of their part of the shard: {equal}.

{rules}

## Subsets

Bytes are of the cleaned text in UTF-8, tokens without BOS and EOS.

{subsets}

## Provenance

`python -m corpora explain FOLDER BLOCK` tells which documents a block is made of, by shard and line, and shows their
text. Beside the blocks of a shard lie `manifest.json`, with all that decided them and their sha256;
`documents-*.arrow`, with a row for each document; and, where there are any, `quarantine-*.jsonl.zst`, the lines that
could not be used, as they came. The shards read:

{inputs}
"""


def update(settings: DataSettings, folder: Path) -> Path | None:
    """Write the card of the recipe's shards that are prepared in a folder of blocks; return it, if there are any.

    Two processes may finish shards at the same time: each reads the manifests under the lock and after its own
    manifest was written, so the later one sees both.
    """
    with (folder / f".{NAME}.lock").open("w") as lock:
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        manifests = {}
        for shard in settings.corpus.shards:
            with suppress(InputError):  # not prepared; or damaged, which `verify` tells
                manifests[shard] = read_manifest(folder / shard / "manifest.json")
        return write(settings, folder, manifests) if manifests else None


def write(settings: DataSettings, folder: Path, manifests: dict[str, dict[str, Any]]) -> Path:
    """Write the card of these shards, unless it is there already; return its path."""
    path, card = folder / NAME, text(settings, manifests).encode()
    if not path.is_file() or path.read_bytes() != card:
        with write_aside(path) as aside:
            aside.write_bytes(card)
    return path


def text(settings: DataSettings, manifests: dict[str, dict[str, Any]]) -> str:
    """Return the card of shards, given by name with their manifests; shards not of the recipe are left out."""
    corpus = settings.corpus
    shards = {
        split: [shard for shard in names if shard in manifests]
        for split, names in (("train", corpus.train), ("validation", corpus.val), ("test", corpus.test))
    }
    shards = {split: names for split, names in shards.items() if names}
    ledgers = {split: total([manifests[name]["ledger"] for name in names]) for split, names in shards.items()}
    ledger = total(list(ledgers.values()))
    made = manifests[next(iter(shards.values()))[0]]["made_from"]
    title = f"{corpus.name} in blocks of {ledger['length']:,} {made['tokenizer']['name']} tokens"
    subsets = ("subset", "cleaned as", "documents", "bytes", "tokens", "bytes per token")
    fields = ledger | {
        "front": _front(title, ledger["blocks"], shards, manifests),
        "title": _plain(title),
        "corpus": _plain(corpus.name),
        "made": _table(("made with", ""), _made(made)),
        "split": next(iter(shards)),
        "splits": _table(
            ("split", "shards", "documents", "blocks", "tokens"),
            [
                (split, len(shards[split]), one["kept"], one["blocks"], _tokens(one))
                for split, one in ledgers.items()
            ],
        ),
        "dropped": sum(ledger["dropped"].values()),
        "quarantined": sum(ledger["quarantined"].values()),
        "tokens": _tokens(ledger),
        "equal": {"off": "not looked for", "tag": f"{ledger['duplicates']:,}, kept and marked"}.get(
            made["clean"]["duplicates"], "dropped"
        ),
        "rules": _table(("rule", "effect", "lines", "bytes of text before", "after"), _rules(ledger)),
        "subsets": _table(subsets, _subsets(ledger)),
        "inputs": _table(
            ("shard", "split", "sha256"),
            [
                (name, split, manifests[name]["made_from"]["input"]["sha256"])
                for split, names in shards.items()
                for name in names
            ],
        ),
    }
    return _CARD.format(**fields)


def _front(title: str, rows: int, shards: dict[str, list[str]], manifests: dict[str, dict[str, Any]]) -> str:
    """Write what programs read, as YAML."""
    lines = [
        f"pretty_name: {_quoted(title)}",
        "license: other",
        "task_categories: [text-generation]",
        "tags: [tokenized, packed, pileline]",
        f"size_categories: [{_quoted(_size(rows))}]",
        "configs:",
        "- config_name: default",
        "  data_files:",
    ]
    for split, names in shards.items():
        lines += [f"  - split: {split}", "    path:"]
        for name in names:
            kinds = {Path(file).suffix for file in block_files(manifests[name])}
            lines += [f"    - {_quoted(f'{name}/part-*{kind}')}" for kind in sorted(kinds)]
    return "\n".join(lines)


def _made(made: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Say what the blocks were made with, a row for each."""
    tokenizer, clean = made["tokenizer"], made["clean"]
    special = {key: "none" if tokenizer[key] is None else f"id {tokenizer[key]}" for key in ("bos", "eos")}
    where = " (tokenizer.model, beside this file)" if tokenizer.get("kind") == "sentencepiece" else ""
    return [
        ("tokenizer", f"{tokenizer['name']}, {tokenizer['vocab_size']:,} ids{where}"),
        ("sha256 of the tokenizer", tokenizer["sha256"]),
        ("BOS, before each document", special["bos"]),
        ("EOS, after each document", special["eos"]),
        ("block length", made["blocks"]["length"]),
        ("packer", made["packer"]),
        *(
            (f"cleaning profile {profile}", ", ".join(rules) or "no rules")
            for profile, rules in sorted(clean.get("profiles", {}).items())
        ),
        ("characters of a document, at least", clean["min_chars"]),
    ]


def _rules(ledger: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Say what each rule did to how many lines, and to the bytes of their text, as far as it was known."""
    rows: list[tuple[Any, ...]] = []
    for key, effect in (("cleaned", "changed"), ("dropped", "dropped"), ("quarantined", "quarantined")):
        for rule, count in sorted(ledger[key].items()):
            name = "rules" if key == "cleaned" else key
            each = [counts.get(name, {}).get(rule, {}) for counts in ledger["subsets"].values()]
            before = sum(one.get("before", one.get("bytes", 0)) for one in each)
            after = sum(one.get("after", 0) for one in each)
            rows.append((rule, effect, count, before, after))
    return rows


def _subsets(ledger: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Count each subset, the largest first, and all of them."""
    ordered = sorted(ledger["subsets"].items(), key=lambda item: (-item[1]["bytes"], item[0]))
    rows = [
        (name if len(name) <= CHARACTERS else f"{name[:CHARACTERS]}…", counts.get("profile", ""), [counts])
        for name, counts in ordered[:SUBSETS]
    ]
    if rest := [counts for _, counts in ordered[SUBSETS:]]:
        rows.append((f"{len(rest):,} more", "", rest))
    rows.append(("all", "", [counts for _, counts in ordered]))
    table: list[tuple[Any, ...]] = []
    for name, profile, counts in rows:
        documents, size, tokens = (
            sum(one[key] for one in counts) for key in ("documents", "bytes", "tokens")
        )
        table.append((name, profile, documents, size, tokens, f"{size / max(1, tokens):.2f}"))
    return table


def _tokens(ledger: dict[str, Any]) -> int:
    return int(ledger["text_tokens"] + ledger["special_tokens"])


def _size(rows: int) -> str:
    """Return the hub's word for so many rows."""
    thousands = max(0, len(str(rows)) - 3)  # 999 is n<1K, 1000 is 1K<n<10K
    return _SIZES[min(thousands, len(_SIZES) - 1)]


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """Write a Markdown table; numbers stand on the right."""
    rows = list(rows)
    numbers = [bool(rows) and all(isinstance(row[n], int) for row in rows) for n in range(len(head))]
    lines = [head, tuple("---:" if number else "---" for number in numbers)]
    lines += [tuple(f"{cell:,}" if isinstance(cell, int) else _plain(cell) for cell in row) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(words: str) -> str:
    """Escape a text so that Markdown and HTML take it as it is, on one line, and in a table's cell."""
    words = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)
    return re.sub(r"([\\`*_\[\]<>|~&$])", r"\\\1", words)


def _quoted(words: str) -> str:
    """Return a text as a YAML scalar: a JSON string, but with YAML's own escape for what is not ASCII.

    (JSON writes an emoji as two surrogates, which YAML takes for two characters.)
    """
    return re.sub("[^ -~]", lambda c: f"\\U{ord(c[0]):08x}", json.dumps(words, ensure_ascii=False))
