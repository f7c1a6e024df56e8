"""Sampling on small networks, and every way in which the smoke test fails."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from corpora import tokenizer
from corpora.errors import InputError
from models import checkpoint, runs, smoke
from models.checkpoint import OPTIMIZER, WEIGHTS, Scores
from models.decoder import Decoder
from models.generate import Sampling, Written, continue_ids, draw, write
from models.settings import Model
from models.trained import open_run

Make = Callable[..., Path]
CPU = torch.device("cpu")


def build(context: int = 16, **changes: Any) -> Decoder:
    shape = {"layers": 2, "width": 32, "heads": 4, "ffn": 64, "vocab": 64, "context": context}
    decoder = Decoder(
        Model(**{"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "kv_heads": 2, **shape, **changes})
    )
    decoder.init_weights(2)
    with torch.no_grad():  # larger weights, so that the likeliest id depends on what came before
        for parameter in decoder.parameters():
            parameter.mul_(4.0)
    return decoder


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("prompt", [1, 7, 16, 40])
@pytest.mark.parametrize("sampling", [None, Sampling(1.0, 0.95, 5)], ids=["greedy", "sampled"])
def test_the_cache_changes_no_id(positions: str, prompt: int, sampling: Sampling | None) -> None:
    decoder = build(positions=positions)
    start = [(i * 7 + 3) % 64 for i in range(prompt)]
    how: dict[str, Any] = {"max_new_tokens": 30, "stop": None, "ids_known": 64, "sampling": sampling}
    cached, _ = continue_ids(decoder, start, use_cache=True, **how)
    plain, _ = continue_ids(decoder, start, use_cache=False, **how)
    assert cached == plain
    assert len(cached) == 30 and len(set(cached)) > 3


def test_of_a_long_prompt_the_tail_counts() -> None:
    decoder = build()
    tail = list(range(40, 52))
    how: dict[str, Any] = {"max_new_tokens": 4, "stop": None, "ids_known": 64}
    assert continue_ids(decoder, [1] * 30 + tail, **how) == continue_ids(decoder, tail, **how)
    assert continue_ids(decoder, [1] * 30 + tail[:-1], **how) != continue_ids(decoder, tail, **how)


def test_the_seed_decides_a_sample() -> None:
    decoder = build()

    def sample(seed: int) -> list[int]:
        how = Sampling(1.0, 1.0, seed)
        return continue_ids(decoder, [1], 20, stop=None, ids_known=64, sampling=how)[0]

    assert sample(1) == sample(1) != sample(2)


def test_stop_ends_and_is_not_told() -> None:
    decoder = build()
    free, ended = continue_ids(decoder, [1], 20, stop=None, ids_known=64)
    assert not ended
    stop = free[5]
    assert continue_ids(decoder, [1], 20, stop=stop, ids_known=64) == (free[: free.index(stop)], True)


def test_rows_without_text_are_never_chosen() -> None:
    decoder = build(tie=False, head_bias=True)
    with torch.no_grad():
        decoder.head.bias[60:] = 100.0
    for sampling in (None, Sampling(2.0, 1.0, 1)):
        ids, _ = continue_ids(decoder, [1], 20, stop=None, ids_known=60, sampling=sampling)
        assert max(ids) < 60
    assert min(continue_ids(decoder, [1], 20, stop=None, ids_known=64)[0]) >= 60


@pytest.mark.parametrize(
    ("temperature", "top_p", "possible"),
    [
        (1.0, 0.1, {1}),
        (1.0, 0.5, {1}),
        (1.0, 0.51, {1, 3}),
        (1.0, 0.81, {1, 3, 0}),
        (1.0, 1.0, {0, 1, 2, 3}),
        (0.01, 1.0, {1}),
    ],
)
def test_top_p_keeps_the_smallest_set(temperature: float, top_p: float, possible: set[int]) -> None:
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    generator = torch.Generator().manual_seed(1)
    drawn = {draw(logits, Sampling(temperature, top_p, 0), generator) for _ in range(300)}
    assert drawn == possible


def test_logits_that_are_not_finite_are_an_error() -> None:
    decoder = build()
    with torch.no_grad():
        decoder.norm.weight.fill_(3e38)
    with pytest.raises(InputError, match="the logits of new token 1 are not finite"):
        continue_ids(decoder, [1], 3, stop=None, ids_known=64)


@pytest.fixture
def trained(trained_once: Path, make_run: Make, tmp_path: Path) -> Path:
    """Return a trained run of our own.  (`make_run` sets where the data is.)"""
    return Path(shutil.copytree(trained_once, tmp_path / "copy"))


def test_a_text_goes_on_after_its_prompt(trained: Path) -> None:
    opened = open_run(trained)
    written = write(opened.decoder, opened.tokenizer, "the cat", 12)
    whole = opened.tokenizer.decode([*(int(i) for i in opened.tokenizer.encode("the cat")), *written.ids])
    assert whole == "the cat" + written.text
    assert written.text[0] == " "  # SentencePiece alone would drop the first space


def test_a_model_of_masked_documents_starts_from_the_bos_alone(trained: Path) -> None:
    opened = open_run(trained)
    encoder, decoder = opened.tokenizer, opened.decoder
    assert (encoder.bos, encoder.eos) == (1, 2)
    prompt = [int(i) for i in encoder.encode("the cat")]
    how: dict[str, Any] = {"max_new_tokens": 12, "stop": encoder.eos, "ids_known": encoder.vocab_size}
    for masked, head in ((False, [2, 1]), (True, [1])):
        decoder.document_mask = masked
        expected, _ = continue_ids(decoder, head + prompt, **how)
        assert write(decoder, encoder, "the cat", 12).ids == expected


def test_an_empty_prompt_needs_a_start(trained: Path) -> None:
    opened = open_run(trained)
    settings = opened.settings.tokenizer.model_copy(update={"bos": None, "eos": None})
    with pytest.raises(InputError, match="an empty prompt needs a BOS or EOS id"):
        write(opened.decoder, tokenizer.load(settings), "", 4)


def test_smoke_writes_the_samples(trained: Path) -> None:
    told = smoke.smoke(trained, "cpu")
    assert [(s["prompt"], s["method"]) for s in told["samples"]] == [
        (prompt, method) for prompt in ("The cat", "", "sat " * 60) for method in ("greedy", "top_p")
    ]
    assert all(sample["text"] and 1 <= sample["new_tokens"] <= 8 for sample in told["samples"])
    assert len(told["checks"]) == 5 and all(check["passed"] for check in told["checks"])
    assert json.loads((trained / "samples.json").read_text()) == told


def change(run: Path, weight: float | None = None, val_loss: float | None = None) -> None:
    """Write the newest checkpoint again with one weight or its held-out loss changed, hashes and all."""
    folder = runs.latest_checkpoint(run)
    assert folder is not None
    state = checkpoint.read_state(folder)
    weights = checkpoint.load(folder, WEIGHTS, CPU)
    if weight is not None:
        weights["blocks.1.mlp.gate_up.weight"][3, 3] = weight
    if val_loss is not None:
        state = state.model_copy(update={"scores": Scores(val_loss=val_loss, val_bpb=1.0)})
    checkpoint.save(run, state, weights, checkpoint.load(folder, OPTIMIZER, CPU), keep=2)


def fails(run: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        smoke.smoke(run, "cpu")
    assert "\n" not in str(caught.value)
    assert not (run / "samples.json").exists()


@pytest.mark.parametrize("weight", [torch.nan, torch.inf])
def test_smoke_fails_on_weights_that_are_not_finite(weight: float, trained: Path) -> None:
    change(trained, weight=weight)
    fails(trained, r"the weight blocks.1.mlp.gate_up.weight holds numbers that are not finite")


def test_smoke_fails_on_logits_that_are_not_finite(trained: Path) -> None:
    change(trained, weight=3e38)
    fails(trained, r"logits of new token \d are not finite")


def test_smoke_fails_on_a_model_that_learned_nothing(trained: Path) -> None:
    folder = runs.latest_checkpoint(trained)
    assert folder is not None
    change(trained, val_loss=checkpoint.read_state(folder).untrained.val_loss)
    fails(trained, "the model has learned nothing")


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([Written("", [], True)], "smoke test: greedy of 'The cat' is empty"),
        ([Written("", [5], False)], "smoke test: greedy of 'The cat' is empty"),
        ([Written("x", [5, 900], False)], r"has id 900, the tokenizer has \d+ ids"),
        ([Written("x", [5], False), Written("y", [6], False)], "was different the second time"),
    ],
)
def test_smoke_fails_on_bad_samples(
    outputs: list[Written], message: str, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coming = iter(outputs)
    monkeypatch.setattr(smoke, "write", lambda *_: next(coming))
    fails(trained, message)


def test_a_run_without_a_checkpoint(make_run: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no checkpoint yet; run: python -m models train"):
        open_run(make_run())
    with pytest.raises(InputError, match=r"is not a run folder .* python -m models new RECIPE"):
        open_run(tmp_path / "nowhere")


def test_another_tokenizer_is_refused(trained: Path) -> None:
    folder = runs.latest_checkpoint(trained)
    assert folder is not None
    state = checkpoint.read_state(folder).model_copy(update={"tokenizer": "0" * 64})
    checkpoint.save(trained, state, checkpoint.load(folder, WEIGHTS, CPU), {}, keep=2)
    with pytest.raises(InputError, match="was trained with another tokenizer"):
        open_run(trained)
