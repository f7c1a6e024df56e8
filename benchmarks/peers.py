"""The environment of the peers that we are measured beside, and whether theirs are the same ids as ours.

datatrove, Hugging Face datasets and transformers in the versions of peers.txt, in a virtual environment under
the user's cache: their pins are not ours.  Made on first use from the package index; nothing else is
downloaded, the vocabulary is made here, from ours.  Only torch is the project's own (see `train`): it is large,
and all who train shall have the same.  benchmarks/peers/ holds what runs in it.
"""

import base64
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from corpora import demo, settings, tokenizer

PINS = Path(__file__).with_name("peers.txt")
SCRIPTS = Path(__file__).with_name("peers")
IMPORTS = "datasets, datatrove, tokenizers, tiktoken, transformers, psutil, zstandard, orjson"
SHOWN = ("datatrove", "datasets", "tokenizers", "tiktoken", "pyarrow", "numpy")


def main() -> None:
    """Make the environment, and compare its tokenizer's ids with tiktoken's on the demo corpus."""
    python = environment()
    if python is None:
        return
    pins = dict(line.split("==") for line in PINS.read_text("utf-8").splitlines() if "==" in line)
    with tempfile.TemporaryDirectory(prefix="pileline-bench-") as folder:
        root = Path(folder)
        lock = demo.build(root)
        ranks, hugging_face = vocabulary(root)
        told = {"documents": 0, "with a literal": 0, "different": 0}
        for entry in lock.files:
            shard = root / "demo" / "source" / entry.path
            command = [str(python), str(SCRIPTS / "same_ids.py"), str(hugging_face), str(ranks), str(shard)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            told = {key: count + found[key] for key, count in told.items()}
    print("| figure | value |")
    print("|---|---|")
    for name in SHOWN:
        print(f"| {name} | {pins[name]} |")
    print(
        f"| documents compared, tokenizers with tiktoken | {told['documents'] - told['with a literal']:,} |"
    )
    print(f"| with other ids | {told['different']} |")
    print(f"| left out: a literal <\\|endoftext\\|>, a control id to tokenizers | {told['with a literal']} |")
    if told["different"]:
        sys.exit("error: the peers' vocabulary is not ours")


def environment() -> Path | None:
    """Return the Python of the peers' environment, made if need be; None, and a line on why, if it cannot be."""
    pins = PINS.read_bytes()
    key = hashlib.sha256(pins + sys.version.encode()).hexdigest()[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "pileline" / f"peers-{key}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists():
        return python
    print(f"making the peers' environment in {folder} (half a minute to some)", file=sys.stderr, flush=True)
    try:
        _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        _run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(PINS)])
        _run([str(python), "-c", f"import {IMPORTS}"])
    except (OSError, subprocess.CalledProcessError) as error:
        why = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1]
        print(f"The peers were left out: their environment cannot be made here ({why[:200]}).\n", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    ready.touch()  # last, so that it tells of a whole environment
    return python


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def vocabulary(folder: Path) -> tuple[Path, Path]:
    """Write r50k_base as tiktoken's file and as a tokenizer.json of Hugging Face; return both paths."""
    ours = tokenizer.load(settings.Tokenizer(kind="tiktoken", name="r50k_base", backend="own"))
    assert isinstance(ours, tokenizer.TiktokenTokenizer)
    tokens = [ours.encoding.decode_single_token_bytes(n) for n in range(50256)]
    ranks_file, hugging_face = folder / "r50k_base.tiktoken", folder / "tokenizer.json"
    ranks_file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % n for n, token in enumerate(tokens)))
    ranks = {token: n for n, token in enumerate(tokens)}
    # GPT-2 writes bytes as printable characters, and those that are none as chr(256) and on.
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    shown = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}

    def show(token: bytes) -> str:
        return "".join(shown[b] for b in token)

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": 50256, "content": "<|endoftext|>", "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": {show(token): n for n, token in enumerate(tokens)} | {"<|endoftext|>": 50256},
            "merges": [[show(part) for part in _halves(token, ranks)] for token in tokens if len(token) > 1],
        },
    }
    hugging_face.write_text(json.dumps(content), "utf-8")
    return ranks_file, hugging_face


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two tokens whose merge is `token`: what is left of its bytes when all older merges are done."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
