"""A training loop as most people write it in PyTorch:  plain_loop.py '{"shape": ..., "precision": ...}'

Fused q, k, v; scaled_dot_product_attention; logits of all positions at once; cross_entropy; fused AdamW;
gradients clipped; autocast when the precision is bf16.  For benchmarks.train, which says when to step.
"""

import contextlib
import json
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turns import Turns, random_ids


class Attention(nn.Module):
    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        self.heads, width = shape["heads"], shape["width"]
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=shape["bias"])

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).reshape(rows, length, width))
        return out


class FeedForward(nn.Module):
    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        width, hidden, bias = shape["width"], shape["ffn"], shape["bias"]
        self.up = nn.Linear(width, hidden, bias=bias)
        self.gate = nn.Linear(width, hidden, bias=bias) if shape["mlp"] == "swiglu" else None
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        out: Tensor = self.down(hidden)
        return out


class Block(nn.Module):
    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        self.norm1, self.attention = norm(shape), Attention(shape)
        self.norm2, self.mlp = norm(shape), FeedForward(shape)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attention(self.norm1(x), rotary)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Plain(nn.Module):
    """A GPT (learned positions, LayerNorm, ReLU) or a LLaMA (RoPE, RMSNorm, SwiGLU)."""

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape["vocab"], shape["width"])
        self.position = None
        if shape["positions"] == "learned":
            self.position = nn.Embedding(shape["context"], shape["width"])
        else:
            size = shape["width"] // shape["heads"]
            angles = torch.outer(
                torch.arange(shape["context"]), 10_000.0 ** -(torch.arange(0, size, 2) / size)
            )
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape["layers"]))
        self.norm = norm(shape)
        self.head = nn.Linear(shape["width"], shape["vocab"], bias=shape["head_bias"])
        if shape["tie"]:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits [B, T, V]."""
        x, rotary = self.embedding(ids), None
        length = ids.shape[1]
        if self.position is not None:
            x = x + self.position(torch.arange(length))
        else:
            rotary = (self.cos[:length], self.sin[:length])
        for block in self.blocks:
            x = block(x, rotary)
        logits: Tensor = self.head(self.norm(x))
        return logits


def norm(shape: dict[str, Any]) -> nn.Module:
    kind = nn.RMSNorm if shape["norm"] == "rmsnorm" else nn.LayerNorm
    return kind(shape["width"], eps=1e-5)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.manual_seed(1)
    model, turns = Plain(spec["shape"]), Turns(spec)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = random_ids(spec, 8 * spec["rows"]).split(spec["rows"])
    parameters = sum(p.numel() for p in model.parameters())
    step, more = 0, True
    while more:
        batch = ids[step % len(ids)]
        half = spec["precision"] == "bf16"
        with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
            logits = model(batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        more = turns.more(parameters=parameters, loss=loss.item(), torch=torch.__version__)


if __name__ == "__main__":
    main()
