"""The smoke test: continue every prompt of the recipe, and fail on what a sound model never does."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corpora.errors import InputError
from corpora.files import write_json
from models import device
from models.checkpoint import State
from models.generate import Sampling, Written, write
from models.trained import Trained, open_run


def smoke(run: Path, wanted: device.Device = "auto", which: str | int | None = None) -> dict[str, Any]:
    """Sample, check and write RUN/samples.json; return its content.  A failed check is an InputError.

    which: see `trained.open_run`
    """
    trained = open_run(run, wanted, which)  # refuses weights that are not finite; `write` refuses such logits
    generate = trained.settings.generate
    check_learned(trained.state)
    sampling = Sampling(generate.temperature, generate.top_p, generate.seed)
    samples = []
    for prompt in generate.prompts:
        for method, how in (("greedy", None), ("top_p", sampling)):
            written = _write(trained, prompt, how)
            check_written(f"{method} of {prompt!r}", written, trained.tokenizer.vocab_size)
            check_same(f"{method} of {prompt!r}", written, _write(trained, prompt, how))
            samples.append(
                {
                    "prompt": prompt,
                    "method": method,
                    "text": written.text,
                    "new_tokens": len(written.ids),
                    "ended": written.ended,
                }
            )
    checks = [
        "weights and logits are finite",
        f"held-out loss {trained.state.scores.val_loss:.3f} beats the untrained model's "
        f"{trained.state.untrained.val_loss:.3f}",
        "every sample has text",
        "every id is one of the tokenizer's",
        "the same seed gives the same sample",
    ]
    told: dict[str, Any] = {
        "samples": samples,
        "checks": [{"check": check, "passed": True} for check in checks],
        "checkpoint": str(trained.checkpoint),
        "step": trained.state.step,
        "file": str(run / "samples.json"),
    }
    write_json(run / "samples.json", told)
    return told


def _write(trained: Trained, prompt: str, sampling: Sampling | None) -> Written:
    return write(
        trained.decoder, trained.tokenizer, prompt, trained.settings.generate.max_new_tokens, sampling
    )


def check_learned(state: State) -> None:
    """Fail when training has not lowered the held-out loss."""
    trained, untrained = state.scores.val_loss, state.untrained.val_loss
    if not (math.isfinite(trained) and trained < untrained):
        raise InputError(
            f"smoke test: the held-out loss of step {state.scored_step} is {trained:.4f}, the untrained model's was "
            f"{untrained:.4f}; the model has learned nothing: train longer, or change train.lr"
        )


def check_written(what: str, written: Written, vocab_size: int) -> None:
    """Fail on an empty sample and on ids that the tokenizer does not have."""
    if not written.ids or not written.text:
        raise InputError(f"smoke test: {what} is empty ({len(written.ids)} new tokens); train longer")
    outside = _outside(written.ids, vocab_size)
    if outside:
        raise InputError(f"smoke test: {what} has id {outside[0]}, the tokenizer has {vocab_size} ids")


def check_same(what: str, written: Written, again: Written) -> None:
    """Fail when the same seed did not give the same ids."""
    if written.ids != again.ids:
        raise InputError(
            f"smoke test: {what} was different the second time, with the same seed; the device computes at random"
        )


def _outside(ids: Sequence[int], vocab_size: int) -> list[int]:
    return [i for i in ids if not 0 <= i < vocab_size]
