"""The data half of a recipe: which shards, how they are cleaned, tokenized and cut into blocks.

A recipe is a TOML file in deployments/ (or anywhere).  This module owns the tables [corpus], [clean],
[tokenizer] and [blocks]; models.settings owns the others; deployments.recipe composes both.
"""

import re
import tomllib
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from corpora.errors import InputError

DEPLOYMENTS = Path(__file__).resolve().parents[1] / "deployments"
S = TypeVar("S", bound=BaseModel)

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,120}$"
SHARD = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,120}(/[A-Za-z0-9][A-Za-z0-9._-]{0,120}){0,5}$"


def expand(pattern: str) -> list[str]:
    """Expand braces as a shell does: "train/{00..02}" is train/00, train/01, train/02; "{a,b}" is a, b.

    Raises ValueError for braces that do not pair, that are empty, or that stand for more than 100,000 names.
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        if set(pattern) & set("{}"):
            raise ValueError(f"{pattern[:80]!r}: a brace without its other half")
        return [pattern]
    if numbers := re.fullmatch(r"([0-9]{1,9})\.\.([0-9]{1,9})", found[1]):
        first, last = int(numbers[1]), int(numbers[2])
        if not 0 <= last - first < 100_000:
            raise ValueError(f"{pattern[:80]!r}: {{{found[1]}}} counts down, or too far")
        width = len(numbers[1])
        inner = [f"{number:0{width}}" for number in range(first, last + 1)]
    else:
        inner = found[1].split(",")
        if len(inner) < 2:
            raise ValueError(
                f"{pattern[:80]!r}: {{{found[1]}}} is neither a range as 00..29 nor a list as a,b"
            )
    names = [
        before + middle + after
        for before in [pattern[: found.start()]]
        for middle in inner
        for after in expand(pattern[found.end() :])
    ]
    if len(names) > 100_000:
        raise ValueError(f"{pattern[:80]!r}: stands for more than 100,000 names")
    return names


class Strict(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Corpus(Strict):
    """[corpus] Which shards are read."""

    name: str = Field(
        pattern=NAME,
        description="folder under the data root; `demo` and `pile-uncopyrighted` bring their own lock",
    )
    train: tuple[str, ...] = Field(
        min_length=1, description="shards to train on, by their names in the lock; train/{00..04} is five"
    )
    val: tuple[str, ...] = Field(min_length=1, description="held-out shards that training is scored on")
    test: tuple[str, ...] = Field(
        default=(),
        description="held-out shards that are fetched and prepared, not looked at in training",
    )
    url: str | None = Field(
        default=None, description="base URL (file:, http: or https:) instead of the lock's own"
    )
    lock: Path | None = Field(
        default=None,
        description="lock file (name, size, sha256) of a corpus that does not bring its own",
    )
    text_field: str = Field(default="text", description="JSON key of the document's text")
    subset_field: str = Field(
        default="meta.pile_set_name", description="dotted JSON path of the subset's name"
    )
    sample_by: Literal["document", "paragraph", "line"] = Field(
        default="document",
        description="what is a document in .txt and .tar shards: a whole file, a paragraph or a line",
    )
    max_record_bytes: int = Field(
        default=64 << 20, ge=1, description="a longer line (or row, or text) is quarantined unparsed"
    )
    max_window_bytes: int = Field(
        default=128 << 20,
        ge=1024,
        le=1 << 31,
        description="memory that a zstd frame may ask for; `zstd --long=31` needs 2_147_483_648",
    )
    max_expansion: int = Field(
        default=200,
        ge=2,
        description="bytes of text that a compressed byte may become before a shard is taken for a bomb",
    )

    @field_validator("train", "val", "test")
    @classmethod
    def _expanded(cls, shards: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for shard in shards for name in expand(shard))

    @property
    def shards(self) -> tuple[str, ...]:
        """All shards, train first."""
        return (*self.train, *self.val, *self.test)

    @model_validator(mode="after")
    def _held_out_is_held_out(self) -> Self:
        shards = self.shards
        twice = sorted({s for s in shards if shards.count(s) > 1})
        if twice:
            raise ValueError(f"shard {twice[0]!r} is listed twice in train, val and test")
        return self


Rule = Literal["byte_order_mark", "newlines", "mojibake", "line_separators", "control_characters", "nfc"]


class Clean(Strict):
    """[clean] What is done to a document's text; every rule is counted in the ledger, for each subset."""

    profiles: dict[str, tuple[Rule, ...]] = Field(
        default={},
        description="rules by the name of a profile: changes `prose` or `safe`, or adds one of your own",
    )
    subsets: dict[str, str] = Field(
        default={},
        description="profile by subset, beside those known for the Pile; a subset in neither gets `safe`",
    )
    min_chars: int = Field(
        default=1,
        ge=1,
        description="drop documents with fewer characters, white space at both ends not counted",
    )
    duplicates: Literal["off", "tag", "drop"] = Field(
        default="tag",
        description="documents equal to an earlier one of their part: not looked for, counted, or dropped",
    )
    quarantine_limit: float = Field(
        default=0.001,
        ge=0,
        le=1,
        description="share of a shard's records that may be quarantined, beyond the first ten, before it fails",
    )


