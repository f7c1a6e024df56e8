"""Training end to end on a tiny prepared corpus: what it writes, and that no interruption changes it."""

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from corpora.errors import InputError, Unavailable
from corpora.files import data_root
from corpora.prepare import open_blocks
from models import checkpoint, device, processes, runs
from models.checkpoint import OPTIMIZER, WEIGHTS, Scores, State
from models.data import Order
from models.optimize import Optimizers
from models.train import Stopped, Trainer, train

Make = Callable[..., Path]
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]

# A process that trains the run argv[1] and is killed by SIGKILL at a certain point.
KILLED = """
import os, signal, sys
from pathlib import Path
from models import checkpoint, train

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def in_a_step():
    update = train.Trainer.update
    def dying(self, state, stop):
        if state.step == 4:
            self.saver.wait()  # the thread that writes step 3 may not be done
            kill()
        return update(self, state, stop)
    train.Trainer.update = dying

def in_a_save():
    write = checkpoint.save_file
    def dying(tensors, path):
        write(tensors, path)
        if path.name == "model.safetensors" and "step-0000006" in str(path):
            kill()
    checkpoint.save_file = dying

def before_the_rename():
    checkpoint.sync_folder = lambda folder: kill() if "step-0000006" in folder.name else None

globals()[sys.argv[2]]()
train.train(Path(sys.argv[1]), "cpu")
"""


def python(*arguments: str | Path, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = checkpoint.folder_of(run, step)
    weights = checkpoint.load(folder, WEIGHTS, CPU)
    return weights | {f"moment {k}": v for k, v in checkpoint.load(folder, OPTIMIZER, CPU).items()}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def predicted(run: Path) -> int:
    """Return how many targets the steps of a run have, counted from the blocks."""
    settings = runs.read_settings(run)
    blocks = open_blocks(settings, settings.corpus.train, data_root())
    order = Order(len(blocks), settings.train.batch, settings.train.seed)
    steps = [blocks.rows(order.step(step))[1] for step in range(settings.train.last_step)]
    return int(sum((tokens - 1).sum() for tokens in steps))


def without_speed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    measured = {"tokens_per_s", "memory_bytes", "time"}
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]


