"""A trained run, opened to be used: its newest sound checkpoint, checked before anything is done with it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from corpora import tokenizer
from corpora.errors import InputError
from corpora.files import data_root
from corpora.prepare import MODEL
from models import checkpoint, device
from models.checkpoint import WEIGHTS, State
from models.decoder import Decoder
from models.runs import read_settings
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


def open_run(run: Path, wanted: device.Device = "auto") -> Trained:
    """Open a run's newest sound checkpoint.

    Raises InputError when there is none, when recipe or tokenizer are not those it was trained with, and
    when a weight is not a finite number.
    """
    settings = read_settings(run)
    here = device.choose(wanted)
    newest = checkpoint.newest_sound(run, [WEIGHTS])
    if newest is None:
        raise InputError(f"{run} has no checkpoint yet; run: python -m models train {run}")
    state = checkpoint.read_state(newest)
    checkpoint.check_belongs(newest, state, settings)
    kept = run / MODEL
    if kept.is_file():  # so a run outlives its corpus
        encoder = tokenizer.load(settings.tokenizer, kept)
    else:
        encoder = tokenizer.for_recipe(settings, data_root())
    if encoder.fingerprint != state.tokenizer:
        raise InputError(
            f"{newest} was trained with another tokenizer (fingerprint {state.tokenizer[:8]}, the recipe's now has "
            f"{encoder.fingerprint[:8]}); put the old vocabulary back, or train again"
        )
    weights = checkpoint.load(newest, WEIGHTS, here)
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{newest}: the weight {name} holds numbers that are not finite; train again with a lower lr"
            )
    with torch.device("meta"):
        decoder = Decoder(settings.model)
    decoder.load_state_dict(weights, assign=True)
    decoder.eval()
    return Trained(run, newest, state, settings, decoder, encoder, here)
