"""The dataset card: `datasets` finds the block files by it, its figures are the ledger's, no name breaks it."""

import fcntl
import itertools
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from corpora import blocks, card
from corpora.files import write_json
from corpora.ledger import broken_laws
from corpora.pack import Rows
from corpora.prepare import PREPARE_VERSION, beside, prepare
from corpora.settings import DataSettings

Tiny = Callable[..., tuple[DataSettings, Path]]
SETTINGS = DataSettings.model_validate(
    {
        "corpus": {"name": "mine", "train": ["train/0", "more"], "val": ["train/1"], "test": ["exam"]},
        "tokenizer": {"name": "r50k_base", "eos": 9},
        "blocks": {"length": 4},
    }
)


def subset(documents: int, **changes: Any) -> dict[str, Any]:
    """Count documents of 10 bytes and 3 tokens each."""
    counts = {"documents": documents, "bytes": 10 * documents, "tokens": 3 * documents, "duplicates": 0}
    gone = {"rules": {}, "dropped": {}, "quarantined": {}, "profile": "safe", "known": True}
    read = {"read": documents, "bytes_read": 10 * documents}
    return counts | gone | read | changes


def manifest(
    shard: str, subsets: dict[str, Any], name: str = "r50k_base", kind: str = "arrow"
) -> dict[str, Any]:
    """Return the manifest of a shard of such documents, one to a row, each with its EOS."""
    documents = sum(counts["documents"] for counts in subsets.values())
    ledger: dict[str, Any] = {
        "length": 4,
        "lines": documents,
        "kept": documents,
        "dropped": {},
        "quarantined": {},
        "cleaned": {},
        "duplicates": 0,
        "text_tokens": 3 * documents,
        "special_tokens": documents,
        "blocks": documents,
        "padding": 0,
        "subsets": subsets,
    }
    for counts in subsets.values():
        for key, own in (("cleaned", "rules"), ("dropped", "dropped"), ("quarantined", "quarantined")):
            for rule, one in counts[own].items():
                ledger[key][rule] = ledger[key].get(rule, 0) + one["documents"]
                ledger["lines"] += one["documents"] * (key != "cleaned")
    assert broken_laws(ledger) == []
    made = {
        "tokenizer": {
            "kind": "tiktoken",
            "name": name,
            "sha256": "70" * 32,
            "vocab_size": 12345,
            "bos": None,
            "eos": 9,
        },
        "clean": {"profiles": {"safe": ["newlines/2"], "raw": []}, "min_chars": 5, "duplicates": "tag"},
        "blocks": {"length": 4, "format": kind, "packer": "concat"},
        "packer": "concat/2",
        "step": PREPARE_VERSION,
        "input": {"corpus": "mine", "shard": shard, "sha256": shard.encode().hex().ljust(64, "0")},
    }
    outputs = {
        f"part-00000.{kind}": {"size": 1, "sha256": ""},
        "documents-00000.arrow": {"size": 1, "sha256": ""},
    }
    return {"made_from": made, "ledger": ledger, "outputs": outputs, "parts": []}


def front(text: str) -> dict[str, Any]:
    """Parse the front matter as the hub's own library does."""
    return huggingface_hub.DatasetCard(text).data.to_dict()


