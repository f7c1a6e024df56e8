"""The loop: from a run folder's recipe and its blocks to checkpoints.

Killed at any moment and started again, it goes on from the newest sound checkpoint, and on a CPU ends with
the same weights, bit for bit.  One process or several (torchrun) see the same blocks in each step.
"""

import contextlib
import math
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from corpora.errors import InputError
from corpora.files import data_root
from corpora.prepare import blocks_fingerprint, keep_model, open_blocks
from corpora.tokenizer import Tokenizer, for_recipe
from models import checkpoint, data, device, score
from models.checkpoint import OPTIMIZER, WEIGHTS, Scores, State
from models.decoder import IGNORED, Decoder, count_parameters
from models.metrics import Metrics
from models.optimize import Optimizers, learning_rate
from models.processes import Processes, Stop, join, only_trainer
from models.runs import read_settings
from models.settings import RunSettings


@dataclass
class Stopped:
    """Training was asked to end early, and has saved."""

    signal: int
    step: int
    checkpoint: Path


def train(run: Path, wanted: device.Device = "auto", *, events: bool = False) -> dict[str, Any] | Stopped:
    """Train a run to its recipe's last step, or from its newest checkpoint on; return the result's figures."""
    settings = read_settings(run)
    with join(wanted) as processes, contextlib.ExitStack() as held:
        newest = None
        if processes.rank == 0:
            held.enter_context(only_trainer(run))
            newest = checkpoint.newest_sound(run)
        step = processes.from_first(-1 if newest is None else checkpoint.read_state(newest).step)
        newest = None if step < 0 else checkpoint.folder_of(run, step)
        if newest is not None:
            state = checkpoint.read_state(newest)
            checkpoint.check_belongs(newest, state, settings)
            if state.step >= settings.train.steps:
                return result(newest, state, skipped=True)
        try:
            return Trainer(run, settings, processes, newest, events=events).run_to_end()
        except torch.OutOfMemoryError:
            size = settings.train.micro_batch or math.ceil(settings.train.batch / processes.size)
            raise InputError(
                f"the GPU's memory is too small for {size} blocks at a time; set train.micro_batch to "
                f"{max(1, size // 2)}: a step still takes {settings.train.batch} blocks"
            ) from None


def result(folder: Path, state: State, *, skipped: bool) -> dict[str, Any]:
    """Return what training tells at its end."""
    return {
        "step": state.step,
        "checkpoint": str(folder),
        "val_loss": state.scores.val_loss,
        "val_bpb": state.scores.val_bpb,
        "untrained_val_loss": state.untrained.val_loss,
        "untrained_val_bpb": state.untrained.val_bpb,
        "skipped": skipped,
        "parameters": state.parameters,
    }


