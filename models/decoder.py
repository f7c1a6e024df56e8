"""One decoder for two families: GPT (learned positions, LayerNorm) and LLaMA (RoPE, RMSNorm, SwiGLU).

Shape suffixes:  B batch   T positions   D width   H query heads   K key/value heads   E channels of a head
                 F feed-forward   V vocabulary   N = B x T   S = positions seen so far and now
Positions are numbered from 0 in each row; nothing here depends on the length except a learned table.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.settings import Model

IGNORED = -100  # a target that is padding
CHUNK = 256  # rows of logits that exist at a time; on a CPU smaller and larger chunks are slower
CUDA_CHUNK = 4096
NORM_EPSILON = 1e-5


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
        size = model.width // model.heads
        self.query = nn.Linear(model.width, self.heads * size, bias=False)
        self.key = nn.Linear(model.width, self.kv_heads * size, bias=False)
        self.value = nn.Linear(model.width, self.kv_heads * size, bias=False)
        self.out = nn.Linear(model.width, model.width, bias=model.bias)

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: Cache | None) -> Tensor:
        B, T, D = x_BTD.shape
        q_BHTE = self.query(x_BTD).view(B, T, self.heads, -1).transpose(1, 2)
        k_BKTE = self.key(x_BTD).view(B, T, self.kv_heads, -1).transpose(1, 2)
        v_BKTE = self.value(x_BTD).view(B, T, self.kv_heads, -1).transpose(1, 2)
        if rotary is not None:
            q_BHTE, k_BKTE = rotate(q_BHTE, *rotary), rotate(k_BKTE, *rotary)
        mask_TS = None
        if cache is not None:
            k_BKTE, v_BKTE = cache.append(self.layer, k_BKTE, v_BKTE)
            S = k_BKTE.shape[2]
            if 1 < T < S:  # SDPA's own causal mask is aligned to the top left: right only for T = S
                mask_TS = torch.ones(T, S, dtype=torch.bool, device=x_BTD.device).tril(S - T)
        y_BHTE = F.scaled_dot_product_attention(
            q_BHTE,
            k_BKTE,
            v_BKTE,
            attn_mask=mask_TS,
            is_causal=mask_TS is None and T > 1,
            enable_gqa=self.heads != self.kv_heads,
        )
        out: Tensor = self.out(y_BHTE.transpose(1, 2).reshape(B, T, D))
        return out


class FeedForward(nn.Module):
    """The feed-forward network: ReLU, GELU, or SwiGLU with its third matrix."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.kind = model.mlp
        self.up = nn.Linear(model.width, model.ffn, bias=model.bias)
        if self.kind == "swiglu":
            self.gate = nn.Linear(model.width, model.ffn, bias=model.bias)
        self.down = nn.Linear(model.ffn, model.width, bias=model.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h_BTF = self.up(x_BTD)
        if self.kind == "swiglu":
            h_BTF = F.silu(self.gate(x_BTD)) * h_BTF
        else:
            h_BTF = F.relu(h_BTF) if self.kind == "relu" else F.gelu(h_BTF)
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

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: Cache | None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotary, cache)
        out: Tensor = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return out


class Decoder(nn.Module):
    """Token ids to hidden states, to a loss (training) or to the next token's logits (generation).

    It can be built on the meta device, which allocates nothing: then `to_empty` and `init_weights`.
    """

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
                parameter.copy_(drawn)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    def hidden(self, ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the normed hidden states [B, T, D]; with a cache, of positions that follow those in it."""
        T = ids_BT.shape[1]
        start = cache.length if cache is not None else 0
        if start + T > self.settings.context:
            raise ValueError(f"{start + T} positions, but the context is {self.settings.context}")
        positions_T = torch.arange(start, start + T, device=ids_BT.device)
        x_BTD: Tensor = self.embedding(ids_BT)
        rotary = None
        if self.settings.positions == "learned":
            x_BTD = x_BTD + self.position(positions_T)
        else:
            size = self.settings.width // self.settings.heads
            rotary = rotary_tables(positions_T, size, self.settings.rope_theta)
        for block in self.blocks:
            x_BTD = block(x_BTD, rotary, cache)
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

    def forward(
        self, ids_BT: Tensor, targets_BT: Tensor, dtype: torch.dtype = torch.float32, exact: bool = False
    ) -> Tensor:
        """Return the training loss: nats summed over the targets that are not IGNORED.

        Only CHUNK rows of logits exist at a time.  With bfloat16 the gradients are good and the returned
        sum is rounded to three digits, unless `exact` (dearer) asks for a value to be logged.
        """
        with torch.autocast(ids_BT.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden_ND = self.hidden(ids_BT).flatten(0, 1)
        weight_VD, bias_V = self.head_weights()
        # Cast here and not by autocast, under which the function below falls back to float32.
        losses = F.linear_cross_entropy(
            hidden_ND.to(dtype),
            weight_VD.to(dtype),
            targets_BT.flatten(),
            linear_bias=None if bias_V is None else bias_V.to(dtype),
            reduction="none" if exact else "sum",
            ignore_index=IGNORED,
            options=torch.nn.LinearCrossEntropyOptions(
                batch_chunk_size=CUDA_CHUNK if ids_BT.is_cuda else CHUNK,
                chunking_method=None,  # the default picks chunks of a few rows: 8 times slower than none
                acc_policy="accurate",
            ),
        )
        return losses.float().sum()

    @torch.no_grad()
    def nats(self, ids_BT: Tensor, targets_BT: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the loss of every target [B, T] in float32, 0 where it is IGNORED: for evaluation."""
        with torch.autocast(ids_BT.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden_ND = self.hidden(ids_BT).flatten(0, 1)
            chunk = CUDA_CHUNK if ids_BT.is_cuda else CHUNK
            losses = [
                F.cross_entropy(self.logits(h), t, reduction="none", ignore_index=IGNORED)
                for h, t in zip(
                    torch.split(hidden_ND, chunk), torch.split(targets_BT.flatten(), chunk), strict=True
                )
            ]
        return torch.cat(losses).view(targets_BT.shape)


def norm(model: Model) -> nn.Module:
    """Return a norm layer of the kind that the model uses."""
    if model.norm == "rmsnorm":
        return nn.RMSNorm(model.width, eps=NORM_EPSILON)
    return nn.LayerNorm(model.width, eps=NORM_EPSILON, bias=model.bias)


def rotary_tables(positions_T: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin [T, E/2] of each position's angles, in float32."""
    powers = torch.arange(0, size, 2, device=positions_T.device, dtype=torch.float32) / size
    angles = torch.outer(positions_T.float(), theta**-powers)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i with channel i + E/2 (the halves of Hugging Face, not Meta's neighbouring pairs)."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def count_parameters(model: Model) -> int:
    """Return the number of parameters of a model, allocating none of them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(model).parameters())