class TrainTokenizer(Strict):
    """[tokenizer.train] A SentencePiece model of the pipeline's own: BPE with byte fallback."""

    vocab: int = Field(default=32_000, ge=300, le=1 << 20, description="number of ids, special ones included")
    bytes: int = Field(
        default=50_000_000,
        ge=1000,
        description="UTF-8 bytes of cleaned text to learn from, taken from all train shards alike",
    )


class Tokenizer(Strict):
    """[tokenizer] Text to ids, and which ids mark a document's ends."""

    kind: Literal["tiktoken", "sentencepiece"] = Field(
        default="tiktoken", description="the library that encodes"
    )
    name: str | None = Field(default=None, description="tiktoken encoding, e.g. r50k_base")
    model: Path | None = Field(
        default=None,
        description="SentencePiece .model file, or a vocabulary file for a tiktoken encoding",
    )
    bos: int | None = Field(default=None, ge=0, description="id put before each document; leave out for none")
    eos: int | None = Field(default=None, ge=0, description="id put after each document; leave out for none")
    train: TrainTokenizer | None = Field(
        default=None, description="train a SentencePiece model on the train shards, instead of `model`"
    )
    backend: Literal["auto", "own", "fastokens"] = Field(
        default="auto",
        description="auto: fastokens where it is installed and proves to give the same ids; own: never",
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind == "tiktoken" and self.name is None:
            raise ValueError('kind = "tiktoken" needs a name, e.g. name = "r50k_base"')
        if self.kind == "sentencepiece" and (self.model is None) == (self.train is None):
            raise ValueError(
                'kind = "sentencepiece" needs either model = "path/to/tokenizer.model" or a table [tokenizer.train]'
            )
        if self.kind != "sentencepiece" and self.train is not None:
            raise ValueError('[tokenizer.train] needs kind = "sentencepiece"')
        return self


class Blocks(Strict):
    """[blocks] Fixed-length rows of ids."""

    length: int = Field(
        ge=2, le=1_048_576, description="tokens in a row; training predicts length - 1 of them"
    )
    format: Literal["arrow", "parquet"] = Field(
        default="arrow", description="arrow: memory-mapped training; parquet: small, for exchange"
    )
    packer: Literal["concat", "best_fit"] = Field(
        default="concat",
        description="concat: documents end to end, cut anywhere; best_fit: only documents longer than a row are cut",
    )
    part_bytes: int = Field(
        default=128 << 20,
        ge=1 << 10,
        description="bytes of JSON lines in a part of a shard: the unit of work, of retry and of packing",
    )


class DataSettings(Strict):
    """The tables of a recipe that decide the blocks."""

    corpus: Corpus
    clean: Clean = Clean()
    tokenizer: Tokenizer
    blocks: Blocks

    @classmethod
    def read(cls, recipe: str | Path) -> Self:
        """Read these tables from a recipe, given by name or path; other tables are not looked at."""
        path = recipe_path(recipe)
        tables = read_toml(path)
        return parse(cls, {key: tables[key] for key in DataSettings.model_fields if key in tables}, path)


def recipe_path(recipe: str | Path) -> Path:
    """Return the file of a recipe: a path to a .toml file, or a name in deployments/."""
    path = Path(recipe)
    if path.suffix == ".toml":
        if not path.is_file():
            raise InputError(f"recipe {path}: no such file")
        return path
    named = DEPLOYMENTS / f"{recipe}.toml"
    if not named.is_file():
        known = ", ".join(sorted(p.stem for p in DEPLOYMENTS.glob("*.toml")))
        raise InputError(
            f"recipe {str(recipe)!r} is unknown; known: {known}; or give a path that ends in .toml"
        )
    return named


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; a syntax error names the file and the line.

    A lock and a tokenizer's model are given relative to the file, and come out absolute.
    """
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    locate(tables, path)
    return tables


def locate(tables: dict[str, Any], path: Path) -> None:
    """Make the paths in a recipe's tables absolute; they are relative to the recipe at `path`."""
    for table, key in (("corpus", "lock"), ("tokenizer", "model")):
        keys = tables.get(table)
        if isinstance(keys, dict) and isinstance(keys.get(key), str):
            keys[key] = str(path.resolve().parent / keys[key])


def parse(cls: type[S], tables: dict[str, Any], origin: Path | str) -> S:
    """Build settings from TOML tables; what is wrong with each key becomes one line."""
    try:
        return cls.model_validate(tables)
    except ValidationError as error:
        raise InputError(f"{origin}: {explain(cls, error)}") from None


def explain(cls: type[BaseModel], error: ValidationError) -> str:
    """Say every fault of a recipe in one line: table and key, what is wrong, what was given."""
    faults = []
    for fault in error.errors():
        *tables, key = (str(part) for part in fault["loc"]) if fault["loc"] else ("recipe",)
        where = f"[{'.'.join(tables)}] {key}" if tables else key
        if fault["type"] == "extra_forbidden":
            owner: Any = cls
            for table in tables:
                field = getattr(owner, "model_fields", {}).get(table)
                owner = field.annotation if field else None
                # A table that may be left out: Table | None.
                owner = next((kind for kind in get_args(owner) if kind is not type(None)), owner)
            known = ", ".join(getattr(owner, "model_fields", {})) or "none"
            faults.append(f"{where}: unknown key (known: {known})")
        elif fault["type"] == "missing":
            faults.append(f"{where}: missing")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            given = "" if isinstance(fault["input"], dict) else f" (got {fault['input']!r})"
            faults.append(f"{where}: {message}{given}"[:300])
    return "; ".join(faults)
