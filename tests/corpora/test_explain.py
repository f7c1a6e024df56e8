"""From a block back to shard, line and text; and what `verify` finds when somebody has been at the files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from corpora import verify
from corpora.encode import Encoder
from corpora.errors import InputError
from corpora.explain import explain
from corpora.files import sha256_file
from corpora.prepare import Prepared, prepare
from corpora.settings import DataSettings

Tiny = Callable[..., tuple[DataSettings, Path]]

DOCUMENTS = ["the first one", "x", "a much longer one, " * 12, "the last"]
LINES = b"\n".join(
    json.dumps({"text": text, "meta": {"pile_set_name": "Github"}}).encode() for text in ["", *DOCUMENTS]
)


def prepared(tiny: Tiny, **changes: Any) -> Prepared:
    settings, data = tiny(LINES, **changes)
    return prepare(settings, "a", data)


def test_a_block_is_traced_to_its_documents(tiny: Tiny) -> None:
    done = prepared(tiny)
    found = verify.manifests(done.manifest_path.parent)
    lines = list(explain(found, 0, 30))
    sha256 = done.manifest["made_from"]["input"]["sha256"]
    assert lines == [
        f"block 0: row 0 of {done.manifest_path.parent / 'part-00000.arrow'}",
        "16 ids and 0 of padding",
        f"shard a of tiny, sha256 {sha256}",
        "",
        "ids 0 to 4: document 0 of its part, Github, line 2 (byte 50, 62 bytes)",
        "  ids 0 to 4 of its 5; 13 bytes of cleaned text",
        "  | the first one",
        "",
        "ids 5 to 7: document 1 of its part, Github, line 3 (byte 113, 50 bytes)",
        "  ids 0 to 2 of its 3; 1 bytes of cleaned text",
        "  | x",
        "",
        "ids 8 to 15: document 2 of its part, Github, line 4 (byte 164, 277 bytes)",
        "  ids 0 to 7 of its 63; 228 bytes of cleaned text",
        "  | a much longer one, a much",
    ]
    assert json.loads(LINES[50 : 50 + 62])["text"] == DOCUMENTS[0]
    assert json.loads(LINES[164 : 164 + 277])["text"] == DOCUMENTS[2]
    assert list(explain(found, 4, 5))[-1] == "  | the last"


def test_all_blocks_together_hold_all_text(tiny: Tiny) -> None:
    done = prepared(tiny, blocks={"length": 7, "packer": "best_fit", "format": "parquet"})
    found = verify.manifests(done.manifest_path.parent)
    texts: dict[str, str] = {}
    for block in range(done.manifest["ledger"]["blocks"]):
        document = ""
        for line in explain(found, block, 1000):
            if line.startswith("ids "):
                document = line.partition("document ")[2].partition(" ")[0]
            elif line.startswith("  | "):
                texts[document] = texts.get(document, "") + line[4:]
    assert texts["0"] == DOCUMENTS[0]
    assert texts["1"] == DOCUMENTS[1]
    assert sorted(texts["2"]) == sorted(DOCUMENTS[2])  # its rows are not in its own order
    assert texts["3"] == DOCUMENTS[3]


@pytest.mark.parametrize("block", [-1, 1000])
def test_a_block_that_is_not_there(tiny: Tiny, block: int) -> None:
    found = verify.manifests(prepared(tiny).manifest_path.parent)
    with pytest.raises(InputError, match=f"block {block}: there are 5 here, numbered from 0"):
        list(explain(found, block, 10))


def rewritten(done: Prepared, name: str, change: Callable[[dict[str, list[Any]]], None]) -> list[str]:
    """Change an Arrow file's columns, put its new hash into the manifest, and verify."""
    path = done.manifest_path.parent / name
    table = pa.ipc.open_file(path).read_all()
    columns = table.to_pydict()
    change(columns)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(pa.Table.from_pydict(columns, schema=table.schema))
    manifest = json.loads(done.manifest_path.read_text())
    manifest["outputs"][name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    done.manifest_path.write_text(json.dumps(manifest))
    return list(verify.faults(done.manifest_path, deep=True))


def _swap_ids(columns: dict[str, list[Any]]) -> None:
    row = columns["input_ids"][0]
    row[1], row[2] = row[2], row[1]


def _another_id(columns: dict[str, list[Any]]) -> None:
    columns["input_ids"][0][1] = 60_000


def _eos_inside(columns: dict[str, list[Any]]) -> None:
    columns["input_ids"][0][1] = 50256


def _line(columns: dict[str, list[Any]]) -> None:
    columns["segments"][0][0]["line"] = 9


def _offset(columns: dict[str, list[Any]]) -> None:
    columns["segments"][1][0]["offset"] += 1


def _length(columns: dict[str, list[Any]]) -> None:
    columns["segments"][0][0]["length"] -= 1


def _document(columns: dict[str, list[Any]]) -> None:
    columns["segments"][0][0]["document"] = 3


def _lost_row(columns: dict[str, list[Any]]) -> None:
    for column in columns.values():
        del column[1]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (_swap_ids, r"part 0: document 0 \(line 2\) does not decode to the text that was cleaned"),
        (_another_id, "id 60000 is outside the tokenizer's 50257 ids"),
        (_eos_inside, "special id 50256 occurs 9 times, 4 documents want 8"),
        (_line, "the lines of the segments are not those of the documents file"),
        (_offset, "the segments do not hold every document once"),
        (_length, "the segments of row 0 do not add up to its tokens"),
        (_document, "the segments do not hold every document once"),
        (_lost_row, "4 rows, the ledger says 5"),
    ],
)
def test_what_is_wrong_with_blocks_is_found(
    tiny: Tiny, change: Callable[[dict[str, list[Any]]], None], fault: str
) -> None:
    done = prepared(tiny)
    assert list(verify.faults(done.manifest_path, deep=True)) == []
    found = "\n".join(rewritten(done, "part-00000.arrow", change))
    assert re.search(fault, found), found


