"""Who updates which parameter, how fast, and the state of it all as named tensors."""

from typing import Any

import torch
from torch import Tensor

from models.decoder import Decoder
from models.muon import Muon
from models.settings import Train


def learning_rate(train: Train, step: int) -> float:
    """Return the learning rate of update `step`, counted from 0: linear warm-up, constant, linear decay."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    decay_steps = round(train.decay * train.steps)
    if decay_steps == 0:
        return train.lr
    left = min(1.0, (train.steps - step) / decay_steps)
    return train.lr * (train.min_lr + (1 - train.min_lr) * left)


class Optimizers:
    """AdamW for everything; or Muon for the matrices inside the blocks, and AdamW for the rest."""

    def __init__(self, decoder: Decoder, train: Train, muon_dtype: torch.dtype) -> None:
        self.train = train
        self.parameters = dict(decoder.named_parameters())
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
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=train.lr,
                betas=(train.beta1, train.beta2),
                fused=True,
            )
        ]
        if hidden:
            self.optimizers.append(Muon(hidden, train.lr, train.weight_decay, dtype=muon_dtype))

    def scale_and_clip(self, count: float) -> float:
        """Divide all gradients by `count`, then clip them; return their norm between the two."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) / count
        factor = min(1.0, self.train.clip / (norm + 1e-6)) / count
        for gradient in gradients:
            gradient.mul_(factor)
        return norm

    def step(self, lr: float) -> None:
        """Update all parameters and forget their gradients."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Return the moments of every parameter as tensors with names."""
        return {
            f"{name}:{key}": value
            for name, parameter in self.parameters.items()
            for optimizer in self.optimizers
            for key, value in optimizer.state.get(parameter, {}).items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over the moments of a checkpoint."""
        moments: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            parameter, _, key = name.partition(":")
            moments.setdefault(parameter, {})[key] = tensor
        names = {parameter: name for name, parameter in self.parameters.items()}
        for optimizer in self.optimizers:
            ordered = [names[p] for group in optimizer.param_groups for p in group["params"]]
            state: dict[int, Any] = {i: moments[name] for i, name in enumerate(ordered) if name in moments}
            optimizer.load_state_dict(
                {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
            )
