"""The floor: encode texts that are in memory, and nothing else:  tiktoken_loop.py VOCABULARY SHARD"""

import base64
import json
import sys
import time
from pathlib import Path

import tiktoken
import zstandard
from tiktoken_ext.openai_public import r50k_pat_str


def load(vocabulary: str) -> tiktoken.Encoding:
    """Build r50k_base from a file in tiktoken's format; tiktoken itself would ask the network."""
    pairs = (line.split() for line in Path(vocabulary).read_bytes().splitlines())
    return tiktoken.Encoding(
        "r50k_base",
        pat_str=r50k_pat_str,
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in pairs},
        special_tokens={"<|endoftext|>": 50256},
    )


def main() -> None:
    vocabulary, shard = sys.argv[1:]
    with zstandard.open(shard, "rb") as file:
        texts = [json.loads(line)["text"] for line in file.read().splitlines()]
    encoding = load(vocabulary)
    tokens, start = 0, time.process_time()
    for text in texts:
        tokens += len(encoding.encode_to_numpy(text, disallowed_special=()))
    cpu = time.process_time() - start
    print(json.dumps({"tokens": tokens, "documents": len(texts), "loop_cpu": cpu}))


if __name__ == "__main__":
    main()
