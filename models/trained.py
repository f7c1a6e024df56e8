"""A trained run, opened to be used: one of its sound checkpoints, checked before anything is done with it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from corpora import tokenizer
from corpora.errors import InputError
from corpora.files import data_root
from corpora.prepare import MODEL
from models import checkpoint, device, runs
from models.checkpoint import WEIGHTS, State
from models.decoder import Decoder
from models.settings import RunSettings


@dataclass(frozen=True)
class Trained:
    """A network with its tokenizer, and where both come from."""

    run: Path
    checkpoint: Path
    state: State
    settings: RunSettings
    decoder: Decoder
    tokenizer: tokenizer.Tokenizer
    device: torch.device


def open_run(run: Path, wanted: device.Device = "auto", which: str | int | None = None) -> Trained:
    """Open a sound checkpoint of a run: the newest, the best on held-out text, or a step's.

    which: "newest", "best" or a step; by default the newest, of a run that ended early the best

    Raises InputError when there is none, when recipe, tokenizer or shapes are not those it was trained with,
    and when a weight is not a finite number.
    """
    settings = runs.read_settings(run)
    here = device.choose(wanted)
    while True:
        folder = choose(run, which)
        try:
            return _open(run, folder, settings, here)
        except (InputError, OSError):
            if folder.is_dir():
                raise  # else a trainer has removed it just now, and there is a newer one


def choose(run: Path, which: str | int | None = None) -> Path:
    """Return the checkpoint that is meant, its weights as they were written; see `open_run`."""
    if isinstance(which, int):
        return _of_step(run, which)
    if which not in (None, "newest", "best"):
        raise InputError(f"checkpoint {which!r} is unknown; say newest, best or the number of a step")
    newest = checkpoint.newest_sound(run, [WEIGHTS])
    if newest is None:
        raise InputError(f"{run} has no checkpoint yet; run: python -m models train {run}")
    if which == "newest" or (which is None and checkpoint.read_state(newest).ended is None):
        return newest
    best = checkpoint.best(run, [WEIGHTS])
    if best is None and which == "best":
        raise InputError(
            f"{run}: no checkpoint was scored on held-out text at its own step; use the newest, or set "
            "train.save_every to a multiple of train.eval_every in a new recipe"
        )
    return best or newest


def _of_step(run: Path, step: int) -> Path:
    folders = dict(runs.checkpoints(run))
    known = ", ".join(map(str, folders)) or "none"
    if step not in folders:
        raise InputError(f"{run} has no checkpoint of step {step}; it has {known}")
    told = checkpoint.fault(folders[step], [WEIGHTS])
    if told is not None:
        raise InputError(f"{folders[step]}: {told}; take another of its steps: {known}")
    return folders[step]


def _open(run: Path, folder: Path, settings: RunSettings, here: torch.device) -> Trained:
    state = checkpoint.read_state(folder)
    checkpoint.check_belongs(folder, state, settings, tables=("model", "tokenizer"))
    checkpoint.check_belongs(folder, state, settings, allow_changes=True, tables=("train",))
    kept = run / MODEL
    if kept.is_file():  # so a run outlives its corpus
        encoder = tokenizer.load(settings.tokenizer, kept)
    else:
        encoder = tokenizer.for_recipe(settings, data_root())
    if encoder.fingerprint != state.tokenizer:
        raise InputError(
            f"{folder} was trained with another tokenizer (fingerprint {state.tokenizer[:8]}, the recipe's now has "
            f"{encoder.fingerprint[:8]}); put the old vocabulary back, or train again"
        )
    with torch.device("meta"):
        decoder = Decoder(settings.model)
    decoder.document_mask = settings.train.document_mask
    decoder.reset_positions = settings.train.reset_positions
    checkpoint.check_shapes(folder, decoder)
    weights = checkpoint.load(folder, WEIGHTS, here)
    for name, tensor in weights.items():
        if not checkpoint.finite(tensor):
            raise InputError(
                f"{folder}: the weight {name} holds numbers that are not finite; train again with a lower lr"
            )
    decoder.load_state_dict(weights, assign=True)
    decoder.eval()
    return Trained(run, folder, state, settings, decoder, encoder, here)
