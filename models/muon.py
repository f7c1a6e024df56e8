"""Muon: momentum, made orthogonal.  The arithmetic of torch.optim.Muon with three differences.

Matrices of one shape are worked on together; a parameter that holds several, one below the other (query, key
and value), is taken apart first; and the iteration runs in bfloat16 only on a device that has instructions for
it: on a processor without them torch's own takes longer than the rest of a step.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from models import shards

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that drives singular values to about 1
ITERATIONS = 5
AT_ONCE = 1 << 27  # numbers that are made orthogonal together; the iteration needs some times their memory


class Muon(torch.optim.Optimizer):
    """For matrices inside the network; the learning rate and the decay may be those of AdamW.

    An update has 0.2 times the root mean square that its orthogonal matrix would have if it were square and
    as large as its longer side: about that of an update of AdamW.  With FSDP2 every process makes all updates
    orthogonal and takes its rows.

    rows: of the matrices in a parameter that is more than one of them
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
        rows: Mapping[Parameter, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype, self.rows = dtype, rows or {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            waiting: list[tuple[Parameter, Tensor]] = []
            numbers = 0
            for parameter in group["params"]:
                if parameter.grad is not None:
                    waiting.append((parameter, self._momentum(parameter, group["momentum"])))
                    numbers += parameter.numel()
                if numbers >= AT_ONCE:
                    self._update(waiting, group)
                    waiting, numbers = [], 0
            self._update(waiting, group)

    def _momentum(self, parameter: Parameter, momentum: float) -> Tensor:
        """Return the whole of a parameter's Nesterov momentum, in the number format of the iteration."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average: Tensor = state["momentum_buffer"]
        average.lerp_(parameter.grad, 1 - momentum)
        return shards.whole(parameter.grad.lerp(average, momentum).to(self.dtype))

    def _update(self, waiting: list[tuple[Parameter, Tensor]], group: dict[str, Any]) -> None:
        matrices = [
            part
            for parameter, moved in waiting
            for part in torch.split(moved, list(self.rows.get(parameter, [len(moved)])))
        ]
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for n, matrix in enumerate(matrices):
            by_shape[matrix.shape].append(n)
        for shape, numbers in by_shape.items():
            size = 0.2 * math.sqrt(max(shape))
            for n, update in zip(
                numbers, orthogonal(torch.stack([matrices[n] for n in numbers])), strict=True
            ):
                matrices[n] = update.float().mul_(size)
        done = iter(matrices)
        for parameter, moved in waiting:
            update = torch.cat([next(done) for _ in self.rows.get(parameter, [len(moved)])])
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(shards.share(update, parameter), alpha=-group["lr"])


def orthogonal(x: Tensor) -> Tensor:
    """Return, for each matrix of [n, rows, columns], roughly the orthogonal matrix nearest to it."""
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        quintic = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, quintic, x, beta=a)
    return x.mT if tall else x
