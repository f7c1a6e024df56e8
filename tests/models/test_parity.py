"""The same numbers as Hugging Face's networks, from the same weights: logits, loss and gradients."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.decoder import Decoder
from models.settings import Model

SHAPE: dict[str, Any] = {"layers": 3, "width": 48, "heads": 6, "ffn": 80, "vocab": 131, "context": 40}
GPT: dict[str, Any] = {**SHAPE, "norm": "layernorm", "positions": "learned", "bias": True}
LLAMA: dict[str, Any] = {**SHAPE, "norm": "rmsnorm", "positions": "rope", "mlp": "swiglu"}


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of at its own import is not ours
        return pytest.importorskip("transformers")


def build(tables: dict[str, Any]) -> Decoder:
    """Return a network whose every weight is drawn wide, biases and norms as well, so that each one counts."""
    decoder = Decoder(Model(**tables))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.normal_(
                1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1, generator=generator
            )
    return decoder


def llama_names(decoder: Decoder, take: Any) -> dict[str, Tensor]:
    """Return what `take` makes of each weight, under the names of LlamaForCausalLM: fused ones come apart."""
    told: dict[str, Tensor] = {}
    rows = decoder.fused_rows()
    for name, parameter in decoder.named_parameters():
        path = (
            name.replace("blocks.", "model.layers.")
            .replace("attention_norm", "input_layernorm")
            .replace("mlp_norm", "post_attention_layernorm")
            .replace("attention.", "self_attn.")
            .replace("query_norm", "q_norm")
            .replace("key_norm", "k_norm")
            .replace("self_attn.out", "self_attn.o_proj")
            .replace("mlp.down", "mlp.down_proj")
        )
        path = {
            "embedding.weight": "model.embed_tokens.weight",
            "norm.weight": "model.norm.weight",
            "head.weight": "lm_head.weight",
        }.get(name, path)
        if name in rows:
            fused, parts = ("qkv", ("q", "k", "v")) if "qkv" in name else ("gate_up", ("gate", "up"))
            for part, tensor in zip(parts, take(parameter).split(rows[name]), strict=True):
                told[path.replace(fused, f"{part}_proj")] = tensor
        else:
            told[path] = take(parameter)
    return told


def gpt2_names(decoder: Decoder, take: Any) -> dict[str, Tensor]:
    """The same for GPT2LMHeadModel, which keeps its matrices transposed."""
    told: dict[str, Tensor] = {}
    for name, parameter in decoder.named_parameters():
        path = (
            name.replace("blocks.", "transformer.h.")
            .replace("attention_norm", "ln_1")
            .replace("mlp_norm", "ln_2")
            .replace("attention.qkv", "attn.c_attn")
            .replace("attention.out", "attn.c_proj")
            .replace("mlp.up", "mlp.c_fc")
            .replace("mlp.down", "mlp.c_proj")
        )
        path = {
            "embedding.weight": "transformer.wte.weight",
            "position.weight": "transformer.wpe.weight",
            "norm.weight": "transformer.ln_f.weight",
            "norm.bias": "transformer.ln_f.bias",
            "head.weight": "lm_head.weight",
        }.get(name, path)
        told[path] = take(parameter).t() if ".c_" in path and parameter.ndim == 2 else take(parameter)
    return told


def compare(decoder: Decoder, theirs: nn.Module, names: Any) -> None:
    """Give `theirs` our weights; hold its logits and the gradients of its loss against ours."""
    missing, unexpected = theirs.load_state_dict(names(decoder, Tensor.detach), strict=False)
    assert unexpected == []
    for name in missing:  # a tied head; and the bias of queries, keys and values, which we do not have
        assert name == "lm_head.weight" or name.endswith("attn.c_attn.bias")
        if name.endswith("bias"):
            nn.init.zeros_(theirs.get_parameter(name))
    theirs.eval()
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(0, 131, (2, 41), generator=generator)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    logits = theirs(inputs, use_cache=False).logits
    ours = decoder.logits(decoder.hidden(inputs))
    assert logits.std() > 0.3  # large enough to tell something
    assert (ours - logits).abs().max() < 1e-5
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    own = decoder(inputs, targets)
    own.backward()
    assert own.item() == pytest.approx(loss.item(), rel=1e-6)
    gradients = names(decoder, lambda parameter: parameter.grad)
    for name, gradient in gradients.items():
        expected = theirs.get_parameter(name).grad
        assert expected is not None
        assert (gradient - expected).norm() < 1e-5 * expected.norm(), name
    assert len(gradients) >= 2 + 6 * 3


@pytest.mark.parametrize("mlp", ["relu", "gelu"])
@pytest.mark.parametrize("tie", [True, False])
def test_gpt_shape_is_gpt2(transformers: Any, mlp: str, tie: bool) -> None:
    config = transformers.GPT2Config(
        vocab_size=131,
        n_positions=40,
        n_embd=48,
        n_layer=3,
        n_head=6,
        n_inner=80,
        activation_function=mlp,  # its own default is gelu_new, an approximation
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=tie,
        bos_token_id=0,
        eos_token_id=0,
    )
    compare(build({**GPT, "mlp": mlp, "tie": tie}), transformers.GPT2LMHeadModel(config), gpt2_names)


def llama_config(of: Any, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": 131,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "head_dim": 8,
        "max_position_embeddings": 40,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return of(**{**settings, **changes})


@pytest.mark.parametrize(
    ("tie", "kv_heads", "theta"), [(True, 6, 10_000.0), (True, 2, 500.0), (False, 1, 500_000.0)]
)
def test_llama_shape_is_llama(transformers: Any, tie: bool, kv_heads: int, theta: float) -> None:
    config = llama_config(
        transformers.LlamaConfig,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tie,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    ours = build({**LLAMA, "tie": tie, "kv_heads": kv_heads, "rope_theta": theta})
    compare(ours, transformers.LlamaForCausalLM(config), llama_names)


def test_with_qk_norm_it_is_qwen3(transformers: Any) -> None:
    config = llama_config(
        transformers.Qwen3Config,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    compare(
        build({**LLAMA, "kv_heads": 2, "qk_norm": True}), transformers.Qwen3ForCausalLM(config), llama_names
    )
