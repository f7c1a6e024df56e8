"""A shard to blocks: the ledger balances, the same input gives the same bytes, and nothing half-made counts."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from corpora import prepare as step
from corpora import tokenizer, verify
from corpora.errors import InputError
from corpora.files import read_json, write_json
from corpora.ledger import broken_laws, total
from corpora.prepare import blocks_fingerprint, documents, open_blocks, prepare
from corpora.settings import DataSettings

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


def tree(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_line_and_token_is_accounted_for(tiny: Tiny) -> None:
    settings, data = tiny(LINES)
    done = prepare(settings, "a", data)
    assert done.manifest["ledger"] == {
        "length": 16,
        "lines": 8,
        "kept": 3,
        "dropped": {"blank line": 1, "empty": 1},
        "quarantined": {"invalid JSON": 1, "invalid UTF-8": 1, "text is not a string": 1},
        "cleaned": {"byte order mark": 1, "newlines": 1, "lone surrogates": 1},
        "text_tokens": 2 + 10 + 3,
        "special_tokens": 6,
        "blocks": 2,
        "padding": 11,
        "subsets": {
            "Github": {"documents": 1, "bytes": 11, "tokens": 2},
            "Pile-CC": {"documents": 1, "bytes": 17, "tokens": 10},
            "unknown": {"documents": 1, "bytes": 5, "tokens": 3},
        },
    }
    bad = [
        json.loads(line) for line in (done.manifest_path.parent / "quarantine.jsonl").read_text().splitlines()
    ]
    shard = {"shard": "a"}
    assert bad == [
        shard | {"line": 4, "offset": 136, "bytes": 7, "reason": "invalid JSON", "start": "{broken"},
        shard
        | {"line": 5, "offset": 144, "bytes": 13, "reason": "invalid UTF-8", "start": '{"text": "\\xff"}'},
        shard
        | {"line": 6, "offset": 158, "bytes": 11, "reason": "text is not a string", "start": '{"text": 5}'},
    ]
    assert LINES[136 : 136 + 7] == b"{broken"


def test_blocks_decode_to_the_cleaned_text(tiny: Tiny) -> None:
    settings, data = tiny(LINES)
    prepare(settings, "a", data)
    blocks = open_blocks(settings, ["a"], data)
    ids, tokens = blocks.rows(range(len(blocks)))
    assert tokens.tolist() == [16, 5]
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
@given(st.lists(anything, max_size=12), st.integers(2, 40))
def test_the_laws_hold_for_any_shard(tiny: Tiny, lines: list[bytes], length: int) -> None:
    keep = b'\n{"text": "one to keep"}'
    settings, data = tiny(b"\n".join(lines) + keep, blocks={"length": length})
    done = prepare(settings, "a", data)
    ledger = done.manifest["ledger"]
    assert broken_laws(ledger) == []
    assert ledger["lines"] == (len(lines) or 1) + 1
    bad = (done.manifest_path.parent / "quarantine.jsonl").read_bytes()
    assert bad.count(b"\n") == sum(ledger["quarantined"].values())
    assert list(verify.faults(done.manifest_path)) == []


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
    part = done.manifest_path.parent / "part-0000.arrow"
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
    part = done.manifest_path.parent / "part-0000.arrow"
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
        (b"{}\n{}\n\n", None, "no document to keep .3 lines: 2 no text, 1 blank line"),
    ],
    ids=["truncated", "not zstd", "empty", "all bad"],
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


def test_a_million_spaces_are_quarantined_not_fatal(tiny: Tiny) -> None:
    wide = json.dumps({"text": " " * 1_000_001 + "a"}).encode()
    settings, data = tiny(wide + b"\n" + LINES)
    ledger = prepare(settings, "a", data).manifest["ledger"]
    assert ledger["quarantined"]["tokenizer failed"] == 1
    assert broken_laws(ledger) == []


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    lines = b"\n".join(json.dumps({"text": f"{n} line " * 200}).encode() for n in range(1500))
    settings, data = tiny(lines)
    recipe = tmp_path / "recipe.toml"
    corpus = settings.corpus
    recipe.write_text(
        f'[corpus]\nname = "tiny"\ntrain = ["a"]\nval = ["v"]\nlock = "{corpus.lock}"\n'
        '[tokenizer]\nname = "r50k_base"\nbos = 50256\neos = 50256\n[blocks]\nlength = 16\n'
    )
    command = [sys.executable, "-m", "corpora", "prepare", str(recipe), "--shard", "a"]
    environment = {**os.environ, "PILELINE_DATA": str(data)}

    blocks = data / "tiny" / "blocks"

    def run(kill_at: int | None = None) -> int:
        """Prepare; with `kill_at`, SIGKILL once that many bytes of blocks are written."""
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        while kill_at is not None and child.poll() is None:
            if any(path.stat().st_size >= kill_at for path in blocks.rglob(".part-0000.arrow.*.part")):
                child.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        return child.wait()

    assert run() == 0
    whole = tree(blocks)
    (part,) = blocks.rglob("part-0000.arrow")
    size = part.stat().st_size
    for share in (0, 0.3, 0.6):
        for path in [path for path in blocks.rglob("*") if path.is_file()]:
            path.unlink()
        assert run(kill_at=int(share * size)) == -signal.SIGKILL
        left = list(tree(blocks))
        assert left and all(name.endswith(".part") for name in left)
        assert run() == 0
        assert tree(blocks) == whole


def test_totals_add_up(tiny: Tiny) -> None:
    settings, data = tiny(LINES)
    ledgers = [prepare(settings, shard, data).manifest["ledger"] for shard in ("a", "v")]
    both = total(ledgers)
    assert broken_laws(both) == []
    assert both["lines"] == 9
    assert both["subsets"]["Github"] == {"documents": 2, "bytes": 19, "tokens": 4}


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
