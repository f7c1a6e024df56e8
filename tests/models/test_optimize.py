"""The learning rate, who updates what, Muon against torch's own."""

import sys

import pytest
import torch

from corpora.errors import InputError
from models import muon
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
        (
            {"schedule": "cosine", "warmup": 2},
            [0.5, 1, 1, 0.9619398, 0.8535534, 0.6913417, 0.5, 0.3086583, 0.1464466, 0.03806023],
        ),
        ({"schedule": "cosine", "warmup": 9, "min_lr": 0.5}, [n / 9 for n in range(1, 10)] + [1]),
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


def test_the_norm_is_of_all_gradients_and_scaling_reaches_them() -> None:
    built = decoder()
    optimizers = Optimizers(built, train(), torch.float32)
    for parameter in built.parameters():
        parameter.grad = torch.full_like(parameter, 8.0)
    count = sum(parameter.numel() for parameter in built.parameters())
    assert optimizers.norm() == pytest.approx(8.0 * count**0.5)
    optimizers.scale(0.25)
    assert all(bool((parameter.grad == 2.0).all()) for parameter in built.parameters())
    optimizers.forget()
    assert not optimizers.gradients()


class InMemory(dict[str, torch.Tensor]):
    """Tensors as a checkpoint gives them."""

    get_tensor = dict.__getitem__


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw8bit"])
def test_moments_saved_and_loaded_give_the_same_bits(optimizer: str) -> None:
    generator = torch.Generator().manual_seed(1)
    # Large enough for moments of 8 bits: bitsandbytes keeps small tensors in 32.
    shape = {"layers": 1, "width": 64, "heads": 2, "ffn": 128, "vocab": 96, "context": 8}
    model = Model(norm="rmsnorm", positions="rope", mlp="swiglu", **shape)

    def updates(built: Decoder, optimizers: Optimizers, count: int) -> None:
        for _ in range(count):
            for parameter in built.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizers.step(0.01)

    one, other = Decoder(model), Decoder(model)
    one.init_weights(1)
    first = Optimizers(one, train(optimizer=optimizer), torch.float32)
    updates(one, first, 3)
    saved = InMemory({name: tensor.clone() for name, tensor in first.state()})
    kinds = {name.rpartition(":")[2]: tensor.dtype for name, tensor in saved.items()}
    assert kinds["step"] == (torch.int64 if optimizer == "adamw8bit" else torch.float32)
    assert torch.uint8 in {tensor.dtype for tensor in saved.values()} or optimizer != "adamw8bit"
    other.load_state_dict(one.state_dict())
    second = Optimizers(other, train(optimizer=optimizer), torch.float32)
    second.load(saved)
    generator.manual_seed(2)
    updates(one, first, 2)
    generator.manual_seed(2)
    updates(other, second, 2)
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(
        InputError, match=r"adamw8bit needs bitsandbytes .*: pip install 'pileline\[adamw8bit\]'"
    ):
        Optimizers(decoder(), train(optimizer="adamw8bit"), torch.float32)


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


def test_muon_takes_fused_matrices_apart() -> None:
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(rows, 12, generator=generator) for rows in (24, 8, 8)]
    gradients = [torch.randn(part.shape, generator=generator) for part in parts]
    alone = [torch.nn.Parameter(part.clone()) for part in parts]
    fused = torch.nn.Parameter(torch.cat(parts))
    fused.grad = torch.cat(gradients)
    for parameter, gradient in zip(alone, gradients, strict=True):
        parameter.grad = gradient
    Muon(alone, lr=0.02, weight_decay=0.1, dtype=torch.float32).step()
    Muon([fused], lr=0.02, weight_decay=0.1, dtype=torch.float32, rows={fused: (24, 8, 8)}).step()
    torch.testing.assert_close(fused, torch.cat(alone), rtol=0, atol=1e-6)


def test_muon_in_portions_is_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    start = [torch.randn(8, 6, generator=generator) for _ in range(5)]
    gradients = [torch.randn(8, 6, generator=generator) for _ in range(5)]
    moved = []
    for at_once in (1 << 27, 100):
        monkeypatch.setattr(muon, "AT_ONCE", at_once)
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        Muon(parameters, lr=0.02, weight_decay=0.1, dtype=torch.float32).step()
        moved.append(torch.stack([p.detach() for p in parameters]))
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-6)
    assert not torch.equal(moved[0], torch.stack(start))


@pytest.mark.parametrize("shape", [(3, 12, 30), (2, 30, 12), (1, 16, 16)])
def test_orthogonal_matrices_have_singular_values_about_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert 0.3 < values.min() and values.max() < 1.3