def done(run: Path, **arguments: Any) -> dict[str, Any]:
    result = train(run, "cpu", **arguments)
    assert isinstance(result, dict)
    return result


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_writes_what_the_recipe_says(
    optimizer: str, make_run: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(train={"optimizer": optimizer, "steps": 24, "eval_every": 8})
    result = done(run, events=True)
    lines = metrics(run)
    assert [line["step"] for line in lines] == [0, 1, *range(2, 25, 2)]
    assert [line["step"] for line in lines if "val_bpb" in line] == [0, 8, 16, 24]
    assert lines[-1]["tokens"] == predicted(run)
    assert result["step"] == 24 and not result["skipped"]
    assert result["val_loss"] == lines[-1]["val_loss"] < 3.5 < 5.7 < result["untrained_val_loss"] < 5.9
    assert result["untrained_val_bpb"] == lines[0]["val_bpb"] > 1.5 * result["val_bpb"]
    assert [step for step, _ in runs.checkpoints(run)] == [21, 24]
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told == [{"event": "metrics", **line} for line in lines]

    again = done(run)
    assert again == {**result, "skipped": True}
    assert metrics(run) == lines


@pytest.mark.parametrize(
    ("where", "saved"), [("in_a_step", [3]), ("in_a_save", [3]), ("before_the_rename", [3])]
)
def test_killed_and_started_again_gives_the_same_bits(where: str, saved: list[int], make_run: Make) -> None:
    undisturbed, killed = make_run("undisturbed"), make_run("killed")
    done(undisturbed)
    process = python("-c", KILLED, killed, where)
    _, said = process.communicate(timeout=150)
    assert process.returncode == -signal.SIGKILL, said
    assert [step for step, _ in runs.checkpoints(killed)] == saved
    done(killed)
    assert_equal(tensors(killed, 6), tensors(undisturbed, 6))
    assert without_speed(metrics(killed)) == without_speed(metrics(undisturbed))


def test_a_damaged_newest_checkpoint_costs_only_time(
    make_run: Make, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed, run = make_run("undisturbed"), make_run("damaged")
    done(undisturbed)
    done(run)
    damaged = checkpoint.folder_of(run, 6) / WEIGHTS
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    with caplog.at_level(logging.WARNING):
        assert not done(run)["skipped"]
    assert "step-0000006: model.safetensors is not as it was written" in caplog.text
    assert_equal(tensors(run, 6), tensors(undisturbed, 6))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_leaves(number: signal.Signals, code: int, make_run: Make) -> None:
    run = make_run(train={"steps": 100_000, "log_every": 1, "save_every": 100_000, "eval_every": 100_000})
    process = python("-m", "models", "train", run, "--device", "cpu", "--events")
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["step"] == 2:
            process.send_signal(number)
            break
    said = process.communicate(timeout=150)[1]
    assert process.returncode == code, said
    folder = runs.latest_checkpoint(run)
    assert folder is not None
    step = checkpoint.read_state(folder).step
    assert step >= 2
    assert f"stopped by {number.name} after step {step}, saved in {folder}" in said
    assert "Traceback" not in said


def test_a_stopped_run_goes_on_to_the_same_bits(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed, run = make_run("undisturbed"), make_run("stopped")
    done(undisturbed)
    update = Trainer.update

    def interrupted(self: Trainer, state: State, stop: Any) -> Any:
        if state.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return update(self, state, stop)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "update", interrupted)
        stopped = train(run, "cpu")
    assert isinstance(stopped, Stopped) and stopped.signal == signal.SIGTERM
    assert checkpoint.read_state(stopped.checkpoint).step == stopped.step < 6
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    done(run)
    assert_equal(tensors(run, 6), tensors(undisturbed, 6))


def poison(monkeypatch: pytest.MonkeyPatch, *data_steps: int, value: float = math.nan) -> list[int]:
    """Put `value` times the gradient into the gradient of these steps' data; return the steps whose updates are made."""
    made: list[int] = []
    update, norm, step = Trainer.update, Optimizers.norm, Optimizers.step
    now: list[int] = []

    def noted(self: Trainer, state: State, stop: Any) -> Any:
        now[:] = [state.step + state.offset]
        return update(self, state, stop)

    def poisoned(self: Optimizers) -> float:
        gradient = self.parameters["norm.weight"].grad
        if now[0] in data_steps and gradient is not None:
            gradient.mul_(value)
        return norm(self)

    def counted(self: Optimizers, lr: float) -> None:
        made.append(now[0])
        step(self, lr)

    monkeypatch.setattr(Trainer, "update", noted)
    monkeypatch.setattr(Optimizers, "norm", poisoned)
    monkeypatch.setattr(Optimizers, "step", counted)
    return made


def test_numbers_that_are_not_finite_stop_before_the_update(
    make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(train={"save_every": 2, "spikes": {"skip": 0, "roll_back": 0}})
    made = poison(monkeypatch, 2)
    with pytest.raises(
        InputError,
        match=r"step 3: the loss is [\d.]+, the gradient norm nan; the update was not made, and nothing was saved "
        r"since step 2 \(blocks \[.*; lower train.lr",
    ):
        train(run, "cpu")
    assert made == [0, 1]
    assert [step for step, _ in runs.checkpoints(run)] == [2]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors(run, 2).values())


def test_a_bad_step_is_passed_over(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    made = poison(monkeypatch, 2, 3)
    result = done(run)
    assert made == [0, 1, 4, 5, 6, 7]  # six updates all the same
    assert (result["step"], result["skipped_steps"], result["roll_backs"]) == (6, 2, 0)
    state = checkpoint.read_state(checkpoint.folder_of(run, 6))
    assert state.offset == 2 and state.bad == 0
    assert [skip.data_step for skip in state.skipped] == [2, 3]
    notes = [line for line in metrics(run) if "skipped" in line]
    assert [(note["step"], note["data_step"]) for note in notes] == [(3, 2), (3, 3)]
    assert "the gradient norm nan" in notes[0]["skipped"]


def test_a_step_passed_over_while_it_is_told_to_stop_stays_told(
    make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    with monkeypatch.context() as patched:
        poison(patched, 3)
        norm = Optimizers.norm

        def signalled(self: Optimizers) -> float:
            value = norm(self)
            if math.isnan(value):
                signal.raise_signal(signal.SIGTERM)
            return value

        patched.setattr(Optimizers, "norm", signalled)
        stopped = train(run, "cpu")
    assert isinstance(stopped, Stopped) and stopped.step == 3
    done(run)
    steps = [(line["step"], "skipped" in line) for line in metrics(run)]
    assert steps == [(0, False), (1, False), (2, False), (4, True), (4, False), (6, False)]


def test_a_gradient_far_above_the_usual_is_passed_over(
    make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(train={"steps": 20, "eval_every": 20, "save_every": 20})
    made = poison(monkeypatch, 18, value=1e5)
    assert done(run)["skipped_steps"] == 1
    assert made == [*range(18), 19, 20]
    (note,) = [line for line in metrics(run) if "skipped" in line]
    assert "times the usual" in note["skipped"]


class Crash(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("crash_at", [None, 3, 4, 5])
def test_too_many_bad_steps_roll_back_to_the_last_checkpoint_and_on(
    crash_at: int | None, make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(train={"spikes": {"skip": 2}})
    made = poison(monkeypatch, 4, 5, 6)
    if crash_at is not None:
        update = Trainer.update

        def crashing(self: Trainer, state: State, stop: Any) -> Any:
            if state.roll_backs and state.step == crash_at:
                raise Crash
            return update(self, state, stop)

        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "update", crashing)
            with pytest.raises(Crash):
                train(run, "cpu")
    result = done(run)
    assert (result["skipped_steps"], result["roll_backs"]) == (0, 1)
    # Three updates are saved; the fourth is lost with the roll-back; its blocks and the bad ones never come again.
    assert made[-3:] == [7, 8, 9] and made[:4] == [0, 1, 2, 3]
    state = checkpoint.read_state(checkpoint.folder_of(run, 6))
    (roll_back,) = state.roll_backs
    assert (roll_back.back_to, roll_back.first, roll_back.last) == (3, 3, 6)
    assert "the gradient norm nan" in roll_back.reason and state.offset == 4
    lines = metrics(run)
    assert [(line["step"], "rolled_back_from" in line) for line in lines] == [
        (0, False),
        (1, False),
        (2, False),
        (3, True),
        (4, False),
        (6, False),
    ]
    assert done(run)["skipped"] and metrics(run) == lines


def test_after_a_roll_back_the_run_is_as_if_the_blocks_had_not_been(
    make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt, clean = make_run("spoilt", train={"spikes": {"skip": 0}}), make_run("clean")
    with monkeypatch.context() as patched:
        poison(patched, 3)
        done(spoilt)
    step = Order.step
    monkeypatch.setattr(Order, "step", lambda self, number: step(self, number + (number >= 3)))
    done(clean)
    ours, theirs = tensors(spoilt, 6), tensors(clean, 6)
    assert_equal(ours, theirs)


def test_roll_backs_come_to_an_end(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(train={"spikes": {"skip": 1, "roll_back": 2}})
    poison(monkeypatch, *range(4, 100))
    with pytest.raises(
        InputError, match=r"step 4: .* the gradient norm nan after 2 roll-backs; .* since step 3"
    ):
        train(run, "cpu")


def test_too_high_a_learning_rate_is_told_by_step(make_run: Make) -> None:
    run = make_run(train={"lr": 1e30, "warmup": 0, "optimizer": "adamw"})
    with pytest.raises(
        InputError, match=r"step 2: the loss is .*, the gradient norm nan; .* since the beginning"
    ):
        train(run, "cpu")
    assert runs.latest_checkpoint(run) is None


def test_training_ends_early_when_it_gets_no_better(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(train={"steps": 40, "eval_every": 2, "save_every": 5, "patience": 2})
    scores = iter([5.0, 4.0, 3.0, 3.5, 2.5, 2.6, 2.7, 1.0])
    scored = lambda self, step: Scores(val_loss=3.0, val_bpb=next(scores))  # noqa: E731
    monkeypatch.setattr(Trainer, "score", scored)
    result = done(run)
    assert (result["step"], result["best_step"], result["ended_early"]) == (12, 8, True)
    assert [step for step, _ in runs.checkpoints(run)] == [8, 10, 12]
    assert checkpoint.read_state(checkpoint.folder_of(run, 12)).ended == "early"
    again = done(run)
    assert again == {**result, "skipped": True}
    scores = iter([0.5] * 20)
    further = done(run, allow_changes=True)
    assert (further["step"], further["ended_early"]) == (18, True)


def test_the_best_checkpoint_is_kept(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(train={"steps": 10, "eval_every": 2, "save_every": 2})
    scores = iter([5.0, 4.0, 3.0, 3.5, 3.6, 3.7])
    scored = lambda self, step: Scores(val_loss=3.0, val_bpb=next(scores))  # noqa: E731
    monkeypatch.setattr(Trainer, "score", scored)
    assert done(run)["best_step"] == 4
    assert [step for step, _ in runs.checkpoints(run)] == [4, 8, 10]
    best = checkpoint.best(run)
    assert best is not None and best.name == "step-0000004"


def test_a_budget_of_tokens_is_so_many_steps(make_run: Make) -> None:
    run = make_run(train={"steps": None, "tokens": 5 * 4 * 31})
    result = done(run)
    assert result["step"] == 5
    assert "tokens = 620" in (run / "recipe.toml").read_text()
    with pytest.raises(ValueError, match=r"train.tokens 620 are 5 steps of 4 blocks, but train.steps is 7"):
        make_run(train={"steps": 7, "tokens": 620})


def test_micro_batches_change_nothing_but_rounding(make_run: Make) -> None:
    adamw = {"optimizer": "adamw", "lr": 0.001}
    whole, parts = make_run("whole", train=adamw), make_run("parts", train={**adamw, "micro_batch": 1})
    done(whole)
    done(parts)
    for name, tensor in tensors(whole, 6).items():
        torch.testing.assert_close(tensors(parts, 6)[name], tensor, rtol=0, atol=1e-5)


def test_other_blocks_are_refused(make_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    done(run)
    changed(run, 3, data="f" * 64)
    with pytest.raises(InputError, match=r"step-0000003 was trained on other blocks .* python -m models new"):
        train(run, "cpu")
    assert done(run, allow_changes=True)["step"] == 6
    assert "was trained on other blocks" in capsys.readouterr().err
    assert checkpoint.read_state(checkpoint.folder_of(run, 6)).data != "f" * 64


def test_another_order_of_the_blocks_is_refused(make_run: Make) -> None:
    run = make_run()
    done(run)
    changed(run, 3, order="another/1")
    with pytest.raises(InputError, match=r"step-0000003 took its blocks in another order \(another/1, now "):
        train(run, "cpu")


def changed(run: Path, step: int, **fields: Any) -> None:
    """Give a run's checkpoint other words about itself, and remove the later ones."""
    folder = checkpoint.folder_of(run, step)
    checkpoint.remove_after(run, step)
    state = checkpoint.read_state(folder).model_copy(update=fields)
    weights = checkpoint.load(folder, WEIGHTS, CPU), checkpoint.load(folder, OPTIMIZER, CPU)
    shutil.rmtree(folder)
    with checkpoint.Saver(run, keep=2) as saver:
        saver.save(state, *weights)


def test_another_recipe_is_refused_by_its_keys(make_run: Make) -> None:
    run = make_run()
    done(run)
    other = make_run("other", model={"layers": 3}, train={"lr": 0.5})
    (run / "recipe.toml").write_bytes((other / "recipe.toml").read_bytes())
    with pytest.raises(
        InputError, match=r"model.layers 2 in the checkpoint, 3 in the recipe; train.lr 0.01 in"
    ):
        train(run, "cpu")


def test_another_learning_rate_may_be_allowed(make_run: Make) -> None:
    run = make_run()
    done(run)
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace("steps = 6", "steps = 9").replace("lr = 0.01", "lr = 0.02"))
    with pytest.raises(InputError, match=r"train.lr 0.01 in the checkpoint, 0.02 in the recipe"):
        train(run, "cpu")
    assert done(run, allow_changes=True)["step"] == 9
    assert done(run)["skipped"]  # it belongs to the new recipe from now on


@pytest.mark.parametrize(
    "settings", [{"document_mask": True}, {"document_mask": True, "reset_positions": True}]
)
def test_documents_may_be_kept_apart(settings: dict[str, bool], make_run: Make) -> None:
    plain, masked = make_run("plain"), make_run("masked", train=settings)
    assert done(plain)["untrained_val_loss"] - 0.5 > done(masked)["val_loss"]
    first = [line["grad_norm"] for line in (metrics(plain)[2], metrics(masked)[2])]
    assert first[0] != first[1]


def test_activation_checkpointing_changes_no_bit(make_run: Make) -> None:
    plain, checkpointed = make_run("plain"), make_run("less", train={"activation_checkpointing": True})
    done(plain)
    done(checkpointed)
    assert_equal(tensors(plain, 6), tensors(checkpointed, 6))


def test_a_deterministic_run_trains(make_run: Make) -> None:
    try:
        assert done(make_run(train={"deterministic": True}))["step"] == 6
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_vocabulary_larger_than_the_models_is_refused(make_run: Make) -> None:
    run = make_run(model={"vocab": 100})
    with pytest.raises(InputError, match=r"tokenizer of \d+ ids, but model.vocab is 100"):
        train(run, "cpu")


def test_blocks_that_are_not_prepared(make_run: Make) -> None:
    run = make_run(blocks={"length": 16})
    with pytest.raises(InputError, match="shard a of tiny is not prepared"):
        train(run, "cpu")


def test_one_trainer_at_a_time(make_run: Make) -> None:
    run = make_run()
    with processes.only_trainer(run):
        with pytest.raises(Unavailable, match="another process trains this run"):
            with processes.only_trainer(run, wait=0.1):
                pass
    with processes.only_trainer(run, wait=0.1):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_cuda_is_one_line(make_run: Make) -> None:
    with pytest.raises(InputError, match=r"finds no CUDA device here; .* or use --device cpu"):
        train(make_run(), "cuda")


def test_dtypes() -> None:
    assert device.choose_dtype("fp32", CPU) == torch.float32
    assert device.choose_dtype("bf16", CPU) == torch.bfloat16
    assert device.choose_dtype("auto", CPU) == (torch.bfloat16 if device.fast_bf16(CPU) else torch.float32)


def test_bf16_trains(make_run: Make) -> None:
    run = make_run(train={"dtype": "bf16", "steps": 12})
    result = done(run)
    assert result["val_loss"] < result["untrained_val_loss"] - 0.5
    assert all(
        tensor.dtype == torch.float32
        for tensor in checkpoint.load(checkpoint.folder_of(run, 12), WEIGHTS, CPU).values()
    )
