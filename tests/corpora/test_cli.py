"""`python -m corpora` as a person types it."""

import json
import os
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
        '[tokenizer]\nname = "r50k_base"\nbos = 50256\neos = 50256\n[blocks]\nlength = 8\n'
    )
    return str(path)


def test_every_step_in_order(run: Run, recipe: str, tmp_path: Path) -> None:
    fetched = run("fetch", recipe)
    assert fetched.returncode == 0, fetched.stderr
    assert fetched.stdout.count("(up to date)") == 2

    prepared = run("prepare", recipe)
    assert prepared.returncode == 0, prepared.stderr
    assert prepared.stdout.startswith("a: 20 documents, 10 blocks, ")
    assert run("prepare", recipe).stdout.count("(up to date)") == 2

    stats = run("stats", str(tmp_path / "data")).stdout
    assert "41 = 21 kept + 0 dropped + 20 quarantined" in stats
    assert "20 invalid JSON" in stats

    verified = run("verify", str(tmp_path / "data"))
    assert (verified.returncode, verified.stdout.endswith("2 shards verified, 0 faults\n")) == (0, True)

    out = tmp_path / "parquet"
    converted = run("convert", str(tmp_path / "data"), str(out), "--format", "parquet")
    assert converted.returncode == 0, converted.stderr
    assert run("verify", str(out)).returncode == 0
    files = [str(path) for path in sorted(out.rglob("a/*.parquet"))]
    rows = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows[0]["input_ids"] == [50256, 31373, 995, 50256] * 2

    part = next((tmp_path / "data").rglob("part-0000.arrow"))
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
    limited += (
        f"sys.argv = ['corpora', 'prepare', {recipe!r}]\nrunpy.run_module('corpora', run_name='__main__')"
    )
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
    for step in ("build-demo", "fetch", "prepare", "stats", "verify", "convert"):
        assert step in text
