"""One update: what it sums, what it clips, what it refuses, and what it needs."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models.data import Batch
from models.loss import IGNORED
from models.optimize import Optimizers
from models.processes import Processes
from models.settings import Model, Train
from models.step import Stepper

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
MODEL = Model(
    norm="rmsnorm", positions="rope", mlp="swiglu", layers=2, width=32, heads=4, ffn=48, vocab=97, context=16
)


def stepper(seed: int = 1, dtype: torch.dtype = torch.float32, **train: Any) -> Stepper:
    table = {"steps": 10, "batch": 8, "lr": 0.01, "weight_decay": 0.0, **train}
    built = Stepper(MODEL, Train.model_validate(table), Processes(0, 1, CPU), dtype=dtype)
    built.init(seed)
    return built


def batch(rows: int, seed: int = 2, padding: int = 0) -> Batch:
    ids = torch.randint(0, 97, (rows, 17), generator=torch.Generator().manual_seed(seed))
    targets = ids[:, 1:].clone()
    if padding:
        targets[:, -padding:] = IGNORED
    return Batch(ids[:, :-1], targets, None)


def weights(built: Stepper) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in built.decoder.named_parameters()}


def test_four_micro_batches_are_one_batch_of_four_times_the_rows() -> None:
    whole, parts = stepper(), stepper()
    rows = batch(8)
    # Unequal padding: the mean over micro-batches of their means would be another number.
    rows.targets_BT[0, 2:] = IGNORED
    rows.targets_BT[5, 9:] = IGNORED
    quarters = [Batch(rows.ids_BT[n : n + 2], rows.targets_BT[n : n + 2], None) for n in range(0, 8, 2)]
    for _ in range(3):
        one, other = whole.update([rows], 0.01), parts.update(quarters, 0.01)
        assert one.targets == other.targets == 8 * 16 - 14 - 7
        assert one.loss == pytest.approx(other.loss, abs=1e-6)
        assert one.grad_norm == pytest.approx(other.grad_norm, abs=1e-6)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=0, atol=1e-5)


def test_the_loss_is_the_mean_over_targets() -> None:
    built, rows = stepper(), batch(4, padding=5)
    logits = built.decoder.logits(built.decoder.hidden(rows.ids_BT)).detach()
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-5].flatten(0, 1), rows.targets_BT[:, :-5].flatten()
    )
    update = built.update([rows], 0.01)
    assert update.loss == pytest.approx(float(expected), abs=1e-6)
    assert (update.targets, update.bad, update.stop) == (4 * 11, None, False)


@pytest.mark.parametrize(("clip", "expected"), [(1e-3, 1e-3), (1e6, None)])
def test_gradients_are_clipped_to_the_norm(
    clip: float, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = stepper(clip=clip)
    norms: list[float] = []
    monkeypatch.setattr(Optimizers, "step", lambda self, lr: norms.append(self.norm()))
    update = built.update([batch(4)], 0.01)
    assert norms == [pytest.approx(expected or update.grad_norm, rel=1e-4)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_changes_nothing(value: float) -> None:
    built = stepper()
    built.update([batch(4)], 0.01)
    with torch.no_grad():
        built.decoder.blocks[1].mlp.down.weight[3, 4] = value
    before = weights(built)
    moments = {name: tensor.clone() for name, tensor in built.optimizers.state()}
    update = built.update([batch(4)], 0.01)
    assert update.bad is not None and "the gradient norm nan" in update.bad
    spoilt = "blocks.1.mlp.down.weight"
    assert all(torch.equal(before[n], t) for n, t in weights(built).items() if n != spoilt)
    assert all(torch.equal(moments[name], tensor) for name, tensor in built.optimizers.state())
    assert not built.optimizers.gradients()


def test_a_step_of_padding_only_is_no_division_by_zero() -> None:
    built = stepper()
    before = weights(built)
    update = built.update([batch(4, padding=16)], 0.01)
    assert (update.loss, update.targets, update.grad_norm, update.bad) == (0.0, 0, 0.0, None)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(built).items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_is_learned_by_heart(optimizer: str, dtype: torch.dtype) -> None:
    built, rows = stepper(optimizer=optimizer, dtype=dtype), batch(4)
    for _ in range(70):
        update = built.update([rows], 0.01)
    assert update.loss < 0.05


def test_the_stop_of_any_process_is_heard() -> None:
    assert stepper().update([batch(4)], 0.01, stop=True).stop


WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is not there", name=name)
sys.meta_path.insert(0, Blocked())
import models.step, models.hardware, models.estimate
print("imported")
"""


def test_it_runs_from_a_bare_checkout() -> None:
    blocked = {
        "zstandard",
        "pyarrow",
        "prefect",
        "tiktoken",
        "sentencepiece",
        "requests",
        "orjson",
        "datasets",
    }
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(blocked=blocked)], cwd=ROOT, capture_output=True, text=True
    )
    assert process.stdout == "imported\n", process.stderr
