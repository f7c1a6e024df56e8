"""The scores of the nights before: RUNS/nightly.jsonl, one line for each recipe and night."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from corpora import files
from corpora.errors import InputError
from corpora.settings import Strict


class Night(Strict):
    """One recipe's score in one night."""

    time: str
    recipe: str
    checkpoint: str
    step: int
    eval_set: str
    bits_per_byte: float
    subsets: dict[str, float]
    samples: tuple[dict[str, Any], ...] = ()


def read(path: Path) -> list[Night]:
    """Read all nights, oldest first; none yet is an empty list."""
    if not path.is_file():
        return []
    nights = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            nights.append(Night.model_validate_json(line))
        except ValidationError as error:
            fault = error.errors()[0]["msg"]
            raise InputError(
                f"{path}:{number}: not a line of ours ({fault}); remove that line or move the file away"
            ) from None
    return nights


def last(nights: Sequence[Night], recipe: str) -> Night | None:
    """Return the recipe's newest night."""
    return next((night for night in reversed(nights) if night.recipe == recipe), None)


def append(path: Path, nights: Sequence[Night]) -> None:
    """Add nights at the end.  The file is written anew and renamed: a crash never leaves half a line."""
    lines = [json.dumps(night.model_dump(mode="json"), ensure_ascii=False) for night in nights]
    before = path.read_text("utf-8") if path.is_file() else ""
    with files.write_aside(path) as aside:
        aside.write_text(before + "".join(f"{line}\n" for line in lines), "utf-8")
