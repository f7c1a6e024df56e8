"""Do tokenizers and tiktoken give the same ids?  same_ids.py TOKENIZER VOCABULARY SHARD

Texts with a literal <|endoftext|> are counted apart: tokenizers makes it the control id, tiktoken does not.
"""

import json
import sys

import zstandard
from tiktoken_loop import load
from tokenizers import Tokenizer


def main() -> None:
    file, vocabulary, shard = sys.argv[1:]
    peer, ours = Tokenizer.from_file(file), load(vocabulary)
    told = {"documents": 0, "with a literal": 0, "different": 0}
    with zstandard.open(shard, "rb") as lines:
        for line in lines.read().splitlines():
            text = json.loads(line)["text"]
            told["documents"] += 1
            if "<|endoftext|>" in text:
                told["with a literal"] += 1
            else:
                told["different"] += peer.encode(text).ids != ours.encode_ordinary(text)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
