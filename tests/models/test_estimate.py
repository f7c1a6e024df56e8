"""Memory and time before anything starts: against the arithmetic, against autograd, and against real training."""

import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from corpora.errors import InputError
from deployments import recipe as recipes
from models import decoder, device, estimate
from models.decoder import Decoder, count_parameters
from models.estimate import flops_per_token, plan, sizes, tokens
from models.hardware import Machine, peak_flops
from models.settings import Model, RunSettings

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30


def gpu(name: str, gib: float, **more: Any) -> Machine:
    """Return a machine with a GPU that there need not be."""
    return Machine(name, "cuda", round(gib * GIB), lambda dtype: peak_flops(name, dtype), **more)


def cpu(gib: float, flops: float = 1e11, **more: Any) -> Machine:
    return Machine("CPU (2 threads)", "cpu", round(gib * GIB), lambda _: flops, **more)


RTX = gpu("NVIDIA GeForce RTX 4090", 23.6)
A100 = gpu("NVIDIA A100-SXM4-40GB", 39.4)
H100 = gpu("NVIDIA H100 80GB HBM3", 79.1)
H200 = gpu("NVIDIA H200", 139.8)


def settings(name: str, **train: Any) -> RunSettings:
    return recipes.load(name, {f"train.{key}": value for key, value in train.items()})


@pytest.mark.parametrize(
    ("recipe", "trained", "operations"),
    [
        # 8 layers of width 192 at length 1024; the table is tied, so it multiplies
        ("13m", 4100 * 64 * 1023, 6 * 13_200_576 + 12 * 8 * 192 * 1024),
        ("2b", 78_400 * 256 * 2047, 6 * 2_055_682_560 + 12 * 28 * 2560 * 2048),
        # one layer of width 128, untied: its input table (50304 x 128) and positions (128 x 128) are looked up
        ("13m-gpt", None, 6 * (13_142_656 - 50_304 * 128 - 128 * 128) + 12 * 1 * 128 * 128),
    ],
)
def test_arithmetic(recipe: str, trained: int | None, operations: int) -> None:
    assert flops_per_token(settings(recipe)) == operations
    assert trained is None or tokens(settings(recipe)) == trained


LLAMA = {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "kv_heads": 2, "ffn": 160}
GPT = {"norm": "layernorm", "positions": "learned", "mlp": "relu", "ffn": 256, "bias": True}
SHAPES: list[dict[str, Any]] = [
    LLAMA,
    {**LLAMA, "qk_norm": True},
    {**LLAMA, "kv_heads": 4},
    GPT,
    {**GPT, "mlp": "gelu"},
]


def model(**shape: Any) -> Model:
    return Model(layers=1, width=64, heads=4, vocab=320, context=64, **shape)


@pytest.mark.parametrize("name", recipes.names())
def test_parameters_are_counted_without_a_network(name: str) -> None:
    assert sizes(settings(name).model).all == count_parameters(settings(name).model)


def test_parameters_of_every_kind_of_network() -> None:
    kinds = itertools.product(
        ("rmsnorm", "layernorm"), ("rope", "learned"), ("swiglu", "gelu"), *[(True, False)] * 4, (None, 2)
    )
    for norm, positions, mlp, tie, bias, head_bias, qk_norm, kv_heads in kinds:
        shape = Model(
            norm=norm,  # type: ignore[arg-type]
            positions=positions,  # type: ignore[arg-type]
            mlp=mlp,  # type: ignore[arg-type]
            layers=2,
            width=16,
            heads=4,
            kv_heads=kv_heads,
            ffn=40,
            vocab=99,
            context=8,
            tie=tie,
            bias=bias,
            head_bias=head_bias and not tie,
            qk_norm=qk_norm,
        )
        assert sizes(shape).all == count_parameters(shape), shape


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=["llama", "qk_norm", "not grouped", "gpt", "gelu"])
def test_a_block_keeps_what_autograd_keeps(shape: dict[str, Any], dtype: torch.dtype, masked: bool) -> None:
    rows, length, made = 3, 50, model(**shape)
    whole = Decoder(made)
    x = torch.randn(rows, length, 64, requires_grad=True)
    rotary = None
    if made.positions == "rope":
        rotary = decoder.rotary_tables(torch.arange(length), 16, 1e4)
    mask = decoder.same_document(torch.zeros(rows, length, dtype=torch.int32)) if masked else None
    weights = [p.untyped_storage().data_ptr() for p in whole.parameters()]
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        whole.blocks[0](x, rotary, mask, None)
    saved = sum(one.untyped_storage().nbytes() for at, one in kept.items() if at not in weights)
    reckoned = rows * length * estimate.block_bytes(made, length, dtype, on_cuda=False, masked=masked)
    if dtype == torch.bfloat16:
        reckoned += 2 * sizes(made).matrices
    assert reckoned == pytest.approx(saved, rel=0.01)


