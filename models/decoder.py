"""One decoder for two families: GPT (learned positions, LayerNorm) and LLaMA (RoPE, RMSNorm, SwiGLU).

Shape suffixes:  B batch   T positions   D width   H query heads   K key/value heads   E channels of a head
                 F feed-forward   V vocabulary   N = B x T   S = positions seen so far and now
Positions are numbered from 0 in each row (or document); nothing depends on the length except a learned table.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from models import loss, shards
from models.settings import Model

NORM_EPSILON = 1e-5
SHORT = 16_384  # T x E up to which a CPU is faster in float32: its bf16 attention has a fixed cost on the way back

Rotary = tuple[Tensor, Tensor]  # cos and sin of the positions' angles
Mask = Tensor | BlockMask | None  # who sees whom, bool [B, 1, T, S] or [T, S]; None: all up to itself


@dataclass
class Cache:
    """Keys and values of the positions seen so far, [B, K, context, E] for each layer."""

    context: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    length: int = 0

    def append(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions of a layer; return all of its keys and values."""
        if layer == len(self.keys):
            B, K, _, E = k_BKTE.shape
            self.keys.append(k_BKTE.new_empty(B, K, self.context, E))
            self.values.append(v_BKTE.new_empty(B, K, self.context, E))
        end = self.length + k_BKTE.shape[2]
        self.keys[layer][:, :, self.length : end] = k_BKTE
        self.values[layer][:, :, self.length : end] = v_BKTE
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class Attention(nn.Module):
    """Causal self-attention; several query heads may share one key/value head."""

    def __init__(self, model: Model, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = model.heads, model.kv_heads or model.heads
        self.size = model.width // model.heads
        self.qkv = nn.Linear(model.width, (self.heads + 2 * self.kv_heads) * self.size, bias=False)
        self.out = nn.Linear(model.width, model.width, bias=model.bias)
        self.qk_norm = model.qk_norm
        if model.qk_norm:
            self.query_norm = nn.RMSNorm(self.size, eps=NORM_EPSILON)
            self.key_norm = nn.RMSNorm(self.size, eps=NORM_EPSILON)

    def forward(self, x_BTD: Tensor, rotary: Rotary | None, mask: Mask, cache: Cache | None) -> Tensor:
        B, T, D = x_BTD.shape
        parts = self.qkv(x_BTD).view(B, T, -1, self.size).transpose(1, 2)
        q_BHTE, k_BKTE, v_BKTE = parts.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if self.qk_norm:
            q_BHTE, k_BKTE = self.query_norm(q_BHTE.float()), self.key_norm(k_BKTE.float())
        if rotary is not None:
            q_BHTE, k_BKTE = rotate(q_BHTE, *rotary), rotate(k_BKTE, *rotary)
        if cache is not None:
            k_BKTE, v_BKTE = cache.append(self.layer, k_BKTE, v_BKTE)
        short = x_BTD.device.type == "cpu" and T * self.size <= SHORT
        dtype = torch.float32 if short else v_BKTE.dtype
        with torch.autocast(x_BTD.device.type, enabled=False):
            y_BHTE = attend(q_BHTE.to(dtype), k_BKTE.to(dtype), v_BKTE.to(dtype), mask)
        out: Tensor = self.out(y_BHTE.transpose(1, 2).reshape(B, T, D))
        return out


class FeedForward(nn.Module):
    """The feed-forward network: ReLU, GELU, or SwiGLU with its third matrix."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.kind = model.mlp
        if self.kind == "swiglu":
            self.gate_up = nn.Linear(model.width, 2 * model.ffn, bias=model.bias)
        else:
            self.up = nn.Linear(model.width, model.ffn, bias=model.bias)
        self.down = nn.Linear(model.ffn, model.width, bias=model.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.kind == "swiglu":
            gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, dim=-1)
            h_BTF = F.silu(gate_BTF) * up_BTF
        else:
            h_BTF = F.relu(self.up(x_BTD)) if self.kind == "relu" else F.gelu(self.up(x_BTD))
        out: Tensor = self.down(h_BTF)
        return out


class Block(nn.Module):
    """Attention and feed-forward, each normed before and added to the residual stream."""

    def __init__(self, model: Model, layer: int) -> None:
        super().__init__()
        self.attention_norm = norm(model)
        self.attention = Attention(model, layer)
        self.mlp_norm = norm(model)
        self.mlp = FeedForward(model)

    def forward(self, x_BTD: Tensor, rotary: Rotary | None, mask: Mask, cache: Cache | None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotary, mask, cache)
        out: Tensor = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return out


class Decoder(nn.Module):
    """Token ids to hidden states, to a loss (training) or to the next token's logits (generation).

    It can be built on the meta device, which allocates nothing: then `to_empty` and `init_weights`.

    document_mask: a token sees only its own document, where `documents_BT` is given
    reset_positions: positions count from each document's beginning, likewise
    activation_checkpointing: blocks are computed again in the backward pass
    """

    document_mask = False
    reset_positions = False
    activation_checkpointing = False

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.settings = model
        self.embedding = nn.Embedding(model.vocab, model.width)
        if model.positions == "learned":
            self.position = nn.Embedding(model.context, model.width)
        self.blocks = nn.ModuleList(Block(model, layer) for layer in range(model.layers))
        self.norm = norm(model)
        if not model.tie:
            self.head = nn.Linear(model.width, model.vocab, bias=model.head_bias)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights as GPT-2 does, from a generator of the CPU: the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        residual = 0.02 / math.sqrt(2 * self.settings.layers)  # two additions to the stream in each block
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = residual if name.endswith(("attention.out.weight", "mlp.down.weight")) else 0.02
                drawn = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
                parameter.copy_(shards.share(drawn, parameter))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """Return the parameters that are several matrices, one below the other, and the rows of each."""
        rows: dict[str, tuple[int, ...]] = {}
        for name, module in self.named_modules():
            if isinstance(module, Attention):
                kv = module.kv_heads * module.size
                rows[f"{name}.qkv.weight"] = (module.heads * module.size, kv, kv)
            elif isinstance(module, FeedForward) and module.kind == "swiglu":
                rows[f"{name}.gate_up.weight"] = (self.settings.ffn, self.settings.ffn)
        return rows

    def forward(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor,
        documents_BT: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        reduction: Literal["sum", "none"] = "sum",
    ) -> Tensor:
        """Return the nats of the targets that are not IGNORED, in float32.

        sum: their sum, differentiable (see loss.sum_of_nats); none: those of each, [B, T], without gradients
        """
        with torch.autocast(ids_BT.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden_ND = self.hidden(ids_BT, documents_BT=documents_BT).flatten(0, 1)
        head = (hidden_ND, *self.head_weights(), targets_BT.flatten(), dtype)
        return loss.sum_of_nats(*head) if reduction == "sum" else loss.nats(*head).view(targets_BT.shape)

    def hidden(
        self, ids_BT: Tensor, cache: Cache | None = None, documents_BT: Tensor | None = None
    ) -> Tensor:
        """Return the normed hidden states [B, T, D]; with a cache, of positions that follow those in it.

        documents_BT: which document of its row each id belongs to; see `document_mask` and `reset_positions`
        """
        T = ids_BT.shape[1]
        start = cache.length if cache is not None else 0
        if start + T > self.settings.context:
            raise ValueError(f"{start + T} positions, but the context is {self.settings.context}")
        positions = torch.arange(start, start + T, device=ids_BT.device)  # [T], or [B, T] when they are reset
        mask: Mask = None
        if documents_BT is not None:
            if cache is not None:
                raise ValueError("documents are for training, a cache is for generation")
            if self.reset_positions:
                positions = within_documents(documents_BT)
            if self.document_mask:
                mask = same_document(documents_BT)
        elif 1 < T < start + T:  # SDPA's own causal mask is aligned to the top left: right only for T = S
            mask = torch.ones(T, start + T, dtype=torch.bool, device=ids_BT.device).tril(start)
        x_BTD: Tensor = self.embedding(ids_BT)
        rotary = None
        if self.settings.positions == "learned":
            x_BTD = x_BTD + self.position(positions)
        else:
            size = self.settings.width // self.settings.heads
            rotary = rotary_tables(positions, size, self.settings.rope_theta)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BTD = checkpoint(
                    block, x_BTD, rotary, mask, None, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_BTD = block(x_BTD, rotary, mask, cache)
        if cache is not None:
            cache.length += T
        out: Tensor = self.norm(x_BTD)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the float32 logits [..., V] of hidden states [..., D]."""
        return F.linear(hidden, *self.head_weights()).float()

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return the output head's weight [V, D] and its bias, if it has one."""
        if self.settings.tie:
            return self.embedding.weight, None
        return self.head.weight, self.head.bias


def norm(model: Model) -> nn.Module:
    """Return a norm layer of the kind that the model uses."""
    if model.norm == "rmsnorm":
        return nn.RMSNorm(model.width, eps=NORM_EPSILON)
    return nn.LayerNorm(model.width, eps=NORM_EPSILON, bias=model.bias)


def same_document(documents_BT: Tensor) -> Tensor | BlockMask:
    """Return the mask by which a position sees those up to itself in its own document."""

    def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q >= kv) & (documents_BT[b, q] == documents_BT[b, kv])

    B, T = documents_BT.shape
    if documents_BT.is_cuda:  # a FlexAttention kernel passes over the blocks that a mask leaves nothing of
        return create_block_mask(sees, B, None, T, T, documents_BT.device)
    return create_mask(sees, B, None, T, T, documents_BT.device)


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    """Return FlexAttention as a kernel of its own; by itself it is a plain formula on whole score matrices."""
    return torch.compile(flex_attention)


