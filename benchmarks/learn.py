"""Held-out loss after the same CPU time: the demo recipe beside the tutorial's recipe, on the same blocks.

BENCH_LEARN_SECONDS (300) of CPU time each, one thread.  Ours is `python -m models train` with all that it does:
its start, its scoring and its checkpoint count.  Its learning rate must reach its end within the time, so two
short runs tell how many steps fit.  Of the tutorial's recipe only the steps count.

Bits per byte, of the blocks that a run watches while it trains, and of held-out documents (`python -m models
evaluate`).  The tutorial trains windows of 16 ids, so its later positions never learn: it is scored both in
windows of 16 and of its whole context of 128.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.train import FAMILIES, SCRIPTS, environment
from corpora.prepare import open_blocks
from corpora.progress import Progress
from corpora.tokenizer import for_recipe
from deployments import recipe
from models import data, evaluate, score
from models.decoder import Decoder
from models.settings import Model, RunSettings

RECIPE = "demo"
CALIBRATE = (20, 140)  # steps
SEEN = 0.99  # of the time that the calibration promises: a run should rather end too early


def main() -> None:
    """Print what both have learned."""
    seconds = float(os.environ.get("BENCH_LEARN_SECONDS") or 300)
    with tempfile.TemporaryDirectory(prefix="pileline-bench-") as folder:
        root = Path(folder)
        os.environ |= {"PILELINE_DATA": str(root / "data"), "PILELINE_RUNS": str(root / "runs")}
        for step in (["build-demo"], ["fetch", RECIPE], ["prepare", RECIPE]):
            _run([sys.executable, "-m", "corpora", *step])
        took = [_train(root, steps)[0] for steps in CALIBRATE]
        one = (took[1] - took[0]) / (CALIBRATE[1] - CALIBRATE[0])
        steps = max(1, int((SEEN * seconds - took[0]) / one) + CALIBRATE[0])
        _say(f"{took[0] - one * CALIBRATE[0]:.1f} CPU s of start and end, {one:.3f} of a step: {steps} steps")
        cpu, run = _train(root, steps)
        _run([sys.executable, "-m", "models", "evaluate", str(run)])
        settings = RunSettings.read(run / "recipe.toml")
        last = json.loads((run / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
        (file,) = (run / "evaluations").glob("*.json")
        documents = json.loads(file.read_text("utf-8"))["bits_per_byte"]
        print("| recipe | CPU s | steps | tokens | bits per byte, watched blocks | documents |")
        print("|---|---|---|---|---|---|")
        told = f"{cpu:.0f} | {last['step']:,} | {last['tokens']:,} | {last['val_bpb']:.3f} | {documents:.3f}"
        print(f"| ours, `{RECIPE}` | {told} |", flush=True)
        tutorial, decoder = _tutorial(settings, root, seconds)
        told = f"{tutorial['cpu']:.0f} | {tutorial['steps']:,} | {tutorial['tokens']:,}"
        for context in (16, 128):
            scores = " | ".join(f"{bits:.3f}" for bits in _score(decoder, settings, context))
            print(f"| the tutorial's, scored in windows of {context} | {told} | {scores} |", flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _run(command: list[str]) -> tuple[float, str]:
    """Run a command with one thread; return its CPU seconds and what it printed."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment(), stdout=out, stderr=errors, text=True)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            sys.exit(f"error: {' '.join(command)}:\n{errors.read()[-3000:]}")
        return used.ru_utime + used.ru_stime, out.read()


def _train(root: Path, steps: int) -> tuple[float, Path]:
    """Train the recipe in so many steps; return the CPU seconds and the run folder."""
    # Scored at its beginning and its end, and saved once.
    changes = {f"train.{key}": steps for key in ("steps", "eval_every", "save_every")}
    file = root / f"{RECIPE}-{steps}.toml"
    file.write_text(recipe.load(RECIPE, changes).toml(), "utf-8")
    run = Path(_run([sys.executable, "-m", "models", "new", str(file)])[1].split()[-1])
    cpu, _ = _run([sys.executable, "-m", "models", "train", str(run)])
    return cpu, run


def _tutorial(settings: RunSettings, root: Path, seconds: float) -> tuple[dict[str, Any], Decoder]:
    """Train the tutorial's recipe on our blocks; return what it tells, and its weights in a decoder of ours."""
    shape = {**FAMILIES["GPT"], "layers": 1, "width": 128, "heads": 8, "ffn": 512, "vocab": 50304}
    model = Model(**shape, context=128, head_bias=True)
    blocks = open_blocks(settings, settings.corpus.train, root / "data")
    rows, tokens = blocks.rows(np.arange(len(blocks)))
    ids, weights = root / "ids.npy", root / "weights.safetensors"
    np.save(ids, rows[np.arange(blocks.length) < tokens[:, None]])
    spec = json.dumps({"shape": model.model_dump(), "seconds": seconds})
    told = _run([sys.executable, str(SCRIPTS / "tutorial.py"), spec, str(ids), str(weights)])[1]
    decoder = Decoder(model)
    decoder.load_state_dict(
        {
            name.replace("norm1", "attention_norm").replace("norm2", "mlp_norm"): tensor
            for name, tensor in load_file(weights).items()
        }
    )
    return dict(json.loads(told)), decoder


def _score(decoder: Decoder, settings: RunSettings, context: int) -> tuple[float, float]:
    """Return the bits per byte of watched blocks and of documents, in windows of `context` ids."""
    cpu = torch.device("cpu")
    torch.set_num_threads(1)
    decoder.settings = decoder.settings.model_copy(update={"context": context})
    root = Path(os.environ["PILELINE_DATA"])
    tokenizer = for_recipe(settings, root)
    held_out = open_blocks(settings, settings.corpus.val, root)
    bytes_V = score.bytes_of_ids(tokenizer, decoder.settings.vocab, cpu)

    count = min(settings.train.eval_blocks, len(held_out))
    ids, targets = data.batch(
        held_out, np.arange(count) * len(held_out) // count, decoder.settings.vocab, cpu
    )[:2]
    watched = score.Sums()
    for start in range(0, ids.shape[1], context):
        part = slice(start, start + context)
        nats = decoder(ids[:, part], targets[:, part], reduction="none")
        watched = watched.plus(score.sums(nats, targets[:, part], bytes_V))

    tally = evaluate.Tally()
    found = evaluate.first_documents(settings, tokenizer)
    with Progress("documents", None, "B") as progress:
        evaluate.charge(decoder, tokenizer, found, tally, 64, torch.float32, progress)
    nats_of_text, size = sum(tally.nats.values()), sum(tally.bytes.values())
    return watched.bits_per_byte, nats_of_text / math.log(2) / size


if __name__ == "__main__":
    main()
