"""A shard to blocks: the ledger balances, the same input gives the same bytes, and nothing half-made counts."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from corpora import make_part, tokenizer, verify
from corpora import prepare as step
from corpora.documents import read_table
from corpora.errors import InputError
from corpora.files import read_json, write_json
from corpora.ledger import broken_laws, total
from corpora.prepare import blocks_fingerprint, documents, find_manifest, open_blocks, prepare
from corpora.read import open_bytes
from corpora.settings import DataSettings
from corpora.workers import _Places

Tiny = Callable[..., tuple[DataSettings, Path]]
ROOT = Path(__file__).resolve().parents[2]

LINES = b"\n".join(
    [
        b'\xef\xbb\xbf{"text": "hello world", "meta": {"pile_set_name": "Github"}}',
        b'{"text": "a\\r\\nb <|endoftext|>", "meta": {"pile_set_name": "Pile-CC"}}',
        b"",
        b"{broken",
        b'{"text": "\xff"}',
        b'{"text": 5}',
        b'{"text": "  "}',
        b'{"text": "x\\ud800y"}',
    ]
)


def unpack(path: Path) -> bytes:
    with open_bytes(path) as file:
        return file.read()


def tree(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_line_and_token_is_accounted_for(tiny: Tiny) -> None:
    settings, data = tiny(LINES)
    done = prepare(settings, "a", data)
    none = {"duplicates": 0, "rules": {}, "dropped": {}, "quarantined": {}}
    assert done.manifest["ledger"] == {
        "length": 16,
        "lines": 8,
        "kept": 3,
        "dropped": {"blank_line": 1, "empty": 1},
        "quarantined": {"invalid JSON": 1, "invalid UTF-8": 1, "text is not a string": 1},
        "cleaned": {"byte_order_mark": 1, "newlines": 1, "lone_surrogates": 1},
        "duplicates": 0,
        "text_tokens": 2 + 10 + 3,
        "special_tokens": 6,
        "blocks": 2,
        "padding": 11,
        "subsets": {
            "Github": none
            | {"profile": "safe", "known": True, "read": 1, "bytes_read": 11}
            | {"documents": 1, "bytes": 11, "tokens": 2},
            "Pile-CC": none
            | {"profile": "prose", "known": True, "read": 1, "bytes_read": 18}
            | {"documents": 1, "bytes": 17, "tokens": 10}
            | {"rules": {"newlines": {"documents": 1, "before": 18, "after": 17}}},
            "unknown": none
            | {"profile": "safe", "known": False, "read": 2, "bytes_read": 7}
            | {"documents": 1, "bytes": 5, "tokens": 3}
            | {"rules": {"lone_surrogates": {"documents": 1, "before": 5, "after": 5}}}
            | {"dropped": {"empty": {"documents": 1, "bytes": 2}}},
        },
    }
    folder = done.manifest_path.parent
    index = (folder / "quarantine-00000.index.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in index] == [
        {"line": 4, "offset": 136, "bytes": 7, "reason": "invalid JSON", "row": 1},
        {"line": 5, "offset": 144, "bytes": 13, "reason": "invalid UTF-8", "row": 2},
        {"line": 6, "offset": 158, "bytes": 11, "reason": "text is not a string", "row": 3},
    ]
    bad = unpack(folder / "quarantine-00000.jsonl.zst")
    assert bad == b'{broken\n{"text": "\xff"}\n{"text": 5}\n'
    assert LINES[136 : 136 + 7] == b"{broken"
    table = read_table(folder / "documents-00000.arrow").to_pylist()
    assert [(row["line"], row["offset"], row["size"], row["subset"]) for row in table] == [
        (1, 0, 63, "Github"),
        (2, 64, 70, "Pile-CC"),
        (8, 185, 20, "unknown"),
    ]
    assert [(row["bytes"], row["tokens"], row["duplicate"], row["exact"]) for row in table] == [
        (11, 2, False, True),
        (17, 10, False, True),
        (5, 3, False, True),
    ]
    assert table[0]["xxh3_128"] == xxhash.xxh3_128_digest(b"hello world")
    assert {path.name for path in folder.iterdir()} == {
        "part-00000.arrow",
        "part-00000.json",
        "documents-00000.arrow",
        "quarantine-00000.jsonl.zst",
        "quarantine-00000.index.jsonl",
        "manifest.json",
    }


def test_blocks_decode_to_the_cleaned_text(tiny: Tiny) -> None:
    settings, data = tiny(LINES)
    prepare(settings, "a", data)
    blocks = open_blocks(settings, ["a"], data)
    ids, tokens = blocks.rows(range(len(blocks)))
    assert tokens.tolist() == [16, 5]
    assert [blocks.where(n)[2]["segments"] for n in (0, 1)] == [
        [
            {"document": 0, "line": 1, "offset": 0, "length": 4},
            {"document": 1, "line": 2, "offset": 0, "length": 12},
        ],
        [{"document": 2, "line": 8, "offset": 0, "length": 5}],
    ]
    encoder = tokenizer.load(settings.tokenizer)
    real = ids.reshape(-1)[: int(tokens.sum())].tolist()
    ends = [n for n, i in enumerate(real) if i == 50256]
    texts = [encoder.decode(real[a + 1 : b]) for a, b in zip(ends[::2], ends[1::2], strict=True)]
    assert texts == ["hello world", "a\nb <|endoftext|>", "x\ufffdy"]
    assert [(d.line, d.subset, d.text) for d in documents(settings, "a", data)] == [
        (1, "Github", texts[0]),
        (2, "Pile-CC", texts[1]),
        (8, "unknown", texts[2]),
    ]
    assert np.concatenate([d.ids for d in documents(settings, "a", data)]).tolist() == real
    assert ids[-1, 5:].tolist() == [50256] * 11


anything = st.one_of(
    st.text().map(lambda text: json.dumps({"text": text}).encode()),
    st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"")),
    st.sampled_from([b"", b"null", b'{"text": null}', b'{"text": "\\ud800"}']),
)


@hypothesis_settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(anything, max_size=12),
    st.integers(2, 40),
    st.sampled_from([1024, 1 << 20]),
    st.sampled_from(["concat", "best_fit"]),
    st.sampled_from(["off", "tag", "drop"]),
)
def test_the_laws_hold_for_any_shard(
    tiny: Tiny, lines: list[bytes], length: int, part_bytes: int, packer: str, duplicates: str
) -> None:
    keep = b'\n{"text": "one to keep"}'
    settings, data = tiny(
        b"\n".join(lines) + keep,
        blocks={"length": length, "part_bytes": part_bytes, "packer": packer},
        clean={"duplicates": duplicates, "quarantine_limit": 1},
    )
    done = prepare(settings, "a", data)
    ledger = done.manifest["ledger"]
    assert broken_laws(ledger) == []
    assert ledger["lines"] == (len(lines) or 1) + 1
    bad = [unpack(path) for path in done.manifest_path.parent.glob("quarantine-*.jsonl.zst")]
    assert b"".join(bad).count(b"\n") == sum(ledger["quarantined"].values())
    assert list(verify.faults(done.manifest_path, deep=True)) == []


def test_the_same_again_is_skipped_and_anything_else_is_not(tiny: Tiny) -> None:
    settings, data = tiny(LINES)
    first = prepare(settings, "a", data)
    before = tree(data)
    again = prepare(settings, "a", data)
    assert (first.skipped, again.skipped, again.manifest) == (False, True, first.manifest)
    assert tree(data) == before

    for changed in (
        {"blocks": {"length": 17}},
        {"blocks": {"length": 16, "format": "parquet"}},
        {"clean": {"min_chars": 4}},
        {"tokenizer": {"bos": None}},
        {"corpus": {"subset_field": "meta"}},
    ):
        other, _ = tiny(LINES, **changed)
        with pytest.raises(InputError, match="not prepared with these settings"):
            open_blocks(other, ["a"], data)
        assert not prepare(other, "a", data).skipped
    assert blocks_fingerprint(settings, ["a"], data) != blocks_fingerprint(other, ["a"], data)


def test_a_changed_input_is_prepared_anew(tiny: Tiny) -> None:
    settings, data = tiny(LINES)
    first = prepare(settings, "a", data)
    settings, data = tiny(LINES + b'\n{"text": "more"}')
    second = prepare(settings, "a", data)
    assert (second.manifest_path, second.skipped) == (first.manifest_path, False)
    assert second.manifest["ledger"]["lines"] == 9


def test_a_new_step_version_is_prepared_anew(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, data = tiny(LINES)
    first = prepare(settings, "a", data)
    monkeypatch.setattr(step, "PREPARE_VERSION", "prepare/next")
    second = prepare(settings, "a", data)
    assert (second.skipped, second.manifest_path == first.manifest_path) == (False, False)


@pytest.mark.parametrize("damage", ["missing", "short", "manifest torn"])
def test_lost_outputs_are_made_again(tiny: Tiny, damage: str) -> None:
    settings, data = tiny(LINES)
    done = prepare(settings, "a", data)
    before = tree(data)
    part = done.manifest_path.parent / "part-00000.arrow"
    if damage == "missing":
        part.unlink()
    elif damage == "short":
        part.write_bytes(part.read_bytes()[:-1])
    else:
        done.manifest_path.write_text("{")
        with pytest.raises(InputError, match="not valid JSON"):
            prepare(settings, "a", data)
        done.manifest_path.unlink()
    assert not prepare(settings, "a", data).skipped
    assert tree(data) == before


def test_verify_notices_a_flipped_bit_and_a_cooked_ledger(tiny: Tiny) -> None:
    settings, data = tiny(LINES)
    done = prepare(settings, "a", data)
    part = done.manifest_path.parent / "part-00000.arrow"
    flipped = bytearray(part.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    part.write_bytes(flipped)
    assert any("sha256 is" in fault for fault in verify.faults(done.manifest_path))
    part.unlink()
    prepare(settings, "a", data)

    def faults(**changes: Any) -> list[str]:
        cooked = json.loads(json.dumps(done.manifest))
        cooked["ledger"].update(changes)
        done.manifest_path.write_text(json.dumps(cooked))
        return list(verify.faults(done.manifest_path))

    assert faults() == []
    assert "9 lines read, but 3 kept + 2 dropped + 3 quarantined" in faults(lines=9)[0]
    assert len(faults(padding=8)) == 1
    assert any("rows, the ledger says 3" in fault for fault in faults(blocks=3, padding=25))
    assert any("special id 50256 occurs 6 times, 4 documents want 8" in fault for fault in faults(kept=4))
    for torn in ("{", "[]", "{}", '{"made_from": {}, "ledger": [], "outputs": {}}'):
        done.manifest_path.write_text(torn)
        (fault,) = verify.faults(done.manifest_path)
        assert str(done.manifest_path) in fault and "delete it" in fault


@pytest.mark.parametrize(
    ("lines", "compressed", "message"),
    [
        (b"", zstandard.ZstdCompressor().compress(LINES * 9)[:-5], "cut short|damaged"),
        (b"", b"no zstd at all", "not zstd data"),
        (b"", None, "no document to keep .it has no lines"),
    ],
    ids=["truncated", "not zstd", "empty"],
)
def test_a_bad_shard_leaves_nothing(tiny: Tiny, lines: bytes, compressed: bytes | None, message: str) -> None:
    settings, data = tiny(lines, compressed=compressed)
    with pytest.raises(InputError, match=message):
        prepare(settings, "a", data)
    assert tree(data / "tiny" / "blocks") == {}


def test_no_space_left_leaves_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, data = tiny(LINES)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(settings, "a", data)
    monkeypatch.undo()
    assert tree(data / "tiny" / "blocks") == {}
    assert not prepare(settings, "a", data).skipped


def test_a_million_spaces_are_encoded_like_anything_else(tiny: Tiny) -> None:
    wide = " " * 1_000_001 + "a"
    settings, data = tiny(LINES + b"\n" + json.dumps({"text": wide}).encode())
    done = prepare(settings, "a", data)
    assert done.manifest["ledger"]["kept"] == 4
    assert list(verify.faults(done.manifest_path, deep=True)) == []


def test_a_run_that_no_tokenizer_can_take_is_quarantined(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "LONG", 100)
    monkeypatch.setattr(tokenizer, "LONGEST_RUN", 1000)
    lines = [json.dumps({"text": text}).encode() for text in ("before", "x" * 2000, "after")]
    settings, data = tiny(b"\n".join(lines))
    done = prepare(settings, "a", data)
    ledger = done.manifest["ledger"]
    assert (ledger["kept"], ledger["quarantined"]) == (2, {tokenizer.TOO_LONG: 1})
    assert ledger["subsets"]["unknown"]["quarantined"] == {
        tokenizer.TOO_LONG: {"documents": 1, "bytes": 2000}
    }
    assert unpack(done.manifest_path.parent / "quarantine-00000.jsonl.zst") == lines[1] + b"\n"
    assert list(verify.faults(done.manifest_path, deep=True)) == []


@pytest.mark.parametrize("duplicates", ["off", "tag", "drop"])
def test_duplicates_within_a_part(tiny: Tiny, duplicates: str) -> None:
    texts = ["one", "two", "one", "one\r", "one\n", "two"]  # the fourth is the fifth, once it is cleaned
    lines = b"\n".join(json.dumps({"text": text}).encode() for text in texts)
    settings, data = tiny(lines, clean={"duplicates": duplicates})
    done = prepare(settings, "a", data)
    ledger = done.manifest["ledger"]
    table = read_table(done.manifest_path.parent / "documents-00000.arrow")
    found = {
        "off": (6, 0, {}, [False] * 6),
        "tag": (6, 3, {}, [False, False, True, False, True, True]),
        "drop": (3, 0, {"duplicate": 3}, [False] * 3),
    }[duplicates]
    assert (ledger["kept"], ledger["duplicates"], ledger["dropped"], table["duplicate"].to_pylist()) == found
    assert broken_laws(ledger) == []
    # Not in the whole shard: a part is a function of its own lines.
    settings, data = tiny(lines, clean={"duplicates": duplicates}, blocks={"part_bytes": 1024})
    padded = b"\n".join(json.dumps({"text": "one", "padding": "x" * 2000}).encode() for _ in range(3))
    settings, data = tiny(padded, clean={"duplicates": duplicates}, blocks={"part_bytes": 1024})
    ledger = prepare(settings, "a", data).manifest["ledger"]
    assert (ledger["kept"], ledger["duplicates"]) == (3, 0)


def test_a_bad_record_does_not_stop_a_shard_until_there_are_too_many(tiny: Tiny) -> None:
    good = [json.dumps({"text": f"number {n}"}).encode() for n in range(1000)]
    settings, data = tiny(b"\n".join([*good, *[b"{"] * 10]))
    assert prepare(settings, "a", data).manifest["ledger"]["quarantined"] == {"invalid JSON": 10}

    many = b"\n".join([*good, *[b"{"] * 11])
    settings, data = tiny(many)
    with pytest.raises(
        InputError, match=r"11 of 1,011 lines .*11 invalid JSON.* lets 0.10% pass.*quarantine-"
    ):
        prepare(settings, "a", data)
    (folder,) = (path.parent for path in data.rglob("quarantine-*.zst"))
    assert not (folder / "manifest.json").exists()
    assert unpack(folder / "quarantine-00000.jsonl.zst") == b"{\n" * 11

    settings, data = tiny(many, clean={"quarantine_limit": 0.011})  # another limit, the same parts
    done = prepare(settings, "a", data)
    assert done.manifest_path.parent == folder
    assert done.manifest["ledger"]["quarantined"] == {"invalid JSON": 11}


def test_a_wrong_field_is_noticed_in_the_first_part(tiny: Tiny) -> None:
    lines = b"\n".join(b'{"content": "%d"}' % n for n in range(1000))
    settings, data = tiny(lines, blocks={"part_bytes": 1024})
    with pytest.raises(InputError, match=r"lines 1 on: .* no text.*text_field = 'text' fit it"):
        prepare(settings, "a", data)
    assert len(list(data.rglob("part-*.json"))) == 1


def test_what_is_quarantined_can_be_mended_and_run_again(tiny: Tiny, tmp_path: Path) -> None:
    long = json.dumps({"text": "x " * 2000}).encode()
    lines = [b'{"text": "fine"}', long, b'{"text": "cut', b'{"text": "\xff"}']
    settings, data = tiny(b"\n".join(lines), corpus={"max_record_bytes": 1000})
    done = prepare(settings, "a", data)
    ledger = done.manifest["ledger"]
    assert ledger["quarantined"] == {"line too long": 1, "invalid JSON": 1, "invalid UTF-8": 1}
    quarantine = done.manifest_path.parent / "quarantine-00000.jsonl.zst"
    assert unpack(quarantine).split(b"\n") == [*lines[1:], b""]

    # It is a shard: with a larger limit its long line is a document.
    settings, data = tiny(b"", compressed=quarantine.read_bytes(), corpus={"max_record_bytes": 10_000})
    again = prepare(settings, "a", data)
    assert again.manifest["ledger"]["kept"] == 1
    assert again.manifest["ledger"]["quarantined"] == {"invalid JSON": 1, "invalid UTF-8": 1}


def numbered(count: int, long: int = 4000) -> bytes:
    """Return documents of different lengths, one of them bad, one longer than a part."""
    lines = [
        json.dumps({"text": f"{n} line " * (n % 41 + 1), "meta": {"pile_set_name": f"S{n % 3}"}}).encode()
        for n in range(count)
    ]
    lines[count // 2] = b"{broken"
    lines[count // 3] = json.dumps({"text": "long " * long}).encode()
    return b"\n".join(lines)


@pytest.mark.parametrize("packer", ["concat", "best_fit"])
def test_parts_hold_the_lines_that_begin_in_them(tiny: Tiny, packer: str) -> None:
    lines = numbered(300)
    settings, data = tiny(lines, blocks={"part_bytes": 4096, "packer": packer})
    done = prepare(settings, "a", data)
    parts = done.manifest["parts"]
    starts = [0, *(n + 1 for n, byte in enumerate(lines) if byte == 10)]
    assert len(parts) > 5
    assert [part["part"] for part in parts] == sorted({start // 4096 for start in starts})
    assert parts[-1]["part"] > len(parts) - 1  # the long line leaves parts in which none begins
    for part in parts:
        own = [n for n, start in enumerate(starts, 1) if start // 4096 == part["part"]]
        assert (part["first"], part["count"], part["from"]) == (own[0], len(own), starts[own[0] - 1])
    ledger = done.manifest["ledger"]
    assert (ledger["lines"], ledger["kept"]) == (300, 299)
    assert ledger["blocks"] == sum(part["blocks"] for part in parts)
    assert list(verify.faults(done.manifest_path, deep=True)) == []
    texts = {json.loads(line)["text"] for n, line in enumerate(lines.split(b"\n")) if n != 150}
    assert {document.text for document in documents(settings, "a", data)} == texts


def test_a_part_that_is_done_is_not_made_again(tiny: Tiny) -> None:
    settings, data = tiny(numbered(300, long=10), blocks={"part_bytes": 4096})
    done = prepare(settings, "a", data)
    folder = done.manifest_path.parent
    before = tree(data)
    kept, lost = (folder / f"part-{n:05}.arrow" for n in (2, 3))
    (folder / "manifest.json").unlink()
    lost.unlink()
    stamp = kept.stat().st_mtime_ns
    assert not prepare(settings, "a", data).skipped
    assert tree(data) == before
    assert kept.stat().st_mtime_ns == stamp

    # With all parts there, the shard is not even read.
    (folder / "manifest.json").unlink()
    told: list[int] = []
    assert prepare(settings, "a", data, told.append).manifest == done.manifest
    assert told == []


def test_parts_of_an_earlier_input_are_removed(tiny: Tiny) -> None:
    settings, data = tiny(numbered(300), blocks={"part_bytes": 4096})
    prepare(settings, "a", data)
    settings, data = tiny(numbered(30), blocks={"part_bytes": 4096})
    done = prepare(settings, "a", data)
    files = {path.name for path in done.manifest_path.parent.iterdir()}
    records = {f"part-{part['part']:05}.json" for part in done.manifest["parts"]}
    assert files == {"manifest.json", *done.manifest["outputs"], *records}


@pytest.mark.parametrize("packer", ["concat", "best_fit"])
def test_any_number_of_workers_gives_the_same_bytes(tiny: Tiny, packer: str) -> None:
    settings, data = tiny(numbered(600), blocks={"part_bytes": 8192, "packer": packer})
    trees = []
    for workers in (1, 2, 5):
        told: list[int] = []
        done = prepare(settings, "a", data, told.append, workers)
        trees.append(tree(data / "tiny" / "blocks"))
        assert 0 < sum(told) <= (data / "tiny/raw/a.jsonl.zst").stat().st_size
        shutil.rmtree(data / "tiny" / "blocks")
    assert len(done.manifest["parts"]) > 10
    assert trees[0] == trees[1] == trees[2]


def test_any_engine_gives_the_same_bytes(tiny: Tiny) -> None:
    trees, engines = [], []
    for backend in ("own", "fastokens"):
        settings, data = tiny(numbered(300), tokenizer={"backend": backend})
        done = prepare(settings, "a", data)
        engines.append(done.manifest["engines"])
        files = tree(data / "tiny" / "blocks")
        trees.append({name: digest for name, digest in files.items() if not name.endswith(".json")})
        shutil.rmtree(data / "tiny" / "blocks")
    assert len(trees[0]) == 4
    assert trees[0] == trees[1]
    assert [next(iter(names)).split()[0] for names in engines] == ["tiktoken", "fastokens"]


def test_a_worker_that_dies_is_told_and_finished_parts_are_kept(tiny: Tiny, tmp_path: Path) -> None:
    settings, data = tiny(numbered(3000), blocks={"part_bytes": 8192})
    command, environment = command_line(settings, data, tmp_path, part_bytes=8192)
    child = subprocess.Popen(
        [*command, "--workers", "2"],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    victim = None
    while child.poll() is None and victim is None:
        if list(data.rglob("part-*.json")):
            found = subprocess.run(
                ["pgrep", "-P", str(child.pid), "-f", "spawn_main"], capture_output=True, text=True
            )
            victim = next(iter(found.stdout.split()), None)
        time.sleep(0.005)
    assert victim is not None
    os.kill(int(victim), signal.SIGKILL)
    message = child.communicate()[1].decode()
    assert child.returncode == 75, message
    assert re.search(
        r"^error: .*the worker of part \d+ was killed by SIGKILL.*finished parts are kept", message, re.M
    )
    assert "Traceback" not in message
    done = set(data.rglob("part-*.json"))
    stamps = {path: path.stat().st_mtime_ns for path in done}
    assert done and not list(data.rglob("manifest.json"))
    prepare(settings, "a", data)
    assert {path: path.stat().st_mtime_ns for path in done} == stamps


def test_workers_share_the_places_of_a_data_folder(tmp_path: Path) -> None:
    with _Places(tmp_path / "places", 2) as ours, _Places(tmp_path / "places", 2) as theirs:
        first = ours.wait()
        assert theirs.take() is not None
        assert (ours.take(), theirs.take()) == (None, None)
        first.close()
        assert theirs.take() is not None
        with _Places(tmp_path / "places", 3) as larger:
            assert larger.take() is not None
            assert larger.take() is None


def command_line(
    settings: DataSettings, data: Path, folder: Path, part_bytes: int = 1 << 27
) -> tuple[list[str], dict[str, str]]:
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f'[corpus]\nname = "tiny"\ntrain = ["a"]\nval = ["v"]\nlock = "{settings.corpus.lock}"\n'
        '[tokenizer]\nname = "r50k_base"\nbos = 50256\neos = 50256\n'
        f"[blocks]\nlength = 16\npart_bytes = {part_bytes}\n"
    )
    command = [sys.executable, "-m", "corpora", "prepare", str(recipe), "--shard", "a"]
    return command, {**os.environ, "PILELINE_DATA": str(data)}


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tiny: Tiny, tmp_path: Path, workers: int) -> None:
    """`python -m benchmarks kill_prepare` does this a hundred times, at moments drawn at random."""
    lines = b"\n".join(json.dumps({"text": f"{n} line " * 200}).encode() for n in range(1500))
    settings, data = tiny(lines)
    command, environment = command_line(settings, data, tmp_path, part_bytes=1 << 19)
    blocks = data / "tiny" / "blocks"

    def run(kill_at: int | None = None) -> int:
        """Prepare; with `kill_at`, SIGKILL all processes once that many parts are done and another is begun."""
        child = subprocess.Popen(
            [*command, "--workers", str(workers)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        while kill_at is not None and child.poll() is None:
            if len(list(blocks.rglob("part-*.json"))) >= kill_at and list(blocks.rglob(".*.part")):
                os.killpg(child.pid, signal.SIGKILL)
                break
            time.sleep(0.001)
        return child.wait()

    assert run() == 0
    whole = tree(blocks)
    assert len(list(blocks.rglob("part-*.arrow"))) == 6
    for done in (0, 2, 4):
        shutil.rmtree(blocks)
        assert run(kill_at=done) == -signal.SIGKILL
        left = tree(blocks)
        assert not any(name.endswith("manifest.json") for name in left)
        assert any(name.endswith(".part") for name in left)
        assert run() == 0
        assert tree(blocks) == whole


def test_totals_add_up(tiny: Tiny) -> None:
    settings, data = tiny(LINES)
    ledgers = [prepare(settings, shard, data).manifest["ledger"] for shard in ("a", "v", "a")]
    both = total(ledgers)
    assert broken_laws(both) == []
    assert both["lines"] == 17
    github = both["subsets"]["Github"]
    assert {key: github[key] for key in ("documents", "bytes", "tokens")} == {
        "documents": 3,
        "bytes": 30,
        "tokens": 6,
    }
    assert both["subsets"]["Pile-CC"]["rules"]["newlines"] == {"documents": 2, "before": 36, "after": 34}


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": 1, "a": "é"})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"b": object()})
    assert read_json(tmp_path / "x.json") == {"a": "é", "b": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    left_behind = tmp_path / ".x.json.999999999.part"
    left_behind.touch()
    write_json(tmp_path / "x.json", {})
    assert not left_behind.exists()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_line_too_long_is_kept_wherever_it_stands(tiny: Tiny, workers: int) -> None:
    """First of the shard, first of a part, over several parts, last and without a newline."""
    good = [json.dumps({"text": f"{n} " * 60}).encode() for n in range(40)]
    long = [json.dumps({"text": f"{n}" * size}).encode() for n, size in enumerate((700, 3000, 5000, 800))]
    lines = [
        long[0],
        *good[:5],
        b"not json",
        *good[5:12],
        long[1],
        *good[12:30],
        long[2],
        *good[30:],
        long[3],
    ]
    settings, data = tiny(b"\n".join(lines), corpus={"max_record_bytes": 600}, blocks={"part_bytes": 1024})
    done = prepare(settings, "a", data, workers=workers)
    assert done.manifest["ledger"]["quarantined"] == {"line too long": 4, "invalid JSON": 1}
    bad = [unpack(path) for path in sorted(done.manifest_path.parent.glob("quarantine-*.jsonl.zst"))]
    assert b"".join(bad) == b"".join(
        line + b"\n" for line in (long[0], b"not json", long[1], long[2], long[3])
    )
    assert list(verify.faults(done.manifest_path, deep=True)) == []


def test_two_at_once_do_not_disturb_each_other(tiny: Tiny) -> None:
    settings, data = tiny(numbered(60), blocks={"part_bytes": 4096})
    once = prepare(settings, "a", data)
    before = tree(data / "tiny" / "blocks")
    barrier = threading.Barrier(4)

    def run(_: int) -> dict[str, Any]:
        barrier.wait()
        found = []
        for _ in range(10):
            found.append(prepare(settings, "a", data, workers=4).manifest)
            assert find_manifest(settings, "a", data)[1] == once.manifest
            (once.manifest_path.parent / "part-00001.json").unlink(missing_ok=True)
        return found[-1]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == [once.manifest] * 4
    once.manifest_path.unlink()
    assert prepare(settings, "a", data).manifest == once.manifest
    assert tree(data / "tiny" / "blocks") == before


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["ledger"].pop("duplicates"),
        lambda manifest: manifest.pop("parts"),
        lambda manifest: manifest["outputs"].update({"part-00000.arrow": 5}),
        lambda manifest: manifest["made_from"].pop("tokenizer"),
        lambda manifest: manifest["made_from"].update(step="prepare/1"),
    ],
)
def test_a_manifest_of_another_shape_is_one_line(tiny: Tiny, change: Callable[[Any], None]) -> None:
    settings, data = tiny(LINES)
    done = prepare(settings, "a", data)
    manifest = json.loads(done.manifest_path.read_text())
    change(manifest)
    done.manifest_path.write_text(json.dumps(manifest))
    (fault,) = verify.faults(done.manifest_path)
    assert re.search(r"delete it and prepare|made by prepare/1, this is prepare/2; prepare the shard", fault)


@pytest.mark.parametrize(
    "record", ["{", "[]", "{}", '{"made_from": "DIGEST"}', '{"made_from": "DIGEST", "ends": 1}']
)
def test_a_record_of_another_shape_does_not_count(tiny: Tiny, record: str) -> None:
    settings, data = tiny(LINES)
    done = prepare(settings, "a", data)
    path = done.manifest_path.with_name("part-00000.json")
    whole = path.read_bytes()
    path.write_text(record.replace("DIGEST", json.loads(whole)["made_from"]))
    done.manifest_path.unlink()
    assert prepare(settings, "a", data).manifest == done.manifest
    assert path.read_bytes() == whole


def test_a_text_of_which_no_ids_are_made_is_dropped(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokenizer.TiktokenTokenizer._encode
    monkeypatch.setattr(
        tokenizer.TiktokenTokenizer, "_encode", lambda self, text: whole(self, text.replace("\u200b", ""))
    )
    texts = ["one", "\u200b", "two"]
    lines = b"\n".join(json.dumps({"text": text}).encode() for text in texts)
    for changes in ({}, {"tokenizer": {"bos": None, "eos": None}, "blocks": {"packer": "best_fit"}}):
        settings, data = tiny(lines, **changes)
        done = prepare(settings, "a", data)
        assert (done.manifest["ledger"]["kept"], done.manifest["ledger"]["dropped"]) == (2, {"no_ids": 1})
        assert list(verify.faults(done.manifest_path, deep=True)) == []


def test_subsets_that_are_none_are_noticed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_part, "MOST_SUBSETS", 3)
    lines = [json.dumps({"text": "x", "meta": {"pile_set_name": f"https://{n}"}}) for n in range(4)]
    settings, data = tiny("\n".join(lines[:3]).encode())
    assert prepare(settings, "a", data).manifest["ledger"]["kept"] == 3
    settings, data = tiny("\n".join(lines).encode())
    with pytest.raises(
        InputError, match=r"more than 3 subsets; does .* subset_field = 'meta.pile_set_name' name"
    ):
        prepare(settings, "a", data)


def test_a_lower_limit_is_held_against_what_is_done(tiny: Tiny) -> None:
    lines = b"\n".join([b'{"text": "fine"}'] * 100 + [b"{"] * 20)
    settings, data = tiny(lines, clean={"quarantine_limit": 0.5})
    assert not prepare(settings, "a", data).skipped
    stricter, _ = tiny(lines, clean={"quarantine_limit": 0.1})
    with pytest.raises(InputError, match="20 of 120 lines"):
        prepare(stricter, "a", data)