def tables(text: str) -> list[list[list[str]]]:
    """Render the card and return its tables' cells as they are read."""
    found: list[list[list[str]]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(text.split("\n---\n", 1)[1])
    for opened, token in itertools.pairwise(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif opened.type in ("th_open", "td_open"):
            inside = token.children or []
            assert {child.type for child in inside} <= {"text", "text_special", "code_inline"}, token.content
            found[-1][-1].append("".join(child.content for child in inside))
    return found


def table(text: str, column: str) -> list[list[str]]:
    """Return the rows of the table whose first column is this one."""
    (rows,) = (rows[1:] for rows in tables(text) if rows[0][0] == column)
    return rows


def lay_blocks(folder: Path, manifests: dict[str, Any], kind: str) -> None:
    """Write two parts of blocks and what lies beside them, for each shard; row n of a shard begins with n."""
    for shard, made in manifests.items():
        here = folder / shard
        here.mkdir(parents=True)
        schema = blocks.schema(4, np.dtype(np.uint16), {})
        rows = np.arange(made["ledger"]["blocks"])
        for part, numbers in enumerate(np.array_split(rows, 2)):
            ids = np.stack([numbers, numbers, numbers, numbers], axis=1).astype(np.uint16)
            writer = blocks.BlockWriter(
                here / f"part-{part:05}.{kind}", "arrow" if kind == "arrow" else "parquet", schema
            )
            row = np.arange(len(ids))
            writer.write(Rows(ids, row, row, row * 0, row * 0 + 4), shard, rows.astype(np.uint64) + 1)
            writer.close()
            (here / f"part-{part:05}.json").write_text('{"input_ids": [1, 2, 3, 4], "tokens": 4}')
            (here / f"documents-{part:05}.arrow").write_bytes(b"not a block")
            (here / f"quarantine-{part:05}.jsonl.zst").write_bytes(b"not a block")
        write_json(here / "manifest.json", made)


SHARDS = {
    "train/0": manifest("train/0", {"Github": subset(6)}),
    "more": manifest("more", {"Github": subset(2), "arXiv": subset(3)}),
    "train/1": manifest("train/1", {"Github": subset(4)}),  # its name says train, the recipe says val
    "exam": manifest("exam", {"arXiv": subset(2)}),
}


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_datasets_loads_the_block_files_by_their_splits(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "blocks"
    made = {shard: manifest(shard, one["ledger"]["subsets"], kind=kind) for shard, one in SHARDS.items()}
    lay_blocks(folder, made, kind)
    assert card.update(SETTINGS, folder) == folder / "README.md"
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    rows = {split: [(row["shard"], row["input_ids"][0]) for row in part] for split, part in loaded.items()}
    assert rows == {
        "train": [("train/0", n) for n in range(6)] + [("more", n) for n in range(5)],
        "validation": [("train/1", n) for n in range(4)],
        "test": [("exam", n) for n in range(2)],
    }
    streamed = datasets.load_dataset(str(folder), split="validation", streaming=True)
    assert [row["input_ids"] for row in streamed] == [[n] * 4 for n in range(4)]


def test_a_prepared_corpus_is_loaded_as_its_card_says(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = b"".join(
        json.dumps({"text": f"document {n}\r\n", "meta": {"pile_set_name": "Pile-CC"}}).encode() + b"\n"
        for n in range(100)
    )
    settings, data = tiny(lines + b"no JSON\n", blocks={"part_bytes": 2048})
    shards = [prepare(settings, shard, data) for shard in settings.corpus.shards]
    path = card.update(settings, beside(shards[0]))
    assert path is not None
    assert len(list(path.parent.glob("a/part-*.arrow"))) > 2
    assert list(path.parent.glob("a/quarantine-*"))
    text = path.read_text("utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    told: dict[str, Any] = {}
    exec(code[0].replace("FOLDER", str(path.parent)), told)
    loaded = told["blocks"]
    assert capsys.readouterr().out.splitlines()[-1] == str(loaded["train"][0]["input_ids"])
    assert {split: len(part) for split, part in loaded.items()} == {
        "train": shards[0].manifest["ledger"]["blocks"],
        "validation": shards[1].manifest["ledger"]["blocks"],
    }
    assert loaded["train"].column_names == [row[0] for row in table(text, "column")]
    assert ["newlines", "changed", "100", "1,290", "1,190"] in table(text, "rule")
    assert ["invalid JSON", "quarantined", "1", "0", "0"] in table(text, "rule")
    assert [row[:2] for row in table(text, "shard")] == [["a", "train"], ["v", "validation"]]


def test_front_matter() -> None:
    assert front(card.text(SETTINGS, SHARDS)) == {
        "pretty_name": "mine in blocks of 4 r50k_base tokens",
        "license": "other",
        "task_categories": ["text-generation"],
        "tags": ["tokenized", "packed", "pileline"],
        "size_categories": ["n<1K"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": "train", "path": ["train/0/part-*.arrow", "more/part-*.arrow"]},
                    {"split": "validation", "path": ["train/1/part-*.arrow"]},
                    {"split": "test", "path": ["exam/part-*.arrow"]},
                ],
            }
        ],
    }


def test_the_account() -> None:
    changed = {"newlines": {"documents": 3, "before": 1200, "after": 1100}}
    dropped = {"too short": {"documents": 2, "bytes": 6}}
    quarantined = {"tokenizer failed": {"documents": 1, "bytes": 400}}
    busy = subset(
        1000,
        rules=changed,
        dropped=dropped,
        quarantined=quarantined,
        read=1003,
        bytes_read=10_000 + 6 + 400 + 100,
    )
    text = card.text(SETTINGS, SHARDS | {"more": manifest("more", {"Github": busy, "a|b": subset(3)})})
    assert "- 1,018 lines = 1,015 kept + 2 dropped + 1 quarantined\n" in text
    assert "- 4,060 tokens = 1,015 blocks x 4 - 0 padding (3,045 of text, 1,015 BOS and EOS)\n" in text
    assert "Documents equal to an earlier one of their part of the shard: 0, kept and marked.\n" in text
    assert table(text, "made with") == [
        ["tokenizer", "r50k_base, 12,345 ids"],
        ["sha256 of the tokenizer", "70" * 32],
        ["BOS, before each document", "none"],
        ["EOS, after each document", "id 9"],
        ["block length", "4"],
        ["packer", "concat/2"],
        ["cleaning profile raw", "no rules"],
        ["cleaning profile safe", "newlines/2"],
        ["characters of a document, at least", "5"],
    ]
    assert table(text, "split") == [
        ["train", "2", "1,009", "1,009", "4,036"],
        ["validation", "1", "4", "4", "16"],
        ["test", "1", "2", "2", "8"],
    ]
    assert table(text, "rule") == [
        ["newlines", "changed", "3", "1,200", "1,100"],
        ["too short", "dropped", "2", "6", "0"],
        ["tokenizer failed", "quarantined", "1", "400", "0"],
    ]
    assert table(text, "subset") == [
        ["Github", "safe", "1,010", "10,100", "3,030", "3.33"],
        ["a|b", "safe", "3", "30", "9", "3.33"],
        ["arXiv", "safe", "2", "20", "6", "3.33"],
        ["all", "", "1,015", "10,150", "3,045", "3.33"],
    ]
    assert table(text, "shard") == [
        ["train/0", "train", b"train/0".hex().ljust(64, "0")],
        ["more", "train", b"more".hex().ljust(64, "0")],
        ["train/1", "validation", b"train/1".hex().ljust(64, "0")],
        ["exam", "test", b"exam".hex().ljust(64, "0")],
    ]


TABLES = ["made with", "column", "split", "rule", "subset", "shard"]
NAMES = [
    "a | b",
    "a \\| b",
    "`code` | `",
    "two\nlines\r\n\n# and a heading",
    "\n---\nlicense: mit\n---\n",
    '"quoted": [x], {y} # no comment',
    "<script>alert(1)</script> &lt; <!-- ",
    "[link](https://example.org) ![picture](x)",
    "*bold* _under_ ~~struck~~ $x$",
    "{front} {0} {",
    "\x00\x07\x7f\x85\u2028\u202e\ufeff",
    "emoji 😀, é, 漢字",
    "\ud800",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_breaks_nothing(name: str) -> None:
    text = card.text(SETTINGS, {"more": manifest("more", {name: subset(5), "b": subset(1)}, name=name)})
    text.encode()
    assert front(text) | {"pretty_name": ""} == front(card.text(SETTINGS, {"more": SHARDS["more"]})) | {
        "pretty_name": ""
    }
    assert front(text)["pretty_name"] == f"mine in blocks of 4 {name} tokens"
    plain = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name).strip()
    assert table(text, "subset") == [
        [plain, "safe", "5", "50", "15", "3.33"],
        ["b", "safe", "1", "10", "3", "3.33"],
        ["all", "", "6", "60", "18", "3.33"],
    ]
    assert [rows[0][0] for rows in tables(text)] == TABLES


@given(st.text(max_size=20))
def test_no_name_breaks_anything(name: str) -> None:
    text = card.text(SETTINGS, {"more": manifest("more", {f"x{name}": subset(1)}, name=name)})
    assert front(text)["pretty_name"] == f"mine in blocks of 4 {name} tokens"
    assert [row[1:] for row in table(text, "subset")] == [
        ["safe", "1", "10", "3", "3.33"],
        ["", "1", "10", "3", "3.33"],
    ]
    assert [rows[0][0] for rows in tables(text)] == TABLES


def test_very_many_subsets_are_added_up() -> None:
    subsets = {f"{n:03}" + "x" * n: subset(n + 1) for n in range(250)}
    rows = table(card.text(SETTINGS, {"more": manifest("more", subsets)}), "subset")
    assert len(rows) == 102
    assert rows[0] == ["249" + "x" * 97 + "…", "safe", "250", "2,500", "750", "3.33"]
    assert rows[-2][:3] == ["150 more", "", f"{sum(range(1, 151)):,}"]
    assert rows[-1][:3] == ["all", "", f"{sum(range(1, 251)):,}"]


def test_the_same_manifests_give_the_same_bytes() -> None:
    def turned(value: Any) -> Any:
        """Turn the order of all keys round, as nothing says which one JSON has."""
        return {key: turned(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    dropped = {rule: {"documents": 1, "bytes": 0} for rule in ("empty", "too short")}
    alike = {"Github": subset(5, dropped=dropped, read=7), "arXiv": subset(5)}
    for shards in (SHARDS, {"exam": manifest("exam", alike)}):
        assert json.dumps(turned(shards)) != json.dumps(shards)
        assert card.text(SETTINGS, turned(shards)) == card.text(SETTINGS, shards)


@pytest.mark.parametrize(
    ("rows", "size"),
    [
        (1, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (99_999, "10K<n<100K"),
        (10**9, "1B<n<10B"),
        (10**13, "n>1T"),
    ],
)
def test_size_categories(rows: int, size: str) -> None:
    assert front(card.text(SETTINGS, {"exam": manifest("exam", {"x": subset(rows)})}))["size_categories"] == [
        size
    ]


def test_special_tokenizers_and_duplicates() -> None:
    made = manifest("exam", {"x": subset(1)})
    made["made_from"]["tokenizer"] |= {"kind": "sentencepiece", "bos": 0, "eos": None}
    made["made_from"]["clean"]["duplicates"] = "off"
    text = card.text(SETTINGS, {"exam": made})
    assert ["BOS, before each document", "id 0"] in table(text, "made with")
    assert ["EOS, after each document", "none"] in table(text, "made with")
    assert "(tokenizer.model, beside this file)" in text
    assert "part of the shard: not looked for.\n" in text
    made["made_from"]["clean"]["duplicates"] = "drop"
    assert "part of the shard: dropped.\n" in card.text(SETTINGS, {"exam": made})


def test_the_card_grows_with_the_shards_and_is_else_left_alone(tmp_path: Path) -> None:
    assert card.update(SETTINGS, tmp_path) is None
    assert not (tmp_path / "README.md").exists()
    write_json(tmp_path / "exam/manifest.json", SHARDS["exam"])
    write_json(tmp_path / "of-another-recipe/manifest.json", SHARDS["more"])
    (tmp_path / "more").mkdir()
    (tmp_path / "more/manifest.json").write_text('{"torn')
    path = card.update(SETTINGS, tmp_path)
    assert path == tmp_path / "README.md"
    assert path.read_text("utf-8") == card.text(SETTINGS, {"exam": SHARDS["exam"]})
    before = path.stat()
    card.update(SETTINGS, tmp_path)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    for shard in SHARDS:
        write_json(tmp_path / shard / "manifest.json", SHARDS[shard])
    card.update(SETTINGS, tmp_path)
    assert path.read_text("utf-8") == card.text(SETTINGS, SHARDS)
    assert path.read_text("utf-8").startswith("---\n")
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"README.md", ".README.md.lock"}


def test_manifests_are_read_under_the_lock(tmp_path: Path) -> None:
    write_json(tmp_path / "exam/manifest.json", SHARDS["exam"])
    with (tmp_path / ".README.md.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        later = threading.Thread(target=card.update, args=(SETTINGS, tmp_path))
        later.start()
        later.join(0.3)
        assert later.is_alive()
        assert not (tmp_path / "README.md").exists()
        write_json(tmp_path / "more/manifest.json", SHARDS["more"])  # by the one that holds the lock
    later.join(10)
    assert not later.is_alive()
    both = {shard: SHARDS[shard] for shard in ("more", "exam")}
    assert (tmp_path / "README.md").read_text("utf-8") == card.text(SETTINGS, both)