# Real steps in a process of their own, which keeps a checkpoint's copy as the trainer does; prints its peak.
REAL = """
import json, sys
from pathlib import Path
import torch
import models.train
from deployments import recipe as recipes
from models import device
from models.checkpoint import Saver
from models.data import Batch
from models.hardware import peak_memory
from models.processes import Processes
from models.step import Stepper

name, changes = sys.argv[1], json.loads(sys.argv[2])
settings = recipes.load(name, changes)
train, here = settings.train, device.choose("cpu")
stepper = Stepper(settings.model, train, Processes(0, 1, here), dtype=device.choose_dtype(train.dtype, here))
stepper.init(1)
saver = Saver(Path(sys.argv[3]), 2)
rows, length = train.micro_batch or train.batch, settings.blocks.length - 1
for step in range(3):
    ids = torch.randint(0, settings.model.vocab, (train.batch, length))
    documents = torch.zeros(train.batch, length, dtype=torch.int32) if train.document_mask else None
    parts = [slice(first, first + rows) for first in range(0, train.batch, rows)]
    stepper.update(
        [Batch(ids[p], ids[p], None if documents is None else documents[p]) for p in parts], 1e-3
    )
    if step == 0:
        weights = {key: value.detach() for key, value in stepper.decoder.named_parameters()}
        saver._copy(0, {"model": weights, "optimizer": dict(stepper.optimizers.state())})
print(peak_memory())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("tiny", {"train.optimizer": "adamw"}),
        ("demo", {"train.dtype": "fp32"}),
        ("13m", {"blocks.length": 256, "train.batch": 4, "train.micro_batch": 4}),
        (
            "13m",
            {
                "blocks.length": 256,
                "train.batch": 8,
                "train.micro_batch": 4,
                "train.activation_checkpointing": True,
            },
        ),
    ],
)
def test_the_memory_suffices_and_is_not_far_too_much(
    recipe: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REAL, recipe, json.dumps(changes), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    machine = cpu(1000, bf16=device.fast_bf16(torch.device("cpu")))
    reckoned = estimate.needed(estimate.memory(recipes.load(recipe, changes), machine), machine)
    ratio = reckoned / int(done.stdout)
    print(f"{recipe} {changes}: {reckoned >> 20} MiB reckoned, {int(done.stdout) >> 20} taken: {ratio:.2f}")
    assert 1.0 <= ratio <= 1.6


CHECKPOINTING = "set train.activation_checkpointing = true"


@pytest.mark.parametrize(
    ("machine", "processes", "recipe", "outcome"),
    [
        (RTX, 1, "13m", "none"),
        (RTX, 1, "13m-gpt", "none"),
        (RTX, 1, "llama-250m", "none"),
        (RTX, 1, "2b", 'train.activation_checkpointing = true, train.optimizer = "adamw8bit"'),
        (RTX, 8, "13m", "ddp"),
        (RTX, 8, "2b", CHECKPOINTING),
        (A100, 1, "llama-250m", "none"),
        (A100, 1, "2b", CHECKPOINTING),
        (H100, 1, "2b", "none"),
        (H100, 8, "2b", "ddp"),
        (H200, 1, "2b", "none"),
        (H200, 1, "2b-gpt", "none"),
    ],
)
def test_recipes_on_machines(machine: Machine, processes: int, recipe: str, outcome: str) -> None:
    """Each is planned, or refused in one line with settings that fit when they are made."""
    chosen = settings(recipe)
    if outcome in ("none", "ddp", "fsdp"):
        assert plan(chosen, machine, processes=processes).parallel == outcome
        return
    with pytest.raises(InputError) as refused:
        plan(chosen, machine, processes=processes)
    told = str(refused.value)
    assert outcome in told and "\n" not in told and machine.name in told
    assert plan(settings(recipe, **cured(told)), machine, processes=processes)


def cured(told: str) -> dict[str, Any]:
    """Return the settings that a refusal names, as a person would type them into the recipe."""
    return tomllib.loads(told.rpartition(": ")[2].removeprefix("set ").replace(", train.", "\ntrain."))[
        "train"
    ]


def test_no_more_is_asked_for_than_it_takes() -> None:
    with pytest.raises(InputError) as refused:
        plan(settings("2b"), RTX)
    changes = cured(str(refused.value))
    assert set(changes) == {"micro_batch", "activation_checkpointing", "optimizer"}
    with pytest.raises(InputError):
        plan(settings("2b", **{**changes, "micro_batch": 2 * changes["micro_batch"]}), RTX)
    for key in ("activation_checkpointing", "optimizer"):
        with pytest.raises(InputError):
            plan(settings("2b", **{other: value for other, value in changes.items() if other != key}), RTX)


def test_a_smaller_micro_batch_is_the_first_thing_to_try() -> None:
    with pytest.raises(InputError, match=r": set train\.micro_batch = 4$"):
        plan(settings("llama-250m"), gpu("Tesla T4", 14.6))


def test_bf16_comes_before_what_costs_time() -> None:
    with pytest.raises(InputError, match=r'set train\.micro_batch = \d, train\.dtype = "bf16", '):
        plan(settings("2b", dtype="fp32"), RTX)


def test_what_one_gpu_cannot_hold_several_may() -> None:
    with pytest.raises(InputError, match=r": train on \d+ of them together \(--processes \d+\)"):
        plan(settings("2b"), gpu("Tesla T4", 14.6))
    with pytest.raises(
        InputError, match=r"nothing that can be set brings it below 22\.\d GiB; use a machine with"
    ):
        plan(settings("2b"), gpu("Tesla T4", 0.9))


def test_shares_of_everything_take_less_than_copies() -> None:
    whole = estimate.memory(settings("2b"), H100, 8, "ddp")
    shared = estimate.memory(settings("2b"), H100, 8, "fsdp")
    assert shared.optimizer == 8 * 2_055_682_560 // 8
    assert estimate.needed(shared, H100) < estimate.needed(whole, H100) - 20 * GIB


def test_a_checkpoint_needs_main_memory_beside_a_gpu() -> None:
    told = (
        r"the copy of a checkpoint takes 27\.0 GiB of main memory beside NVIDIA H100 .*, and 20\.0 are free"
    )
    with pytest.raises(InputError, match=told):
        plan(settings("2b"), gpu(H100.name, 79.1, host=20 * GIB))
    assert plan(settings("2b"), gpu(H100.name, 79.1, host=64 * GIB))


def test_months_without_a_gpu_are_refused_in_one_sentence_unless_allowed() -> None:
    small = settings("2b", micro_batch=1, activation_checkpointing=True)
    with pytest.raises(InputError) as refused:
        plan(small, cpu(500))
    # 41.1e9 tokens x 14.1e9 operations / (1e11 x 0.35) / a year
    assert str(refused.value) == (
        "41.1B tokens through 2.06B parameters would take about 524 years on this CPU; use a machine with a GPU, "
        "or --allow-cpu to train here all the same"
    )
    assert "about 524 years" in plan(small, cpu(500), allow_cpu=True).text
    with pytest.raises(InputError, match=r"training takes .* and CPU \(2 threads\) has 20\.0: nothing"):
        plan(small, cpu(20), allow_cpu=True)


@pytest.mark.parametrize(("flops", "days"), [(1e11, None), (1e10, 179)])
def test_the_13m_on_a_cpu_is_allowed_where_it_takes_less_than_a_month(flops: float, days: int | None) -> None:
    if days is None:
        assert "time        about 18 days, at 17%" in plan(settings("13m"), cpu(16, flops)).text
        return
    with pytest.raises(InputError, match=f"about {days} days on this CPU"):
        plan(settings("13m"), cpu(16, flops))


def test_what_is_short_is_not_measured() -> None:
    def measured(_: torch.dtype) -> float:
        raise AssertionError("measured")

    assert plan(settings("demo"), Machine("CPU", "cpu", 8 * GIB, measured))


def test_the_table() -> None:
    text = plan(settings("2b"), gpu(H100.name, 79.1, host=64 * GIB)).text
    assert "2,055,682,560 parameters, trained on 41,084,108,800 tokens (5.79e+20 operations)" in text
    assert re.search(r"^  parameters +7\.7\n  gradients +7\.7\n  optimizer +15\.3\n", text, re.M)
    assert re.search(r"^  in all +63\.\d of 79\.1\n", text, re.M)
    assert re.search(r"^  main memory, for checkpoints +27\.0 of 64\.0\n", text, re.M)
    # 5.79e20 / (989.4e12 x 0.4): 406 hours
    assert "time        about 17 days, at 40% of its peak of 989 TFLOP/s\n" in text
    assert "GPU hours   H100 406." in text
    assert "over 2 processes" in plan(settings("13m"), H100, processes=2).text
    unknown = Machine("Some GPU", "cuda", 80 * GIB, lambda _: None)
    assert "time        not known: the table of peaks has no Some GPU\n" in plan(settings("2b"), unknown).text


def test_a_batch_must_divide_by_the_processes() -> None:
    with pytest.raises(InputError, match=r"train.batch 4 cannot be shared equally by 3 processes"):
        plan(settings("demo"), cpu(8), processes=3)
    assert plan(settings("demo"), cpu(8), processes=2).processes == 2


def test_the_command() -> None:
    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "models", "estimate", *arguments, "--device", "cpu"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    done = run("tiny", "--events")
    assert done.returncode == 0, done.stderr
    event = json.loads(done.stdout)
    assert (event["event"], event["parallel"]) == ("result", "none")
    assert event["text"].startswith("model       226,624 parameters")
    refused = run("2b")
    assert refused.returncode == 2
    assert re.fullmatch(r"error: recipe 2b: 41\.1B tokens .* --allow-cpu to train .*\n", refused.stderr)
