"""Training end to end on a tiny prepared corpus: what it writes, and that no interruption changes it."""

import json
import logging
import os
import signal
import socket
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
from models.checkpoint import OPTIMIZER, WEIGHTS
from models.data import Order
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
    def dying(self, **arguments):
        return kill() if self.step == 4 else update(self, **arguments)
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
    steps = [blocks.rows(order.step(step))[1] for step in range(settings.train.steps)]
    return int(sum((tokens - 1).sum() for tokens in steps))


def without_speed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]


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
    _, said = process.communicate(timeout=60)
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
    said = process.communicate(timeout=60)[1]
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

    def interrupted(self: Trainer, **arguments: Any) -> Any:
        if self.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return update(self, **arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "update", interrupted)
        stopped = train(run, "cpu")
    assert isinstance(stopped, Stopped) and stopped.signal == signal.SIGTERM
    assert checkpoint.read_state(stopped.checkpoint).step == stopped.step < 6
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    done(run)
    assert_equal(tensors(run, 6), tensors(undisturbed, 6))


def test_numbers_that_are_not_finite_stop_before_the_update(
    make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(train={"save_every": 2})
    clip = Trainer.__init__.__globals__["Optimizers"].scale_and_clip

    def poisoned(self: Any, count: float) -> float:
        if len(steps) == 2:
            self.parameters["norm.weight"].grad[0] = torch.nan
        return float(clip(self, count))

    steps: list[float] = []
    update = Trainer.__init__.__globals__["Optimizers"].step
    optimizers = Trainer.__init__.__globals__["Optimizers"]
    monkeypatch.setattr(optimizers, "scale_and_clip", poisoned)
    monkeypatch.setattr(optimizers, "step", lambda self, lr: (steps.append(lr), update(self, lr))[1])
    with pytest.raises(
        InputError, match=r"step 3: the loss is [\d.]+, the gradient norm nan; .* lower train.lr"
    ):
        train(run, "cpu")
    assert len(steps) == 2
    assert [step for step, _ in runs.checkpoints(run)] == [2]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors(run, 2).values())


def test_too_high_a_learning_rate_is_told_by_step(make_run: Make) -> None:
    run = make_run(train={"lr": 1e30, "warmup": 0, "optimizer": "adamw"})
    with pytest.raises(InputError, match=r"step 2: the loss is .*, the gradient norm nan"):
        train(run, "cpu")
    assert runs.latest_checkpoint(run) is None


def test_micro_batches_change_nothing_but_rounding(make_run: Make) -> None:
    adamw = {"optimizer": "adamw", "lr": 0.001}
    whole, parts = make_run("whole", train=adamw), make_run("parts", train={**adamw, "micro_batch": 1})
    done(whole)
    done(parts)
    for name, tensor in tensors(whole, 6).items():
        torch.testing.assert_close(tensors(parts, 6)[name], tensor, rtol=0, atol=1e-5)


def test_two_processes_train_as_one(make_run: Make) -> None:
    adamw = {"optimizer": "adamw", "lr": 0.001, "micro_batch": 1}
    one, two = make_run("one", train=adamw), make_run("two", train=adamw)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    pair = [
        python(
            "-m", "models", "train", two, "--device", "cpu", "--events", RANK=rank, LOCAL_RANK=rank, **address
        )
        for rank in ("0", "1")
    ]
    done(one)
    told = [process.communicate(timeout=90) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    assert told[1][0] == "" and json.loads(told[0][0].splitlines()[-1])["event"] == "result"
    for name, tensor in tensors(one, 6).items():
        torch.testing.assert_close(tensors(two, 6)[name], tensor, rtol=0, atol=1e-5)
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["tokens"] == b["tokens"] and a.get("val_bpb") == pytest.approx(b.get("val_bpb"), abs=1e-4)


def test_a_batch_must_divide_by_the_processes(make_run: Make) -> None:
    run = make_run()
    three = processes.Processes(0, 3, CPU)
    with pytest.raises(InputError, match=r"train.batch 4 cannot be shared equally by 3 processes"):
        Trainer(run, runs.read_settings(run), three, None, events=False)


def test_other_blocks_are_refused(make_run: Make) -> None:
    run = make_run()
    done(run)
    newest = checkpoint.folder_of(run, 3)
    state = checkpoint.read_state(newest).model_copy(update={"data": "f" * 64})
    checkpoint.remove_after(run, 3)
    checkpoint.save(run, state, {"w": torch.ones(1)}, {"w": torch.ones(1)}, keep=2)
    with pytest.raises(InputError, match=r"step-0000003 was trained on other blocks .* python -m models new"):
        train(run, "cpu")


def test_another_recipe_is_refused_by_its_keys(make_run: Make) -> None:
    run = make_run()
    done(run)
    other = make_run("other", model={"layers": 3}, train={"lr": 0.5})
    (run / "recipe.toml").write_bytes((other / "recipe.toml").read_bytes())
    with pytest.raises(
        InputError, match=r"model.layers 2 in the checkpoint, 3 in the recipe; train.lr 0.01 in"
    ):
        train(run, "cpu")


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