class Trainer:
    """A run in memory: network, optimizers, blocks, and how far it is."""

    def __init__(
        self, run: Path, settings: RunSettings, processes: Processes, newest: Path | None, *, events: bool
    ) -> None:
        self.run, self.settings, self.processes = run, settings, processes
        train, corpus = settings.train, settings.corpus
        if train.batch % processes.size:
            raise InputError(
                f"train.batch {train.batch} cannot be shared equally by {processes.size} processes"
            )
        self.dtype = device.choose_dtype(train.dtype, processes.device)
        self.tokenizer: Tokenizer = for_recipe(settings, data_root())
        if processes.rank == 0:
            keep_model(self.tokenizer, run)
        self.blocks = open_blocks(settings, corpus.train, data_root())
        self.held_out = open_blocks(settings, corpus.val, data_root())
        for blocks in (self.blocks, self.held_out):
            data.check_fits(blocks, settings.model)
        self.fingerprint = blocks_fingerprint(settings, corpus.train, data_root())
        self.order = data.Order(len(self.blocks), train.batch, train.seed)
        self.bytes_V = score.bytes_of_ids(self.tokenizer, settings.model.vocab, processes.device)

        with torch.device("meta"):
            self.decoder = Decoder(settings.model)
        self.decoder.to_empty(device=processes.device)
        self.metrics = Metrics(run, write=processes.rank == 0, events=events)
        self.step = self.tokens = 0
        self.state: State | None = None
        if newest is None:
            torch.manual_seed(train.seed)
            self.decoder.init_weights(train.seed)
        fast = device.fast_bf16(processes.device)
        self.optimizers = Optimizers(self.decoder, train, torch.bfloat16 if fast else torch.float32)
        if newest is not None:
            self._resume(newest)
        self.model: nn.Module = self.decoder
        if processes.size > 1:
            self.model = DistributedDataParallel(self.decoder)

    def _resume(self, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        if state.data != self.fingerprint:
            raise InputError(
                f"{folder} was trained on other blocks (fingerprint {state.data[:8]}, the train shards now have "
                f"{self.fingerprint[:8]}); make a run folder of its own: python -m models new RECIPE"
            )
        cpu, here = torch.device("cpu"), self.processes.device
        self.decoder.load_state_dict(checkpoint.load(folder, WEIGHTS, here))
        tensors = checkpoint.load(folder, OPTIMIZER, cpu)
        torch.set_rng_state(tensors.pop("random:cpu"))
        random_cuda = tensors.pop("random:cuda", None)
        if random_cuda is not None and here.type == "cuda":
            torch.cuda.set_rng_state(random_cuda, here)
        self.optimizers.load(tensors)
        self.step, self.tokens, self.state = state.step, state.tokens, state
        if self.processes.rank == 0:
            checkpoint.remove_after(self.run, state.step)
            print(f"going on from {folder}", file=sys.stderr, flush=True)
            if state.made_on != device.describe(here):
                print(
                    f"it was made on {state.made_on}, this is {device.describe(here)}: "
                    "the last bits may differ from an undisturbed run",
                    file=sys.stderr,
                    flush=True,
                )

    def run_to_end(self) -> dict[str, Any] | Stopped:
        """Train, log, score and save as the recipe says, until the last step or a signal."""
        with Stop() as stop:
            self.metrics.cut_after(self.step if self.state is not None else -1)
            if self.state is None:
                untrained = self.score()
                self.state = self._first_state(untrained)
                nothing = {"loss": None, "lr": None, "grad_norm": None, "tokens_per_s": None}
                self._tell(**nothing, **untrained.model_dump())
            return self._loop(stop, self.state)

    def _loop(self, stop: Stop, state: State) -> dict[str, Any] | Stopped:
        train = self.settings.train
        busy, counted = 0.0, self.tokens
        while True:
            started = time.perf_counter()
            step = self.step + 1
            last = step == train.steps
            evaluated = last or step % train.eval_every == 0
            logged = evaluated or step == 1 or step % train.log_every == 0
            figures, stopped = self.update(exact=logged, stop=stop.signal)
            busy += time.perf_counter() - started
            scores = {}
            if evaluated:
                scored = self.score()
                state = state.model_copy(update={"scores": scored, "scored_step": step})
                scores = scored.model_dump()
            if logged:
                speed = round((self.tokens - counted) / busy, 1)
                self._tell(**figures, tokens_per_s=speed, **scores)
                busy, counted = 0.0, self.tokens
            if last or stopped or step % train.save_every == 0:
                state = state.model_copy(update={"step": step, "tokens": self.tokens})
                folder = self.save(state)
            if last:
                return result(folder, state, skipped=False)
            if stopped:
                return Stopped(stopped, step, folder)

    def update(self, *, exact: bool, stop: int) -> tuple[dict[str, float], int]:
        """Make one update; return its figures, and the signal that any process has had."""
        train, (rank, size) = self.settings.train, (self.processes.rank, self.processes.size)
        indices = self.order.step(self.step)
        parts = list(data.micro_batches(indices, rank, size, train.micro_batch))
        nats, targets = 0.0, 0
        for n, part in enumerate(parts):
            ids, wanted = data.batch(self.blocks, part, self.settings.model.vocab, self.processes.device)
            alone = n + 1 < len(parts) and isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
                loss: Tensor = self.model(ids, wanted, self.dtype, exact and self.dtype != torch.float32)
                loss.backward()  # type: ignore[no-untyped-call]
            nats += float(loss.detach())
            targets += int(wanted.ne(IGNORED).sum())
        total_nats, total_targets, signals = self.processes.sum([nats, float(targets), float(stop)])
        total_targets = max(1.0, total_targets)  # a step of padding only
        # Gradients are of the sum of nats (and with several processes of its mean over them).
        norm = self.optimizers.scale_and_clip(total_targets / size)
        if not (math.isfinite(total_nats) and math.isfinite(norm)):
            raise InputError(
                f"step {self.step + 1}: the loss is {total_nats / total_targets}, the gradient norm {norm}; the update "
                f"was not made and nothing was saved (blocks {indices[:8].tolist()}...); lower train.lr "
                f"from {train.lr}, or raise train.warmup from {train.warmup}"
            )
        lr = learning_rate(train, self.step)
        self.optimizers.step(lr)
        self.step += 1
        self.tokens += round(total_targets)
        stopped = stop or (signal.SIGTERM if signals else 0)
        return {"loss": total_nats / total_targets, "lr": lr, "grad_norm": norm}, stopped

    def score(self) -> Scores:
        """Score held-out blocks, always the same: evenly spread, since neighbours are of one document."""
        train, (rank, size) = self.settings.train, (self.processes.rank, self.processes.size)
        count = min(train.eval_blocks, len(self.held_out))
        own = (np.arange(count) * len(self.held_out) // count)[rank::size]
        at_once = train.micro_batch or math.ceil(train.batch / size)
        sums = score.blocks(self.decoder, self.held_out, own, at_once, self.bytes_V, self.dtype)
        total = score.Sums(*self.processes.sum(list(sums)))
        if not math.isfinite(total.loss):
            raise InputError(
                f"step {self.step}: the held-out loss is {total.loss}; nothing was saved; lower train.lr"
            )
        return Scores(val_loss=total.loss, val_bpb=total.bits_per_byte)

    def save(self, state: State) -> Path:
        """Write a checkpoint from the first process; return its folder."""
        here = self.processes.device
        if self.processes.rank == 0:
            random = {"random:cpu": torch.get_rng_state()}
            if here.type == "cuda":
                random["random:cuda"] = torch.cuda.get_rng_state(here)
            weights, moments = self.decoder.state_dict(), self.optimizers.state() | random
            state = state.model_copy(update={"made_on": device.describe(here)})
            checkpoint.save(self.run, state, weights, moments, self.settings.train.keep)
        return checkpoint.folder_of(self.run, state.step)

    def _first_state(self, untrained: Scores) -> State:
        return State(
            step=0,
            tokens=0,
            settings=checkpoint.decisive(self.settings),
            data=self.fingerprint,
            tokenizer=self.tokenizer.fingerprint,
            parameters=count_parameters(self.settings.model),
            made_on="",
            untrained=untrained,
            scores=untrained,
            scored_step=0,
        )

    def _tell(self, **figures: Any) -> None:
        at = {"step": self.step, "steps": self.settings.train.steps, "tokens": self.tokens}
        self.metrics.add({**at, **figures})
