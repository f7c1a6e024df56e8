"""datatrove as its examples have it:  datatrove_tokens.py TOKENIZER SHARDS OUT TASKS

The defaults but for the seed: batches of 10,000 documents, an EOS after each, documents shuffled.  With an
EOS it drops the BOS, so there is none here.
"""

import json
import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer


def main() -> None:
    tokenizer, shards, out, tasks = sys.argv[1:]
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(shards),
            DocumentTokenizer(f"{out}/tokens", tokenizer, eos_token="<|endoftext|>", seed=0),
        ],
        tasks=int(tasks),
        logging_dir=f"{out}/logs",
    ).run()
    size = sum(path.stat().st_size for path in Path(out, "tokens").glob("*.ds"))
    print(json.dumps({"tokens": size // 2}))


if __name__ == "__main__":
    main()
