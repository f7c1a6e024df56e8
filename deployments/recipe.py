"""A recipe is one complete value: every number of a run stands in one TOML file named after it.

The tables are owned by the rooms that use them (corpora.settings, models.settings); this module composes
them, refuses unknown keys, checks what only the whole can know, and writes the recipe as run.
"""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from corpora.errors import InputError
from corpora.settings import DEPLOYMENTS, locate, parse, read_toml, recipe_path
from models import runs
from models.settings import RunSettings


class Recipe(RunSettings):
    """A whole recipe; `name` is the file's name, not a key in it."""

    description: str = Field(description="one sentence: what the run is for")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.blocks.length > self.model.context:
            raise ValueError(
                f"blocks.length {self.blocks.length} is more than model.context {self.model.context}; "
                "make the blocks shorter or the context longer"
            )
        for key in ("bos", "eos"):
            special = getattr(self.tokenizer, key)
            if special is not None and special >= self.model.vocab:
                raise ValueError(f"tokenizer.{key} {special} is outside model.vocab {self.model.vocab}")
        return self

    def toml(self) -> str:
        """Return the recipe as TOML with every default written out."""
        return runs.recipe_text(self, self.description)


def names() -> list[str]:
    """Return the names of the recipes in deployments/."""
    return sorted(path.stem for path in DEPLOYMENTS.glob("*.toml"))


def load(recipe: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Load a recipe by name or path and change single keys.

    `overrides` maps dotted keys to values, e.g. {"train.lr": 0.001, "corpus.train": ["train/00"]}.
    Raises InputError for an unknown recipe, table or key, and for values that do not fit together.
    """
    path = recipe_path(recipe)
    tables = read_toml(path)
    for dotted, value in (overrides or {}).items():
        *groups, key = dotted.split(".")
        table = tables
        for group in groups:
            table = table.setdefault(group, {})
            if not isinstance(table, dict):
                raise InputError(f"override {dotted!r}: {group!r} is not a table")
        table[key] = value
    locate(tables, path)  # the run keeps the recipe elsewhere
    return parse(Recipe, tables, path)
