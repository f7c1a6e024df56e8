"""A tiny corpus, fetched and prepared by the real code, and run folders of two-layer models over it."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import zstandard

from corpora.fetch import fetch
from corpora.prepare import prepare
from corpora.settings import DataSettings
from models import runs
from models.settings import RunSettings

Make = Callable[..., Path]

TABLES: dict[str, dict[str, Any]] = {
    "blocks": {"length": 32},
    "model": {
        "norm": "rmsnorm",
        "positions": "rope",
        "mlp": "swiglu",
        "layers": 2,
        "width": 16,
        "heads": 4,
        "kv_heads": 2,
        "ffn": 32,
        "vocab": 320,
        "context": 32,
    },
    "train": {
        "steps": 6,
        "batch": 4,
        "optimizer": "muon",
        "lr": 0.01,
        "warmup": 2,
        "log_every": 2,
        "eval_every": 4,
        "eval_blocks": 4,
        "save_every": 3,
    },
    "evaluate": {"bytes": 2000},
    "generate": {"prompts": ["The cat", ""], "max_new_tokens": 8},
}


WORDS = "the cat sat on a mat and some dog ran to its park for more than one long day".split()


def page(number: int) -> dict[str, Any]:
    chosen = random.Random(number)
    words = [chosen.choice(WORDS) for _ in range(60)]
    text = f"Page {number}. " + " ".join(words) + "."
    return {"text": text, "meta": {"pile_set_name": "cats" if number % 2 else "dogs"}}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use one thread, here and in child processes: two that wait for each other on a busy machine are slow."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data root with the corpus `tiny` prepared: shards a and b to train on, v held out."""
    root = tmp_path_factory.mktemp("tiny")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(page(number)["text"] for number in range(60)),
        model_prefix=str(root / "tiny"),
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    entries = []
    for shard, numbers in {"a": range(30), "b": range(30, 60), "v": range(60, 66)}.items():
        packed = zstandard.compress(b"".join(json.dumps(page(n)).encode() + b"\n" for n in numbers))
        (root / f"{shard}.jsonl.zst").write_bytes(packed)
        sha256 = hashlib.sha256(packed).hexdigest()
        entries.append({"name": shard, "path": f"{shard}.jsonl.zst", "size": len(packed), "sha256": sha256})
    lock = {"corpus": "tiny", "url": root.as_uri(), "files": entries}
    (root / "lock.json").write_text(json.dumps(lock))
    settings = DataSettings.model_validate(
        {"blocks": TABLES["blocks"], "corpus": corpus_table(root), "tokenizer": tokenizer_table(root)}
    )
    for shard in ("a", "b", "v"):
        fetch(settings.corpus, shard, root)
        prepare(settings, shard, root)
    return root


def corpus_table(root: Path) -> dict[str, Any]:
    return {"name": "tiny", "train": ["a", "b"], "val": ["v"], "lock": str(root / "lock.json")}


def tokenizer_table(root: Path) -> dict[str, Any]:
    return {"kind": "sentencepiece", "model": str(root / "tiny.model"), "bos": 1, "eos": 2}


@pytest.fixture
def make_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return make(name, table={key: value}, ...) -> a run folder of the tiny recipe with these changes."""
    monkeypatch.setenv("PILELINE_DATA", str(corpus))
    monkeypatch.setenv("PILELINE_RUNS", str(tmp_path))

    return partial(write_run, corpus, tmp_path)


@pytest.fixture(scope="session")
def trained_once(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that was trained until it writes words; copy it before changing it."""
    from models.train import train

    train_table = {"steps": 150, "lr": 0.02, "eval_every": 50}
    prompts = {"prompts": ["The cat", "", "sat " * 60]}
    run = write_run(corpus, tmp_path_factory.mktemp("trained"), train=train_table, generate=prompts)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PILELINE_DATA", str(corpus))
        patched.setenv("OMP_NUM_THREADS", "1")  # before `one_thread` does so: this is made once
        torch.set_num_threads(1)
        train(run, "cpu")
    return run


def write_run(corpus: Path, folder: Path, name: str = "tiny", **changes: dict[str, Any]) -> Path:
    tables = {**TABLES, "corpus": corpus_table(corpus), "tokenizer": tokenizer_table(corpus)}
    tables = {table: {**keys, **changes.get(table, {})} for table, keys in tables.items()}
    text = runs.recipe_text(RunSettings.model_validate(tables), "A tiny model for the tests.")
    return runs.create(name, text, "inputs", folder)
