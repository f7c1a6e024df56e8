"""Two processes over gloo train as one: the same blocks, the same losses, a checkpoint that either resumes."""

import json
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

from models import checkpoint, runs
from models.checkpoint import OPTIMIZER, WEIGHTS
from models.train import train

Make = Callable[..., Path]
CPU = torch.device("cpu")
TRAIN = ("-m", "models")
ROOT = Path(__file__).resolve().parents[2]
ADAMW = {"optimizer": "adamw", "lr": 0.001, "micro_batch": 1, "log_every": 1}


# A trainer that gets SIGTERM in the middle of an update, when its rank is $SIGNALLED.
SIGNALLED = """
import os, signal, sys
from models.__main__ import main
from models.step import Stepper
update = Stepper.update
def interrupted(self, batches, lr, *, stop=False):
    if os.environ["RANK"] == os.environ["SIGNALLED"] and self.optimizers.optimizers[0].state and not stop:
        os.kill(os.getpid(), signal.SIGTERM)
    return update(self, batches, lr, stop=stop)
Stepper.update = interrupted
sys.exit(main())
"""


def two(run: Path, *command: str) -> list[tuple[int, str, str]]:
    """Train a run with two processes; return exit code, output and complaints of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    pair = [
        subprocess.Popen(
            [sys.executable, *(command or TRAIN), "train", str(run), "--device", "cpu", "--events"],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    told = [process.communicate(timeout=150) for process in pair]
    return [(process.returncode, *said) for process, said in zip(pair, told, strict=True)]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_near(one: Path, other: Path, step: int, within: float) -> None:
    a, b = checkpoint.folder_of(one, step), checkpoint.folder_of(other, step)
    for file in (WEIGHTS, OPTIMIZER):
        ours, theirs = checkpoint.load(a, file, CPU), checkpoint.load(b, file, CPU)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            if name.startswith("random:"):
                continue
            torch.testing.assert_close(
                theirs[name], tensor, rtol=0, atol=within, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(("parallel", "optimizer"), [("ddp", "adamw"), ("fsdp", "adamw"), ("fsdp", "muon")])
def test_two_processes_train_as_one(parallel: str, optimizer: str, make_run: Make) -> None:
    # Five held-out blocks: the second process has one fewer, and must not wait for it.
    table = {**ADAMW, "optimizer": optimizer, "parallel": parallel, "eval_blocks": 5}
    one, pair = make_run("one", train=table), make_run("pair", train=table)
    train(one, "cpu")
    first, second = two(pair)
    assert (first[0], second[0]) == (0, 0), (first[2], second[2])
    assert second[1] == "" and json.loads(first[1].splitlines()[-1])["event"] == "result"
    for a, b in zip(metrics(one), metrics(pair), strict=True):
        assert a["tokens"] == b["tokens"]
        for key in ("loss", "grad_norm", "val_loss"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-5), (key, a["step"])
    assert_near(one, pair, 6, 1e-5 if optimizer == "adamw" else 2e-4)  # Muon iterates in bfloat16


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_another_number_of_processes_goes_on(
    parallel: str, make_run: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    table = {**ADAMW, "parallel": parallel}
    undisturbed = make_run("undisturbed", train=table)
    train(undisturbed, "cpu")
    pair_then_one, one_then_pair = make_run("a", train=table), make_run("b", train=table)
    assert [code for code, *_ in two(pair_then_one)] == [0, 0]
    checkpoint.remove_after(pair_then_one, 3)
    train(pair_then_one, "cpu")
    assert "it was made on 2 processes on cpu, 1 threads" in capsys.readouterr().err
    assert_near(undisturbed, pair_then_one, 6, 1e-5)
    train(one_then_pair, "cpu")
    checkpoint.remove_after(one_then_pair, 3)
    first, second = two(one_then_pair)
    assert (first[0], second[0]) == (0, 0), (first[2], second[2])
    assert "going on from" in first[2] and "step-0000003" in first[2]
    assert_near(undisturbed, one_then_pair, 6, 1e-5)


def test_one_that_cannot_begin_ends_all(make_run: Make) -> None:
    run = make_run(train=ADAMW)
    (run / "checkpoints" / "step-0000003").mkdir(parents=True)
    (run / "checkpoints" / "step-0000003" / "state.json").write_text("{}")
    first, second = two(run)
    assert (first[0], second[0]) == (2, 2)
    assert "every checkpoint is damaged" in first[2]
    assert "Traceback" not in first[2] + second[2]


def begun(command: list[str]) -> "subprocess.Popen[str]":
    """Start `python -m ...`; return it when it has made its third step."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    return process


TORCHRUN = ["torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]


@pytest.mark.parametrize("by", ["ourselves", "torchrun"])
def test_a_signal_to_the_launcher_stops_and_saves_all(by: str, make_run: Make) -> None:
    run = make_run(train={**ADAMW, "steps": 100_000, "save_every": 100_000, "eval_every": 100_000})
    command = ["models", "train", str(run), "--device", "cpu"]
    if by == "torchrun":
        command = [*TORCHRUN, "--nproc-per-node", "2", "-m", *command]
    else:
        command += ["--processes", "2"]
    process = begun(command)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=90)[1]
    folder = runs.latest_checkpoint(run)
    assert folder is not None, said
    assert checkpoint.read_state(folder).step >= 3
    assert "stopped by SIGTERM after step" in said
    if by == "ourselves":
        assert process.returncode == 143
        assert "Traceback" not in said and "elastic" not in said


def launched(run: Path, **more: str) -> "subprocess.CompletedProcess[str]":
    """Train a run with two processes that `--processes` starts."""
    return subprocess.run(
        [sys.executable, *TRAIN, "train", str(run), "--device", "cpu", "--processes", "2", "--events"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **more},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def test_processes_of_our_own(make_run: Make) -> None:
    one, pair = make_run("one", train=ADAMW), make_run("pair", train=ADAMW)
    train(one, "cpu")
    done = launched(pair)
    assert (done.returncode, done.stderr) == (0, "")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events].count("result") == 1 and events[-1]["step"] == 6
    assert_near(one, pair, 6, 1e-5)

    refused = launched(make_run("three", train={**ADAMW, "batch": 3}))
    assert refused.returncode == 2
    assert "error: train.batch 3 cannot be shared equally by 2 processes\n" in refused.stderr
    assert "Traceback" not in refused.stderr and "elastic" not in refused.stderr


def test_a_process_that_is_killed_ends_the_others(make_run: Make) -> None:
    run = make_run(train={**ADAMW, "steps": 100_000, "save_every": 100_000, "eval_every": 100_000})
    process = begun(["models", "train", str(run), "--device", "cpu", "--processes", "2"])
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 137
    assert "error: process 1 of 2 was killed by SIGKILL\n" in said
    assert not Path(f"/proc/{ranks[0]}").exists()


@pytest.mark.parametrize(("parallel", "rank"), [("ddp", "1"), ("fsdp", "0")])
def test_a_signal_to_one_process_ends_all_together(
    parallel: str, rank: str, make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(
        train={**ADAMW, "parallel": parallel, "steps": 1000, "save_every": 1000, "eval_every": 1000}
    )
    monkeypatch.setenv("SIGNALLED", rank)
    first, second = two(run, "-c", SIGNALLED)
    assert (first[0], second[0]) == (143, 143), (first[2], second[2])
    folder = runs.latest_checkpoint(run)
    assert folder is not None
    assert 1 <= checkpoint.read_state(folder).step <= 4
    assert f"saved in {folder}" in first[2] and "Traceback" not in first[2] + second[2]
