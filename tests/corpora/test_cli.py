"""`python -m corpora` as a person types it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from corpora.settings import DataSettings

ROOT = Path(__file__).resolve().parents[2]
Tiny = Callable[..., tuple[DataSettings, Path]]
Run = Callable[..., subprocess.CompletedProcess[str]]

LINES = b'{"text": "hello world", "meta": {"pile_set_name": "Github"}}\n{broken\n' * 20


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def corpora(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PILELINE_DATA": str(tmp_path / "data")}
        command = [sys.executable, "-m", "corpora", *words]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    return corpora


@pytest.fixture
def recipe(tiny: Tiny, tmp_path: Path) -> str:
    settings, _ = tiny(LINES)
    path = tmp_path / "mine.toml"
    path.write_text(
        f'[corpus]\nname = "tiny"\ntrain = ["a"]\nval = ["v"]\nlock = "{settings.corpus.lock}"\n'
        '[tokenizer]\nname = "r50k_base"\nbos = 50256\neos = 50256\n[blocks]\nlength = 8\n[clean]\nquarantine_limit = 0.5\n'
    )
    return str(path)


def test_lists(run: Run, recipe: str) -> None:
    listed = run("list").stdout
    assert (
        "corpora:  demo, pile, pile-uncopyrighted\n" in listed
        and "recipes:  13m, 13m-gpt, 13m-sp, 2b, " in listed
    )
    pile = run("list", "pile-uncopyrighted").stdout.splitlines()
    assert len(pile) == 33
    assert pile[1].split() == "train/00 11,152,428,427 bytes sha256 d272462df195e277 not here".split()
    assert pile[6].split() == "train/05 about 11,150,000,000 bytes sha256 not known yet not here".split()
    assert [line.split()[-1] for line in run("list", recipe).stdout.splitlines()[1:]] == ["here", "here"]
    unknown = run("list", "nothing")
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)


def test_estimate_tells_both_halves(run: Run) -> None:
    told = run("estimate", "13m")
    assert told.returncode == 0, told.stderr
    rows = {line.split()[0]: line for line in told.stdout.splitlines()}
    memory = "memory parameters gradients optimizer activations loss framework copy in".split()
    assert list(rows) == ["shards", "text", "tokens", "disk", "prepare", "model", *memory, "time", "GPU"]
    assert rows["shards"] == "shards     2, about 11,490,428,427 bytes; about 11,490,428,427 to download"
    assert "13,200,576 parameters, trained on 268,435,200 tokens" in rows["model"]
    assert "measured on Python's own sources" in rows["prepare"]


def test_own_folder_from_lock_to_blocks(run: Run, tmp_path: Path) -> None:
    for split, count in (("train", 5), ("val", 2)):
        (tmp_path / "texts" / split).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "texts" / split / f"{number}.txt").write_text(f"{split} text {number}\n" * 3, "utf-8")
    source = tmp_path / "own.toml"
    source.write_text('name = "own"\nfolder = "texts"\ntext_shards = 1\n', "utf-8")
    locked = run("lock", str(source))
    assert locked.returncode == 0, locked.stderr
    assert locked.stdout.endswith(": 2 shards, 20,480 bytes\n")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[corpus]\nname = "own"\ntrain = ["train/0"]\nval = ["val/0"]\nlock = "{tmp_path}/own.lock.json"\n'
        '[tokenizer]\nname = "r50k_base"\nbos = 50256\neos = 50256\n[blocks]\nlength = 8\n[clean]\nquarantine_limit = 0.5\n'
    )
    assert run("fetch", str(recipe)).returncode == 0
    prepared = run("prepare", str(recipe))
    assert "\ntrain/0: 5 documents, " in f"\n{prepared.stdout}", prepared.stderr
    verified = run("verify", str(tmp_path / "data"))
    assert verified.stdout.endswith(": 2 fetched and 2 prepared shards verified, 0 faults\n")


def test_fetch_goes_on_after_a_failure_and_names_it(run: Run, recipe: str, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "source" / "a.jsonl.zst").unlink()
    fetched = run("fetch", recipe)
    assert fetched.returncode == 2
    assert fetched.stdout.startswith("v: ")
    (failure,) = [line for line in fetched.stderr.splitlines() if line.startswith("error: ")]
    assert "a.jsonl.zst: cannot be read: No such file or directory" in failure
    assert "bytes to download" in fetched.stderr


def test_verify_names_every_damaged_file(run: Run, recipe: str, tmp_path: Path) -> None:
    raw = tmp_path / "data" / "tiny" / "raw"
    for name in ("a", "v"):
        path = raw / f"{name}.jsonl.zst"
        content = bytearray(path.read_bytes())
        path.unlink()  # a second name of the source's file
        content[-1] ^= 1
        path.write_bytes(content if name == "a" else content[:-1])
    (raw / "stranger.jsonl.zst").write_bytes(b"x")
    verified = run("verify", str(tmp_path / "data"))
    assert verified.returncode == 2
    told = verified.stderr.splitlines()
    assert [line.rpartition("/")[2].partition(": ")[0] for line in told] == [
        "a.jsonl.zst",
        "stranger.jsonl.zst",
        "v.jsonl.zst",
    ]
    assert (
        "sha256 is " in told[0]
        and "its receipt is missing or torn" in told[1]
        and "bytes, its rec" in told[2]
    )
    listed = run("list", recipe).stdout.splitlines()[1:]
    assert all(line.endswith("here, not checked since it was changed") for line in listed)


def test_every_step_in_order(run: Run, recipe: str, tmp_path: Path) -> None:
    fetched = run("fetch", recipe)
    assert fetched.returncode == 0, fetched.stderr
    assert fetched.stdout.count("(up to date)") == 2

    prepared = run("prepare", recipe)
    assert prepared.returncode == 0, prepared.stderr
    assert "\na: 20 documents, 10 blocks, " in f"\n{prepared.stdout}"
    assert run("prepare", recipe).stdout.count("(up to date)") == 2

    stats = run("stats", str(tmp_path / "data")).stdout
    assert ": 2 shards, encoded by tiktoken 0.14.0 (2 parts)\n" in stats
    assert "41 = 21 kept + 0 dropped + 20 quarantined" in stats
    assert "20 invalid JSON" in stats
    (card,) = (tmp_path / "data").rglob("README.md")
    assert "21" in card.read_text()

    explained = run("explain", str(tmp_path / "data"), "1")
    assert explained.stdout.startswith("block 1: row 1 of ") and "  | hello world\n" in explained.stdout
    assert run("explain", str(tmp_path / "data"), "999").stderr.startswith(
        "error: block 999: there are 11 here"
    )

    sampled = run("sample", recipe, "--documents", "5")
    assert sampled.returncode == 0 and "invalid JSON" in sampled.stdout

    verified = run("verify", str(tmp_path / "data"))
    assert (
        verified.returncode,
        verified.stdout.endswith(": 2 fetched and 2 prepared shards verified, 0 faults\n"),
    ) == (0, True)

    out = tmp_path / "parquet"
    converted = run("convert", str(tmp_path / "data"), str(out), "--format", "parquet")
    assert converted.returncode == 0, converted.stderr
    assert run("verify", str(out)).returncode == 0
    files = [str(path) for path in sorted(out.rglob("a/*.parquet"))]
    rows = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows[0]["input_ids"] == [50256, 31373, 995, 50256] * 2

    (root,) = (out / "tiny" / "blocks").iterdir()
    splits = datasets.load_dataset(str(root), cache_dir=str(tmp_path / "cache"))
    assert {name: split.num_rows for name, split in splits.items()} == {"train": 10, "validation": 1}
    (shard,) = (path.parent for path in (tmp_path / "data").rglob("a/manifest.json"))
    refused = run("convert", str(shard), str(tmp_path / "other"))
    assert refused.returncode == 2 and "is one shard of" in refused.stderr

    # A trained tokenizer has a manifest of its own, which is not a shard's.
    other = tmp_path / "data" / "tiny" / "tokenizers" / "bpe-1" / "manifest.json"
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    for step in ("stats", "verify"):
        assert run(step, str(tmp_path / "data")).returncode == 0
    (folder := tmp_path / "data" / "x" / "manifest.json").mkdir(parents=True)
    refused = run("stats", str(folder.parent))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    folder.rmdir()

    part = next((tmp_path / "data").rglob("part-00000.arrow"))
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    damaged = run("verify", str(tmp_path / "data"))
    assert damaged.returncode == 2
    assert damaged.stderr.startswith(f"error: {part}: sha256 is ")


def test_events_are_json_lines(run: Run, recipe: str) -> None:
    events = [
        json.loads(line) for line in run("prepare", recipe, "--shard", "a", "--events").stdout.splitlines()
    ]
    assert {event["event"] for event in events[:-1]} == {"progress"}
    *_, progress, result = events
    assert (progress["what"], result["event"]) == ("prepare a", "result")
    assert progress["done"] == progress["total"]
    assert (result["skipped"], result["ledger"]["kept"]) == (False, 20)
    assert Path(result["manifest"]).is_file()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["prepare", "13M"], "error: recipe '13M' is unknown; known: "),
        (
            ["fetch", "{recipe}", "--shard", "nope"],
            "error: corpus tiny: no shard 'nope' in its lock; it has: a, v",
        ),
        (["prepare", "demo"], "error: "),
        (["stats", "{data}/none"], "no manifest.json under it"),
        (["prepare", "{recipe}", "--workers", "0"], "--workers is a number above 0"),
        (["train-tokenizer", "{recipe}"], "has no [tokenizer.train]"),
        (["convert", "{data}", "{data}/inside"], "lies inside"),
    ],
)
def test_faults_are_one_line(run: Run, recipe: str, tmp_path: Path, words: list[str], error: str) -> None:
    done = run(*(word.format(recipe=recipe, data=tmp_path / "data") for word in words))
    assert (done.returncode, done.stdout) == (2, "")
    assert error in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_full_disk_is_one_line_and_leaves_nothing(recipe: str, tmp_path: Path) -> None:
    # A limit on the size of files stands for the end of the disk: both end a write.
    limited = "import resource, signal, sys, runpy\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
    limited += f"sys.argv = ['corpora', 'prepare', {recipe!r}, '--shard', 'a']\n"
    limited += "runpy.run_module('corpora', run_name='__main__')"
    environment = {**os.environ, "PILELINE_DATA": str(tmp_path / "data")}
    command = [sys.executable, "-c", limited]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "no space left on the disk; free some space" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not [path for path in (tmp_path / "data" / "tiny" / "blocks").rglob("*") if path.is_file()]


def test_help_names_every_step(run: Run) -> None:
    text = run("--help").stdout
    for step in ("build-demo", "fetch", "sample", "prepare", "stats", "explain", "verify", "convert"):
        assert step in text
