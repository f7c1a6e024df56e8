"""A tiny corpus on disk: shards of given lines, their lock, and settings that read them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from corpora.fetch import fetch
from corpora.settings import DataSettings


def document(text: str, subset: str = "Github") -> bytes:
    return json.dumps({"text": text, "meta": {"pile_set_name": subset}}).encode() + b"\n"


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., tuple[DataSettings, Path]]:
    """Return make(lines, ...) -> (settings, data root): shard `a` of these bytes, fetched; `v` held out."""

    def make(lines: bytes, *, compressed: bytes | None = None, **changes: Any) -> tuple[DataSettings, Path]:
        source = tmp_path / "source"
        source.mkdir(exist_ok=True)
        files = []
        for name, data in (("a", lines), ("v", document("held out"))):
            packed = zstandard.ZstdCompressor().compress(data)
            if name == "a" and compressed is not None:
                packed = compressed
            (source / f"{name}.jsonl.zst").write_bytes(packed)
            sha256 = hashlib.sha256(packed).hexdigest()
            files.append({"name": name, "path": f"{name}.jsonl.zst", "size": len(packed), "sha256": sha256})
        lock = {"corpus": "tiny", "url": source.as_uri(), "files": files}
        (source / "lock.json").write_text(json.dumps(lock))
        tables: dict[str, Any] = {
            "corpus": {"name": "tiny", "train": ["a"], "val": ["v"], "lock": str(source / "lock.json")},
            "tokenizer": {"name": "r50k_base", "bos": 50256, "eos": 50256},
            "blocks": {"length": 16},
        }
        for table, keys in changes.items():
            tables.setdefault(table, {}).update(keys)
        settings = DataSettings.model_validate(tables)
        data = tmp_path / "data"
        for name in ("a", "v"):
            fetch(settings.corpus, name, data)
        return settings, data

    return make
