"""What a checkpoint knows of itself is sealed, and says which recipes it belongs to."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from corpora.errors import InputError
from corpora.files import sha256_json
from models import state
from models.settings import RunSettings
from models.state import Best, RollBack, Scores, Skip, State

SCORES = Scores(val_loss=2.5, val_bpb=1.1)
FULL = State(
    step=7,
    tokens=70,
    settings={"model": {"layers": 2}},
    data="d",
    order="feistel/1",
    tokenizer="t",
    parameters=6,
    made_on="hér\ne",
    untrained=SCORES,
    scores=Scores(val_loss=1.25, val_bpb=0.1 + 0.2),
    scored_step=6,
    files={"model.safetensors": "0" * 64},
    offset=5,
    roll_backs=(RollBack(back_to=3, first=4, last=6, reason="the loss is nan"),),
    skipped=(Skip(data_step=2, reason="a gradient norm of 1e9"), Skip(data_step=3, reason="again")),
    bad=2,
    norms=(0.1, 1 / 3, 1e-300, 5e-324, 1.7976931348623157e308),
    best=Best(step=6, val_bpb=1 / 3),
    worse=3,
    ended="early",
)


def test_a_state_is_read_as_it_was_written() -> None:
    assert state.parse(FULL.sealed().encode()) == FULL
    few = FULL.model_copy(update={"best": None, "ended": None, "norms": (), "skipped": (), "roll_backs": ()})
    assert state.parse(few.sealed().encode()) == few != FULL


@pytest.mark.parametrize("field", State.model_fields)
def test_every_field_is_sealed(field: str) -> None:
    fields = json.loads(FULL.sealed())
    for changed in (None, 99, {"x": 1}):
        assert state.parse(json.dumps({**fields, field: changed}).encode()) == (
            "state.json is not as it was written"
        )
    del fields[field]
    assert state.parse(json.dumps(fields).encode()) == "state.json is not as it was written"


@pytest.mark.parametrize(
    "text",
    [
        *(
            b"",
            b"{",
            b"[]",
            b"1",
            b"null",
            b'"x"',
            b"{}",
            b'{"sha256": 1}',
            b"\xff\xfe",
            b"\x80\x04.",
            b"\0" * 99,
        ),
        b"[" * 100_000,
        b'{"sha256": ' * 100_000,
        b'{"step": ' + b"9" * 5000 + b"}",
        b'{"made_on": "\\ud800", "sha256": "0"}',
    ],
    ids=lambda text: repr(text[:12]),
)
def test_what_is_no_state_is_told_in_one_line(text: bytes) -> None:
    assert state.parse(text) == "state.json is not as it was written"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": ...}, r"order: missing"),
        ({"fields of\nlater": 1}, r"fields of later: unknown key \(known: step, tokens,"),
        ({"settings": {"model": [1]}}, r"\[settings\] model: Input should be a valid dictionary"),
        ({"ended": "late"}, r"ended: Input should be 'early'"),
        ({"scores": {"val_loss": float("nan"), "val_bpb": 1}}, r"\[scores\] val_loss: .*finite"),
        ({"norms": [float("inf")]}, r"\[norms\] 0: .*finite"),
    ],
)
def test_a_sealed_state_of_another_version_is_told_by_its_key(changes: dict[str, Any], message: str) -> None:
    fields = {**json.loads(FULL.sealed()), **changes}
    del fields["sha256"]
    fields = {key: value for key, value in fields.items() if value is not ...}
    told = state.parse(json.dumps({**fields, "sha256": sha256_json(fields)}).encode())
    assert isinstance(told, str) and "\n" not in told
    assert re.search(rf"^state.json was written by another version of this program \(.*{message}", told)


# --- which recipes it belongs to

MODEL = {
    **{"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "layers": 2, "width": 16, "heads": 4},
    **{"kv_heads": 2, "ffn": 32, "vocab": 320, "context": 32},
}
TRAIN = {"steps": 6, "batch": 4, "lr": 0.01}
TOKENIZER = {"kind": "tiktoken", "name": "r50k_base"}


def settings(
    model: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    **other: dict[str, Any],
) -> RunSettings:
    tables = {
        "corpus": {"name": "demo", "train": ["a"], "val": ["v"]},
        "blocks": {"length": 32},
        "generate": {"prompts": ["x"]},
        **other,
        "model": {**MODEL, **(model or {})},
        "train": {**TRAIN, **(train or {})},
        "tokenizer": {**TOKENIZER, **(tokenizer or {})},
    }
    return RunSettings.model_validate(tables)


def written(recipe: RunSettings) -> State:
    """Return the state that a checkpoint of a recipe has, as read back."""
    read = state.parse(FULL.model_copy(update={"settings": state.decisive(recipe)}).sealed().encode())
    assert isinstance(read, State)
    return read


HERE = Path("runs/x/checkpoints/step-0000007")
BASE = settings()

# For every key of the three tables another value than its own here.
DECIDES: dict[str, dict[str, Any]] = {
    "model": {
        **{"norm": "layernorm", "positions": "learned", "mlp": "gelu", "layers": 3, "width": 32, "heads": 2},
        **{
            "kv_heads": 4,
            "ffn": 33,
            "vocab": 321,
            "context": 33,
            "tie": False,
            "bias": True,
            "head_bias": True,
        },
        **{"rope_theta": 5.0, "qk_norm": True},
    },
    "train": {
        **{
            "seed": 2,
            "steps": 7,
            "tokens": 868,
            "batch": 8,
            "micro_batch": 2,
            "optimizer": "muon",
            "lr": 0.02,
        },
        **{"warmup": 1, "schedule": "cosine", "decay": 0.1, "min_lr": 0.1, "weight_decay": 0.0, "beta1": 0.8},
        **{"beta2": 0.99, "clip": 2.0, "spikes": {"factor": 5.0}, "dtype": "bf16", "document_mask": True},
        **{"reset_positions": True, "activation_checkpointing": True, "compile": False, "parallel": "fsdp"},
        **{"deterministic": True, "eval_every": 5, "eval_blocks": 5, "patience": 5},
    },
    "tokenizer": {
        "kind": "sentencepiece",
        "name": "other",
        "model": "/m",
        "bos": 1,
        "eos": 2,
        "backend": "own",
    },
}
WITH = {  # what has to change as well for a value to be allowed
    ("model", "head_bias"): {"tie": False},
    ("model", "heads"): {"kv_heads": 1},
    ("tokenizer", "kind"): {"model": "/m"},
    ("train", "tokens"): {"steps": None},
}
INDIFFERENT = {"log_every": 3, "log_to": ["tensorboard"], "save_every": 9, "keep": 7}


def test_the_tables_below_name_every_key() -> None:
    for table, keys in DECIDES.items():
        fields = set(type(getattr(BASE, table)).model_fields)
        assert fields - {"train" if table == "tokenizer" else ""} == {*keys} | (
            {*INDIFFERENT} if table == "train" else set()
        )


@pytest.mark.parametrize(("table", "key"), [(table, key) for table, keys in DECIDES.items() for key in keys])
def test_a_key_that_decides_the_weights(table: str, key: str) -> None:
    other = settings(**{table: {key: DECIDES[table][key], **WITH.get((table, key), {})}})
    with pytest.raises(InputError, match=rf"{HERE} belongs to another recipe \(.*{table}.{key}") as told:
        state.check_belongs(HERE, written(BASE), other)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("key", INDIFFERENT)
def test_a_key_that_cannot_change_a_weight(key: str) -> None:
    state.check_belongs(HERE, written(BASE), settings(train={key: INDIFFERENT[key]}))
    assert key not in state.decisive(BASE)["train"]


def test_other_tables_do_not_matter() -> None:
    other = settings(
        evaluate={"bytes": 7}, generate={"prompts": ["y"]}, clean={"min_chars": 3}, blocks={"length": 16}
    )
    state.check_belongs(HERE, written(BASE), other)


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (
            {"model": {"layers": 3}},
            r"\(model.layers 2 in the checkpoint, 3 in the recipe\); make a run folder",
        ),
        (
            {"train": {"spikes": {"factor": 5.0}}},
            r"\(train.spikes.factor 10.0 in the checkpoint, 5.0 in the recipe\)",
        ),
        (
            {"model": {"layers": 3}, "train": {"lr": 0.5, "batch": 8, "warmup": 3, "seed": 4}},
            r"\(model.layers 2 .*; train.seed 1 .*; train.batch 4 .*; and 2 more\); make a run folder of its own: "
            r"python -m models new RECIPE; or train on all the same: --allow-changes$",
        ),
    ],
)
def test_up_to_three_differences_are_named(ours: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        state.check_belongs(HERE, written(BASE), settings(**ours))


def test_keys_and_tables_that_only_one_side_has() -> None:
    theirs = state.decisive(BASE)
    of_later = {**theirs, "model": {**theirs["model"], "gates": {"kind": "x"}}}
    with pytest.raises(InputError, match=r"\(model.gates.kind x in the checkpoint, nothing in the recipe\)"):
        state.check_belongs(HERE, FULL.model_copy(update={"settings": of_later}), BASE)
    with pytest.raises(
        InputError, match=r"\(tokenizer.kind nothing in the checkpoint, tiktoken in the recipe; "
    ):
        missing = {"model": theirs["model"], "train": theirs["train"]}
        state.check_belongs(HERE, FULL.model_copy(update={"settings": missing}), BASE)


def test_changes_are_told_one_by_one_when_they_are_allowed(caplog: pytest.LogCaptureFixture) -> None:
    other = settings(model={"layers": 3}, train={"lr": 0.5, "batch": 8, "warmup": 3, "log_every": 7})
    with caplog.at_level(logging.WARNING):
        state.check_belongs(HERE, written(BASE), other, allow_changes=True)
    assert [record.message for record in caplog.records] == [
        f"{HERE}: model.layers 2 in the checkpoint, 3 in the recipe",
        f"{HERE}: train.batch 4 in the checkpoint, 8 in the recipe",
        f"{HERE}: train.lr 0.01 in the checkpoint, 0.5 in the recipe",
        f"{HERE}: train.warmup 0 in the checkpoint, 3 in the recipe",
    ]
    caplog.clear()
    state.check_belongs(HERE, written(BASE), BASE, allow_changes=True)
    assert not caplog.records


def test_only_the_tables_that_are_asked_for_are_compared() -> None:
    other = settings(train={"lr": 0.5})
    state.check_belongs(HERE, written(BASE), other, tables=("model", "tokenizer"))
    with pytest.raises(InputError, match=r"model.layers .* python -m models new RECIPE$"):
        state.check_belongs(HERE, written(BASE), settings(model={"layers": 3}), tables=("model", "tokenizer"))
