"""Who updates which parameter, how fast, and the state of it all as named tensors."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from corpora.errors import InputError
from models import shards
from models.decoder import Decoder
from models.muon import Muon
from models.settings import Train


class Tensors(Protocol):
    """Tensors by name, read when they are asked for."""

    def keys(self) -> Any: ...
    def get_tensor(self, name: str, /) -> Tensor: ...


def learning_rate(train: Train, step: int) -> float:
    """Return the learning rate of update `step`, counted from 0: linear warm-up, then as `train.schedule` says.

    wsd: constant, then linear to min_lr over the last `decay` of all steps (MiniCPM, arXiv 2404.06395).
    cosine: from the end of the warm-up half a cosine to min_lr.
    """
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    if train.schedule == "cosine":
        done = (step - train.warmup) / max(1, train.last_step - train.warmup)
        left = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    else:
        decay_steps = round(train.decay * train.last_step)
        left = min(1.0, (train.last_step - step) / decay_steps) if decay_steps else 1.0
    return train.lr * (train.min_lr + (1 - train.min_lr) * left)


class Optimizers:
    """AdamW for everything; or Muon for the matrices inside the blocks, and AdamW for the rest."""

    def __init__(self, decoder: Decoder, train: Train, muon_dtype: torch.dtype) -> None:
        self.train = train
        self.parameters: dict[str, Parameter] = dict(decoder.named_parameters())
        hidden, matrices, rest = [], [], []
        for name, parameter in self.parameters.items():
            if parameter.ndim < 2 or name in ("embedding.weight", "position.weight"):
                rest.append(parameter)
            elif train.optimizer == "muon" and name.startswith("blocks."):
                hidden.append(parameter)
            else:
                matrices.append(parameter)
        groups = [
            {"params": matrices, "weight_decay": train.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        adamw = _adamw8bit() if train.optimizer == "adamw8bit" else torch.optim.AdamW
        options = {} if train.optimizer == "adamw8bit" else {"fused": True}
        self.optimizers: list[torch.optim.Optimizer] = [
            adamw(
                [group for group in groups if group["params"]],
                lr=train.lr,
                betas=(train.beta1, train.beta2),
                **options,
            )
        ]
        if hidden:
            rows = {self.parameters[name]: rows for name, rows in decoder.fused_rows().items()}
            self.optimizers.append(Muon(hidden, train.lr, train.weight_decay, dtype=muon_dtype, rows=rows))

    def gradients(self) -> list[Tensor]:
        """Return the gradients of all parameters that have one."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def norm(self) -> float:
        """Return the norm of all gradients together, those of every process's share."""
        return shards.number(torch.nn.utils.get_total_norm(self.gradients()))

    def scale(self, factor: float) -> None:
        """Multiply all gradients."""
        torch._foreach_mul_(self.gradients(), factor)

    def step(self, lr: float) -> None:
        """Update all parameters and forget their gradients."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drop the gradients of all parameters."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the moments of every parameter as whole tensors with names; every process must ask."""
        for name, parameter in self.parameters.items():
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    yield (
                        f"{name}:{key}",
                        shards.whole(value if isinstance(value, Tensor) else torch.tensor(value)),
                    )

    def load(self, tensors: Tensors) -> None:
        """Take over the moments of a checkpoint; each process keeps its share."""
        moments: dict[str, dict[str, Tensor]] = {}
        for name in tensors.keys():
            parameter, _, key = name.partition(":")
            if parameter in self.parameters:
                moments.setdefault(parameter, {})[key] = tensors.get_tensor(name)
        names = {parameter: name for name, parameter in self.parameters.items()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if names[parameter] in moments:
                        optimizer.state[parameter] = _held(moments[names[parameter]], parameter, optimizer)


def _held(
    moments: Mapping[str, Tensor], parameter: Parameter, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Return a parameter's moments as its optimizer keeps them."""
    held: dict[str, Any] = {}
    for key, tensor in moments.items():
        if tensor.shape == parameter.shape:
            held[key] = shards.share(tensor, parameter)
        elif key == "step" and not isinstance(optimizer, torch.optim.AdamW | Muon):
            held[key] = int(tensor)  # bitsandbytes counts in an int
        else:
            held[key] = tensor.to(parameter.device)
    return held


def _adamw8bit() -> Any:
    """Return bitsandbytes' AdamW with moments of 8 bits, block by block (arXiv 2110.02861)."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError(
            f"train.optimizer adamw8bit needs bitsandbytes ({error}): pip install 'pileline[adamw8bit]'"
        ) from None
    return AdamW8bit
