"""The learning rate, who updates what, Muon against torch's own."""

import pytest
import torch

from models.decoder import Decoder
from models.muon import Muon, orthogonal
from models.optimize import Optimizers, learning_rate
from models.settings import Model, Train


def train(**changes: object) -> Train:
    return Train.model_validate({"steps": 10, "batch": 1, "lr": 1.0, **changes})


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"decay": 0.0}, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ({"warmup": 4, "decay": 0.0}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"warmup": 2, "decay": 0.5}, [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ({"decay": 0.4, "min_lr": 0.5}, [1, 1, 1, 1, 1, 1, 1, 0.875, 0.75, 0.625]),
    ],
)
def test_learning_rate_of_each_step(changes: dict[str, float], rates: list[float]) -> None:
    assert [learning_rate(train(**changes), step) for step in range(10)] == pytest.approx(rates)


def decoder() -> Decoder:
    shape = {"layers": 2, "width": 8, "heads": 2, "ffn": 16, "vocab": 31, "context": 8}
    built = Decoder(Model(norm="layernorm", positions="learned", mlp="gelu", bias=True, tie=False, **shape))
    built.init_weights(1)
    return built


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    built = decoder()
    optimizers = Optimizers(built, train(optimizer="muon"), torch.float32)
    names = {parameter: name for name, parameter in built.named_parameters()}
    decay = {
        names[p]: (type(optimizer).__name__, group["weight_decay"])
        for optimizer in optimizers.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert set(decay) == set(names.values())
    for name, (kind, rate) in decay.items():
        if name.startswith("blocks.") and built.get_parameter(name).ndim == 2:
            assert (kind, rate) == ("Muon", 0.1), name
        else:
            assert (kind, rate) == ("AdamW", 0.1 if name == "head.weight" else 0.0), name


def test_gradients_are_divided_then_clipped() -> None:
    built = decoder()
    optimizers = Optimizers(built, train(clip=0.5), torch.float32)
    for parameter in built.parameters():
        parameter.grad = torch.full_like(parameter, 8.0)
    count = sum(parameter.numel() for parameter in built.parameters())
    assert optimizers.scale_and_clip(4.0) == pytest.approx(2.0 * count**0.5)
    total = sum(
        float(parameter.grad.square().sum()) for parameter in built.parameters() if parameter.grad is not None
    )
    assert total**0.5 == pytest.approx(0.5, rel=1e-4)


def test_muon_does_what_torchs_own_does() -> None:
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator) for shape in ((8, 24), (8, 24), (24, 8), (16, 16))]
    ours = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    theirs = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    one = Muon(ours, lr=0.02, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        one.step()
        other.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        moved = (b - before).norm().item()
        assert (a - b).norm().item() < 0.02 * moved  # the iteration's bfloat16, in another order


@pytest.mark.parametrize("shape", [(3, 12, 30), (2, 30, 12), (1, 16, 16)])
def test_orthogonal_matrices_have_singular_values_about_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonal(matrices, torch.float32))
    assert 0.3 < values.min() and values.max() < 1.3
