"""What a checkpoint knows of itself, sealed by a sha256 of its own, and which recipes it belongs to."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from corpora.errors import InputError
from corpora.files import sha256_json
from corpora.settings import Strict, explain
from models.settings import RunSettings

log = logging.getLogger(__name__)

STATE = "state.json"
TABLES = ("model", "train", "tokenizer")
# Keys of [train] that cannot change a weight: how often something is told or kept, and where.
INDIFFERENT = {"train": {"log_every", "log_to", "save_every", "keep"}}
NOTHING = "nothing"


class Scores(Strict):
    """Held-out loss in nats per token, and bits per byte of text."""

    val_loss: float
    val_bpb: float


class Skip(Strict):
    """A data step whose blocks no update was made of."""

    data_step: int
    reason: str


class RollBack(Strict):
    """A return to the checkpoint of step `back_to`; the data steps first..last are not in the weights."""

    back_to: int
    first: int
    last: int
    reason: str


class Best(Strict):
    """The lowest held-out bits per byte so far."""

    step: int
    val_bpb: float


class State(Strict):
    """Where a run is, and what its weights were made of.

    step, tokens: updates made, targets trained on
    settings: the keys of the recipe that decide the weights
    data: fingerprint of the blocks it was trained on
    order: version of the rule that puts them in order
    made_on: device, threads and version, on which the last bits depend
    untrained, scores, scored_step: held-out loss before the first step, and newest, and of which step
    files: sha256 of the checkpoint's other files
    offset: step s trains on the blocks of data step s + offset; grows with each skip and roll-back
    bad: bad steps in a row just before this one
    norms: gradient norms of the newest good steps, for the spike rule
    worse: held-out losses in a row that were not the best
    ended: "early" when `train.patience` was used up
    """

    step: int
    tokens: int
    settings: dict[str, dict[str, Any]]
    data: str
    order: str
    tokenizer: str
    parameters: int
    made_on: str
    untrained: Scores
    scores: Scores
    scored_step: int
    files: dict[str, str] = Field(default_factory=dict)
    offset: int = 0
    roll_backs: tuple[RollBack, ...] = ()
    skipped: tuple[Skip, ...] = ()
    bad: int = 0
    norms: tuple[float, ...] = ()
    best: Best | None = None
    worse: int = 0
    ended: Literal["early"] | None = None

    def sealed(self) -> str:
        """Return the state as JSON with its own sha256."""
        fields = self.model_dump(mode="json")
        return json.dumps({**fields, "sha256": sha256_json(fields)}, indent=2, allow_nan=False) + "\n"


def parse(text: bytes) -> State | str:
    """Return a sealed state, or what is wrong with it."""
    try:
        fields = json.loads(text)
        whole = fields.pop("sha256") == sha256_json(fields)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        whole = False
    if not whole:
        return f"{STATE} is not as it was written"
    try:
        return State.model_validate(fields)
    except ValidationError as error:
        told = " ".join(explain(State, error).split())[:300]
        return f"{STATE} was written by another version of this program ({told})"


def check_belongs(
    folder: Path,
    state: State,
    settings: RunSettings,
    allow_changes: bool = False,
    tables: Sequence[str] = TABLES,
) -> None:
    """Refuse a checkpoint that was trained by another recipe, and name keys that differ.

    allow_changes: warn of each instead
    tables: those of the recipe that matter for what is to be done
    """
    now = decisive(settings)
    ours = dict(_keys({table: now[table] for table in tables}))
    theirs = dict(_keys({table: state.settings.get(table, {}) for table in tables}))
    differing = [
        f"{key} {theirs.get(key, NOTHING)} in the checkpoint, {ours.get(key, NOTHING)} in the recipe"
        for key in {**ours, **theirs}
        if theirs.get(key, NOTHING) != ours.get(key, NOTHING)
    ]
    if allow_changes:
        for difference in differing:
            log.warning("%s: %s", folder, difference)
    elif differing:
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise InputError(
            f"{folder} belongs to another recipe ({'; '.join(differing[:3])}{more}); "
            "make a run folder of its own: python -m models new RECIPE"
            + ("; or train on all the same: --allow-changes" if "train" in tables else "")
        )


def decisive(settings: RunSettings) -> dict[str, dict[str, Any]]:
    """Return the tables that decide the weights, given the blocks, without the keys that cannot."""
    return {
        table: getattr(settings, table).model_dump(mode="json", exclude=INDIFFERENT.get(table))
        for table in TABLES
    }


def _keys(tables: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of every key, of tables in tables as well."""
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
