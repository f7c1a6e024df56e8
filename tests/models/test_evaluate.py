"""Bits per byte: exact for a uniform model, and the same sums by hand for another."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from corpora.files import data_root
from corpora.prepare import Document, documents, open_blocks
from corpora.progress import Progress
from corpora.tokenizer import load
from models import evaluate, runs, score
from models.decoder import Decoder
from models.evaluate import Tally, Window, charge, windows
from models.loss import IGNORED
from models.settings import RunSettings
from models.train import train
from models.trained import open_run

Make = Callable[..., Path]


def recipe(make_run: Make, **changes: dict[str, object]) -> RunSettings:
    return runs.read_settings(make_run(**changes))


def score_all(decoder: Decoder, settings: RunSettings, batch: int = 3) -> Tally:
    tally = Tally()
    found = documents(settings, "v", data_root())
    with Progress("x", None, "B") as progress:
        charge(decoder, load(settings.tokenizer), found, tally, batch, torch.float32, progress)
    return tally


@pytest.mark.parametrize("specials", [{}, {"bos": None}, {"bos": None, "eos": None}])
def test_a_uniform_model_costs_ln_v_for_each_text_token(specials: dict[str, None], make_run: Make) -> None:
    base = recipe(make_run)
    settings = base.model_copy(update={"tokenizer": base.tokenizer.model_copy(update=specials)})
    tokenizer = load(settings.tokenizer)
    # As many rows as ids: a document's first token without any context is charged as uniform over the ids.
    decoder = Decoder(settings.model.model_copy(update={"vocab": tokenizer.vocab_size}))
    decoder.init_weights(1)
    with torch.no_grad():
        decoder.embedding.weight.zero_()
    tally = score_all(decoder, settings)
    texts = [(d.subset, d.text) for d in documents(settings, "v", data_root())]
    assert sum(tally.documents.values()) == len(texts) == 6
    for subset, one in tally.subsets().items():
        own = [text for name, text in texts if name == subset]
        tokens = sum(len(tokenizer.encode(text)) for text in own)
        size = sum(len(text.encode()) for text in own)
        assert (one["documents"], one["bytes"]) == (len(own), size)
        assert one["nats"] == pytest.approx(tokens * math.log(tokenizer.vocab_size), rel=1e-6)
        assert one["bits_per_byte"] == pytest.approx(
            tokens * math.log2(tokenizer.vocab_size) / size, rel=1e-6
        )


@torch.no_grad()
def test_nats_are_those_of_each_token_after_those_before_it(make_run: Make) -> None:
    settings = recipe(make_run, model={"context": 32})
    decoder = Decoder(settings.model)
    decoder.init_weights(4)
    with torch.no_grad():
        decoder.embedding.weight.mul_(20)
    tokenizer = load(settings.tokenizer)
    total = 0.0
    for document in documents(settings, "v", data_root()):
        ids = torch.tensor([2, *(int(i) for i in document.ids)])  # the EOS of another document before it
        for place in range(1, len(ids)):
            start = (place - 1) // 32 * 32
            logits = decoder.logits(decoder.hidden(ids[None, start:place])[0, -1])
            if ids[place] not in (tokenizer.bos, tokenizer.eos):
                total -= float(logits.log_softmax(-1)[ids[place]])
    for batch in (1, 5):
        assert sum(score_all(decoder, settings, batch).nats.values()) == pytest.approx(total, rel=1e-5)


def test_windows_have_every_token_as_a_target_once(make_run: Make) -> None:
    tokenizer = load(recipe(make_run).tokenizer)
    document = Document(1, "s", "", np.array([1, 10, 11, 12, 13, 2], np.uint32))
    assert list(windows(document, tokenizer, 4)) == [
        Window("s", [2, 1, 10, 11], [1, 10, 11, 12]),
        Window("s", [12, 13], [13, 2]),
    ]


def test_a_model_of_masked_documents_gets_no_eos_of_another(make_run: Make) -> None:
    settings = recipe(make_run)
    ids = np.array([1, 10, 11, 2], np.uint32)
    assert list(windows(Document(1, "s", "", ids), load(settings.tokenizer), 8, alone=True)) == [
        Window("s", [1, 10, 11], [10, 11, 2])
    ]
    # Without a BOS there is no other beginning than the EOS.
    bare = load(settings.tokenizer.model_copy(update={"bos": None}))
    assert list(windows(Document(1, "s", "", ids[1:]), bare, 8, alone=True)) == [
        Window("s", [2, 10, 11], [10, 11, 2])
    ]
    decoder = Decoder(settings.model)
    decoder.init_weights(4)
    with torch.no_grad():
        decoder.embedding.weight.mul_(20)
    before = score_all(decoder, settings).nats
    decoder.document_mask = True
    assert score_all(decoder, settings).nats != before


def test_held_out_blocks_are_scored_with_or_without_their_documents(make_run: Make) -> None:
    settings = recipe(make_run)
    tokenizer = load(settings.tokenizer)
    held_out = open_blocks(settings, ("v",), data_root())
    decoder = Decoder(settings.model)
    decoder.init_weights(4)
    bytes_V = score.bytes_of_ids(tokenizer, settings.model.vocab, torch.device("cpu"))
    every = np.arange(len(held_out))
    how = (bytes_V, torch.float32)
    plain = score.blocks(decoder, held_out, every, 5, *how)
    assert plain.targets == sum(int(row["tokens"]) - 1 for row in (held_out[int(i)] for i in every))
    assert (
        score.blocks(decoder, held_out, every, 5, *how, documents=True) == plain
    )  # it does not look at them
    decoder.document_mask = True
    masked = score.blocks(decoder, held_out, every, 5, *how, documents=True)
    assert masked.targets == plain.targets and masked.nats != plain.nats
    for size in (1, len(every)):
        again = score.blocks(decoder, held_out, every, size, *how, documents=True)
        assert again.nats == pytest.approx(masked.nats, rel=1e-6)


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_processes_with_fewer_blocks_run_the_model_as_often(make_run: Make, blocks: int) -> None:
    settings = recipe(make_run)
    held_out = open_blocks(settings, ("v",), data_root())
    decoder = Decoder(settings.model)
    decoder.init_weights(4)
    calls: list[int] = []
    decoder.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    bytes_V = score.bytes_of_ids(load(settings.tokenizer), settings.model.vocab, torch.device("cpu"))
    how = (held_out, np.arange(blocks), 2, bytes_V, torch.float32)
    alone = score.blocks(decoder, *how)
    calls.clear()
    assert score.blocks(decoder, *how, batches=3) == alone
    assert calls == {0: [1, 1, 1], 1: [1, 1, 1], 3: [2, 1, 1]}[blocks]


def test_special_ids_and_padding_are_not_counted_as_text() -> None:
    targets = torch.tensor([[3, 1, 4, IGNORED]])
    nats = torch.tensor([[1.0, 10.0, 2.0, 0.0]])
    sums = score.sums(nats, targets, torch.tensor([0, 0, 0, 5, 3]))
    assert sums == score.Sums(nats=13.0, targets=3, text_nats=3.0, bytes=8)
    assert sums.loss == pytest.approx(13 / 3)
    assert sums.plus(sums).bits_per_byte == pytest.approx(3 / math.log(2) / 8)


def test_a_run_is_scored_and_written_down(make_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(train={"steps": 30}, evaluate={"bytes": 700})
    train(run, "cpu")
    capsys.readouterr()
    scores = evaluate.evaluate(run, "cpu", events=True)
    assert scores["documents"] == 3 and scores["bytes"] >= 700  # documents of 300 bytes, up to 700
    assert set(scores["subsets"]) == {"cats", "dogs"}
    nats = sum(one["nats"] for one in scores["subsets"].values())
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / scores["bytes"])
    assert scores["file"] == str(run / "evaluations" / "step-0000030.json")
    assert json.loads(Path(scores["file"]).read_text()) == scores
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[-1]["event"] == "progress" and events[-1]["done"] == scores["bytes"]
    assert evaluate.evaluate(run, "cpu") == scores


def test_the_eval_set_is_a_hash_of_the_text_alone(make_run: Make) -> None:
    few, more = recipe(make_run, evaluate={"bytes": 700}), recipe(make_run, evaluate={"bytes": 1500})
    longer = recipe(make_run, evaluate={"bytes": 700}, blocks={"length": 16}, model={"context": 16})

    def eval_set(settings: RunSettings) -> str:
        tally = Tally()
        for document in evaluate.first_documents(settings, load(settings.tokenizer)):
            tally.add(document)
        return tally.text.hexdigest()

    assert eval_set(few) == eval_set(longer) != eval_set(more)


def test_held_out_loss_in_training_is_that_of_the_blocks(make_run: Make) -> None:
    run = make_run(train={"eval_blocks": 1000})
    result = train(run, "cpu")
    assert isinstance(result, dict)
    trained = open_run(run)
    total = sum(one["nats"] for one in score_all(trained.decoder, trained.settings).subsets().values())
    size = sum(len(d.text.encode()) for d in documents(trained.settings, "v", data_root()))
    # Blocks cut the text in other places than documents do, so the two agree only roughly.
    assert result["val_bpb"] == pytest.approx(total / math.log(2) / size, rel=0.1)


def test_only_the_beginnings_are_scored_where_the_recipe_says_so(make_run: Make) -> None:
    run = make_run(evaluate={"bytes": 60, "document_chars": 20})
    settings = runs.read_settings(run)
    whole = [document.text for document in documents(settings, "v", data_root())]
    tokenizer = load(settings.tokenizer)
    found = list(evaluate.first_documents(settings, tokenizer))
    assert [document.text for document in found] == [text[:20] for text in whole[:3]]
    for document in found:
        assert document.ids.tolist() == tokenizer.encode_document(document.text).tolist()
