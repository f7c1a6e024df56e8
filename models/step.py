"""One update: forward and backward over a step's micro-batches, one judgement, one step of the optimizers.

It needs torch and numpy and nothing that reads a corpus, so it runs from a bare checkout as well.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models import device, shards
from models.data import Batch
from models.decoder import Decoder
from models.loss import IGNORED
from models.optimize import Optimizers, Tensors
from models.processes import Processes
from models.settings import Model, Parallel, Train
from models.spikes import Watch


class Update(NamedTuple):
    """What a step came to, over all processes.

    loss: nats per target
    grad_norm: before clipping, of the gradient of that loss
    targets: ids that were predicted
    bad: why the weights were not updated, or None
    stop: some process was asked to end
    """

    loss: float
    grad_norm: float
    targets: int
    bad: str | None
    stop: bool


class Stepper:
    """A network on its device, shared out over the processes, and what updates it.

    Call `init` or `load` once before `update`.
    """

    def __init__(
        self,
        model: Model,
        train: Train,
        processes: Processes,
        *,
        dtype: torch.dtype,
        compile: bool = False,
        parallel: Parallel = "none",
    ) -> None:
        self.train, self.processes, self.dtype, self.parallel = train, processes, dtype, parallel
        with torch.device("meta"):
            self.decoder = Decoder(model)
        self.decoder.document_mask = train.document_mask
        self.decoder.reset_positions = train.reset_positions
        self.decoder.activation_checkpointing = train.activation_checkpointing
        if compile:
            for block in self.decoder.blocks:  # each by itself: they are alike, so one compilation serves all
                block.compile()
        if parallel == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(processes.device.type, (processes.size,))
            for block in self.decoder.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.decoder, mesh=mesh)
        self.decoder.to_empty(device=processes.device)
        muon_dtype = torch.bfloat16 if device.fast_bf16(processes.device) else torch.float32
        self.optimizers = Optimizers(self.decoder, train, muon_dtype)
        self.watch = Watch(train.spikes)
        self.model: nn.Module = self.decoder

    def init(self, seed: int) -> None:
        """Draw the weights."""
        self.decoder.init_weights(seed)
        self._share_out()

    @torch.no_grad()
    def load(self, weights: Tensors, moments: Tensors) -> None:
        """Take over weights and moments of a checkpoint; its shapes must be the network's."""
        for name, parameter in self.decoder.named_parameters():
            parameter.copy_(shards.share(weights.get_tensor(name), parameter))
        self.optimizers.load(moments)
        self._share_out()

    def _share_out(self) -> None:
        if self.parallel == "ddp" and not isinstance(self.model, DistributedDataParallel):
            self.model = DistributedDataParallel(self.decoder)

    def update(self, batches: Sequence[Batch], lr: float, *, stop: bool = False) -> Update:
        """Make one update from this process's micro-batches, unless it would be a bad one."""
        size = self.processes.size
        sums = torch.zeros(3, dtype=torch.float64, device=self.processes.device)
        sums[2] = float(stop)
        for n, batch in enumerate(batches):
            with self._exchange(last=n + 1 == len(batches)):
                nats: Tensor = self.model(*batch, dtype=self.dtype)
                nats.backward()  # type: ignore[no-untyped-call]
            sums[0] += nats.detach()
            sums[1] += batch.targets_BT.ne(IGNORED).sum()
        total, targets, stops = self.processes.sum(sums)
        # The gradients are of the sum of nats; with several processes, of its mean over them.
        count = max(1.0, targets) / size  # 1: a step of padding only
        loss, norm = total / max(1.0, targets), self.optimizers.norm() / count
        bad = self.watch.judge(loss, norm)
        if bad is None:
            self.optimizers.scale(min(1.0, self.train.clip / (norm + 1e-6)) / count)
            self.optimizers.step(lr)
        else:
            self.optimizers.forget()
        return Update(loss, norm, round(targets), bad, bool(stops))

    def _exchange(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Exchange gradients after the last micro-batch only."""
        if self.parallel == "fsdp":
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return contextlib.nullcontext()
