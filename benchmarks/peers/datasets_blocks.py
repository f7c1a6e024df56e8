"""Hugging Face datasets, as its language-model example has it:  datasets_blocks.py ENGINE FILE SHARDS OUT PROCESSES

ENGINE is `tokenizers` (FILE is a tokenizer.json) or `tiktoken` (FILE is in tiktoken's format).  Load, map to
ids, map to blocks of 2,048 (the example's group_texts, without its copy of the ids as labels), save.
"""

import functools
import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import load_dataset
from tiktoken_loop import load
from tokenizers import Tokenizer

LENGTH = 2048
BOS = EOS = 50256


@functools.cache
def _hugging_face(file: str) -> Tokenizer:
    return Tokenizer.from_file(file)


_tiktoken = functools.cache(load)


def with_tokenizers(batch: dict[str, Any], file: str) -> dict[str, Any]:
    encoded = _hugging_face(file).encode_batch(batch["text"], add_special_tokens=False)
    return {"input_ids": [[BOS, *encoding.ids, EOS] for encoding in encoded]}


def with_tiktoken(batch: dict[str, Any], file: str) -> dict[str, Any]:
    return {"input_ids": [[BOS, *_tiktoken(file).encode_ordinary(text), EOS] for text in batch["text"]]}


def group_texts(batch: dict[str, Any]) -> dict[str, Any]:
    ids = list(chain.from_iterable(batch["input_ids"]))
    return {"input_ids": [ids[i : i + LENGTH] for i in range(0, len(ids) // LENGTH * LENGTH, LENGTH)]}


def main() -> None:
    engine, file, shards, out, processes = sys.argv[1:]
    count = int(processes) if processes != "1" else None  # None: in this process
    files = sorted(str(path) for path in Path(shards).glob("*.jsonl.zst"))
    texts = load_dataset("json", data_files=files, split="train", cache_dir=out, num_proc=count)
    encode = {"tokenizers": with_tokenizers, "tiktoken": with_tiktoken}[engine]
    ids = texts.map(
        encode, batched=True, num_proc=count, remove_columns=texts.column_names, fn_kwargs={"file": file}
    )
    blocks = ids.map(group_texts, batched=True, num_proc=count)
    blocks.to_parquet(f"{out}/blocks.parquet")
    print(json.dumps({"tokens": len(blocks) * LENGTH}))


if __name__ == "__main__":
    main()