def within_documents(documents_BT: Tensor) -> Tensor:
    """Return each position's number in its document, [B, T]: [4 4 4 7 7] gives [0 1 2 0 1]."""
    places_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    begins_BT = F.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0), value=True)
    return places_T - (places_T * begins_BT).cummax(dim=1).values


def attend(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Mask) -> Tensor:
    """Return softmax(q k' / sqrt(E)) v, [B, H, T, E], over what the mask lets each position see."""
    grouped = q_BHTE.shape[1] != k_BKSE.shape[1]
    if isinstance(mask, BlockMask):
        flex = flex_attention if torch.compiler.is_compiling() else compiled_flex()
        out: Tensor = flex(q_BHTE, k_BKSE, v_BKSE, block_mask=mask, enable_gqa=grouped)  # type: ignore[operator]
        return out
    causal = mask is None and q_BHTE.shape[2] > 1
    return F.scaled_dot_product_attention(q_BHTE, k_BKSE, v_BKSE, mask, is_causal=causal, enable_gqa=grouped)


def rotary_tables(positions: Tensor, size: int, theta: float) -> Rotary:
    """Return cos and sin of the angles of positions [T] or [B, T], in float32: [T, E/2] or [B, 1, T, E/2]."""
    powers = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
    angles = positions[..., None].float() * theta**-powers
    if positions.ndim == 2:
        angles = angles[:, None]  # the same for all heads
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i with channel i + E/2 (the halves of Hugging Face, not Meta's neighbours), in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def count_parameters(model: Model) -> int:
    """Return the number of parameters of a model, allocating none of them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(model).parameters())
