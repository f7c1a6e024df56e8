"""The network against plain references, and the exact sizes of the recipes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from deployments import recipe
from models.decoder import IGNORED, Cache, Decoder, count_parameters, rotary_tables, rotate
from models.settings import Model

GPT: dict[str, Any] = {
    "norm": "layernorm",
    "positions": "learned",
    "mlp": "gelu",
    "layers": 2,
    "width": 32,
    "heads": 4,
    "ffn": 64,
    "vocab": 97,
    "context": 24,
    "tie": False,
    "bias": True,
    "head_bias": True,
}
LLAMA: dict[str, Any] = GPT | {
    "norm": "rmsnorm",
    "positions": "rope",
    "mlp": "swiglu",
    "kv_heads": 2,
    "tie": True,
    "bias": False,
    "head_bias": False,
}


def build(tables: dict[str, Any], seed: int = 1, **changes: Any) -> Decoder:
    decoder = Decoder(Model(**{**tables, **changes}))
    decoder.init_weights(seed)
    return decoder


def ids(*shape: int, vocab: int = 97, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("13m", 13_200_576),
        ("2b", 2_055_682_560),
        ("13m-gpt", 13_142_656),
        ("2b-gpt", 2_121_577_600),
    ],
)
def test_recipes_have_exactly_these_parameters(name: str, parameters: int) -> None:
    assert count_parameters(recipe.load(name).model) == parameters


def test_initial_weights_are_gpt2s_and_depend_on_the_seed_only() -> None:
    with torch.device("meta"):
        decoder = Decoder(Model(**{**GPT, "width": 256}))
    assert all(parameter.is_meta for parameter in decoder.parameters())
    decoder.to_empty(device="cpu")
    decoder.init_weights(5)
    assert decoder.blocks[0].attention.query.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert decoder.blocks[1].mlp.down.weight.std().item() == pytest.approx(0.01, rel=0.02)  # 0.02 / sqrt(4)
    assert decoder.blocks[0].mlp.up.bias.abs().max() == 0
    assert decoder.norm.weight.min() == 1 and decoder.norm.bias.abs().max() == 0
    again = build(GPT, seed=5, width=256)
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), again.parameters(), strict=True))
    other = build(GPT, seed=6, width=256)
    assert not torch.equal(other.embedding.weight, again.embedding.weight)


def test_rotary_is_multiplication_by_unit_complex_numbers() -> None:
    x = torch.randn(2, 3, 7, 8)
    positions = torch.arange(5, 12)
    got = rotate(x, *rotary_tables(positions, 8, 10_000.0))
    angles = positions[:, None] * 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(got, torch.cat([turned.real, turned.imag], -1))


def test_rotary_makes_attention_depend_on_distance_only() -> None:
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(at: int, to: int) -> float:
        q_, k_ = (rotate(x, *rotary_tables(torch.tensor([p]), 16, 1e4)) for x, p in ((q, at), (k, to)))
        return float((q_ * k_).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 8), abs=1e-4)


def test_grouped_queries_equal_repeated_keys_and_values() -> None:
    grouped = build(LLAMA)
    full = build(LLAMA, kv_heads=4)
    weights = grouped.state_dict()
    for name, tensor in weights.items():
        if name.endswith(("key.weight", "value.weight")):
            weights[name] = tensor.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(weights)
    torch.testing.assert_close(grouped.hidden(ids(2, 11)), full.hidden(ids(2, 11)))


@pytest.mark.parametrize("tables", [GPT, LLAMA], ids=["gpt", "llama"])
def test_attention_is_softmax_of_scaled_products_over_the_past(tables: dict[str, Any]) -> None:
    decoder = build(tables, positions="learned", kv_heads=None)
    attention = decoder.blocks[0].attention
    x = torch.randn(1, 6, 32)
    q, k, v = (part(x).view(6, 4, 8) for part in (attention.query, attention.key, attention.value))
    expected = torch.zeros(6, 4, 8)
    for head in range(4):
        for t in range(6):
            shares = (k[: t + 1, head] @ q[t, head] / 8**0.5).softmax(0)
            expected[t, head] = shares @ v[: t + 1, head]
    torch.testing.assert_close(attention(x, None, None), attention.out(expected.view(1, 6, 32)))


@pytest.mark.parametrize("tables", [GPT, LLAMA], ids=["gpt", "llama"])
def test_no_position_sees_the_future(tables: dict[str, Any]) -> None:
    decoder = build(tables)
    one = ids(1, 12)
    other = one.clone()
    other[0, 7:] = (other[0, 7:] + 1) % 97
    a, b = decoder.hidden(one), decoder.hidden(other)
    assert torch.equal(a[:, :7], b[:, :7])
    assert not torch.allclose(a[:, 7:], b[:, 7:])


@pytest.mark.parametrize("tables", [GPT, LLAMA], ids=["gpt", "llama"])
def test_cache_gives_the_same_hidden_states(tables: dict[str, Any]) -> None:
    decoder = build(tables)
    row = ids(2, 20)
    cache = Cache(24)
    parts = [decoder.hidden(part, cache) for part in row.split([9, 1, 1, 6, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), decoder.hidden(row), atol=1e-5, rtol=1e-5)


def test_more_positions_than_the_context_is_an_error() -> None:
    with pytest.raises(ValueError, match="25 positions, but the context is 24"):
        build(LLAMA).hidden(ids(1, 25))


@pytest.mark.parametrize("tables", [GPT, LLAMA], ids=["gpt-head-bias", "llama-tied"])
@pytest.mark.parametrize("exact", [False, True])
def test_loss_and_gradients_are_those_of_whole_logits(tables: dict[str, Any], exact: bool) -> None:
    row, targets = ids(20, 24), ids(20, 24, seed=4)  # 480 rows: more than a chunk
    targets[:, 17:] = IGNORED
    targets[3] = IGNORED
    chunked, whole = build(tables), build(tables)
    if not tables["tie"]:
        for decoder in (chunked, whole):
            torch.nn.init.normal_(decoder.head.bias, generator=torch.Generator().manual_seed(8))
    loss = chunked(row, targets, exact=exact)
    loss.backward()
    logits = whole.logits(whole.hidden(row))
    reference = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED
    )
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    for (name, a), b in zip(chunked.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert chunked.nats(row, targets).sum().item() == pytest.approx(reference.item(), rel=1e-6)
    assert chunked.nats(row, targets)[3].abs().max() == 0


def test_bf16_loss_is_near_and_exact_when_asked() -> None:
    decoder, row, targets = build(LLAMA), ids(20, 24), ids(20, 24, seed=4)
    reference = decoder(row, targets).item()
    assert decoder(row, targets, torch.bfloat16, exact=True).item() == pytest.approx(reference, rel=5e-4)
    assert decoder(row, targets, torch.bfloat16).item() == pytest.approx(reference, rel=5e-3)


@pytest.mark.parametrize("tables", [GPT, LLAMA], ids=["gpt", "llama"])
def test_a_batch_can_be_learned_by_heart(tables: dict[str, Any]) -> None:
    decoder = build(tables)
    row = ids(4, 17)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.01)
    for _ in range(80):
        loss = decoder(row[:, :-1], row[:, 1:]) / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