def test_what_is_wrong_with_the_documents_file_is_found(tiny: Tiny) -> None:
    def fewer_tokens(columns: dict[str, list[Any]]) -> None:
        columns["tokens"][0] -= 1

    def another_subset(columns: dict[str, list[Any]]) -> None:
        columns["subset"][0] = "Pile-CC"

    found = rewritten(prepared(tiny), "documents-00000.arrow", fewer_tokens)
    assert any("every document once" in fault for fault in found)
    assert any("Github: 66 tokens, the ledger says 67" in fault for fault in found), found
    found = rewritten(prepared(tiny), "documents-00000.arrow", another_subset)
    assert any("Pile-CC: 1 documents, the ledger says 0" in fault for fault in found), found


def test_a_sample_is_decoded_without_deep(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "SAMPLE", 2)
    done = prepared(tiny)
    rewritten(done, "part-00000.arrow", lambda columns: columns["input_ids"][0].__setitem__(6, 11))
    assert any("document 1 " in fault for fault in verify.faults(done.manifest_path, deep=True))
    assert list(verify.faults(done.manifest_path)) == []  # documents 0 and 2 are its sample of four


def manifest_changed(done: Prepared, change: Callable[[Any], object]) -> list[str]:
    manifest = json.loads(done.manifest_path.read_text())
    change(manifest)
    done.manifest_path.write_text(json.dumps(manifest))
    return list(verify.faults(done.manifest_path))


def test_the_manifest_is_held_against_the_files(tiny: Tiny) -> None:
    lines = LINES + b"\n{broken\n{broken"
    for change, fault in (
        (lambda m: m["made_from"]["input"].update(sha256="0" * 64), "made from something else"),
        (lambda m: m["made_from"]["clean"].update(min_chars=7), "made from something else"),
        (lambda m: m["parts"][0].update(first=2), "begins with line 2, the parts before it have 0"),
        (lambda m: m["outputs"].pop("part-00000.arrow"), "its block file is not in the manifest"),
        (
            lambda m: m["outputs"].pop("documents-00000.arrow"),
            r"documents-00000\.arrow is not in the manifest",
        ),
        (
            lambda m: m["ledger"].update(
                quarantined={"invalid JSON": 1}, dropped={"blank_line": 1, "empty": 2}
            ),
            "the quarantine holds {'invalid JSON': 2}, the ledger says {'invalid JSON': 1}",
        ),
    ):
        settings, data = tiny(lines)
        done = prepare(settings, "a", data)
        assert list(verify.faults(done.manifest_path)) == []
        found = "\n".join(manifest_changed(done, change))
        assert re.search(fault, found), found
        done.manifest_path.unlink()


def test_a_block_file_that_nobody_made_is_found(tiny: Tiny) -> None:
    done = prepared(tiny)
    folder = done.manifest_path.parent
    (folder / "part-00009.arrow").write_bytes((folder / "part-00000.arrow").read_bytes())
    (fault,) = verify.faults(done.manifest_path)
    assert "part-00009.arrow is not in the manifest, but would be read with the others" in fault


def test_deep_encodes_again(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that decode to the right text are not yet those of the tokenizer: an engine may be wrong after its probe."""

    def bytewise(self: Encoder, texts: list[str]) -> Any:
        parts = [np.concatenate([self.tokenizer.encode(c) for c in text]) for text in texts]
        return np.concatenate(parts), np.array([len(part) for part in parts])

    monkeypatch.setattr(Encoder, "encode_batch", bytewise)
    done = prepared(tiny)
    assert list(verify.faults(done.manifest_path)) == []
    found = list(verify.faults(done.manifest_path, deep=True))
    assert len(found) == 3  # the document "x" has but one byte
    assert all("has other ids than tiktoken 0.14.0 gives" in fault for fault in found)


def test_lines_out_of_order_are_found(tiny: Tiny) -> None:
    def swapped(columns: dict[str, list[Any]]) -> None:
        columns["line"][0], columns["line"][1] = columns["line"][1], columns["line"][0]

    found = rewritten(prepared(tiny), "documents-00000.arrow", swapped)
    assert any("its documents are not of the lines that the manifest says" in fault for fault in found), found
