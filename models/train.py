"""The loop: from a run folder's recipe and its blocks to checkpoints.

Killed at any moment and started again, it goes on from the newest sound checkpoint, and on a CPU ends with
the same weights, bit for bit.  One process or several (torchrun) see the same blocks in each step.

A bad step (models.spikes) updates nothing, and the next blocks are taken in place of its own.  After too many of
them in a row the run goes back to its newest checkpoint, and on from there with the blocks that come next.  Both
are in the checkpoints and in metrics.jsonl: which blocks no step was made of, and why.
"""

import contextlib
import math
import random
import signal
import sys
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from corpora.errors import InputError
from corpora.files import data_root
from corpora.order import ORDER_VERSION
from corpora.prepare import blocks_fingerprint, keep_model, open_blocks
from corpora.tokenizer import Tokenizer, for_recipe
from models import checkpoint, data, device, hardware, score, shards
from models.checkpoint import OPTIMIZER, WEIGHTS, Best, RollBack, Saver, Scores, Skip, State
from models.decoder import count_parameters
from models.estimate import flops_per_token, preflight
from models.loggers import check_installed
from models.metrics import Metrics
from models.optimize import learning_rate
from models.processes import Processes, Stop, join, only_trainer
from models.runs import read_settings
from models.settings import Parallel, RunSettings
from models.spikes import Watch
from models.step import Stepper, Update

PARALLEL: tuple[Parallel, ...] = get_args(Parallel)


@dataclass
class Stopped:
    """Training was asked to end early, and has saved."""

    signal: int
    step: int
    checkpoint: Path


def train(
    run: Path,
    wanted: device.Device = "auto",
    *,
    events: bool = False,
    allow_changes: bool = False,
    allow_cpu: bool = False,
) -> dict[str, Any] | Stopped:
    """Train a run to its recipe's last step, or from its newest checkpoint on; return the result's figures.

    allow_changes: go on with a checkpoint of another recipe or of other blocks, with a warning
    allow_cpu: even if it would take months
    """
    settings = read_settings(run)
    if settings.train.deterministic:
        device.make_deterministic()
    with join(wanted) as processes, contextlib.ExitStack() as held:

        def newest_step() -> int:
            for tool in settings.train.log_to:
                check_installed(tool)
            held.enter_context(only_trainer(run))
            newest = checkpoint.newest_sound(run)
            return -1 if newest is None else checkpoint.read_state(newest).step

        def plan() -> int:
            made = preflight(settings, processes.device, processes=processes.size, allow_cpu=allow_cpu)
            return PARALLEL.index(made.parallel)

        step = processes.first_decides(newest_step)
        newest = None if step < 0 else checkpoint.folder_of(run, step)
        if newest is not None:
            state = checkpoint.read_state(newest)
            checkpoint.check_belongs(newest, state, settings, allow_changes)
            ended = state.ended is not None and not allow_changes  # with more patience it may go on
            if ended or state.step >= settings.train.last_step:
                return result(newest, state, skipped=True)
        parallel = PARALLEL[processes.first_decides(plan)]
        try:
            with Trainer(
                run,
                settings,
                processes,
                newest,
                parallel=parallel,
                events=events,
                allow_changes=allow_changes,
            ) as trainer:
                return trainer.run_to_end()
        except torch.OutOfMemoryError:
            raise InputError(_too_small(settings, processes.size)) from None


def _too_small(settings: RunSettings, processes: int) -> str:
    """Say what to set when the GPU's memory was too small after all."""
    train = settings.train
    size = train.micro_batch or math.ceil(train.batch / processes)
    cures = [f"train.micro_batch to {size // 2}"] if size > 1 else []
    cures += [] if train.activation_checkpointing else ["train.activation_checkpointing to true"]
    cure = f"set {' or '.join(cures)}, and go on with --allow-changes" if cures else "use a larger one"
    return f"the GPU's memory is too small for {size} blocks at a time; {cure}"


def result(folder: Path, state: State, *, skipped: bool) -> dict[str, Any]:
    """Return what training tells at its end."""
    return {
        "step": state.step,
        "checkpoint": str(folder),
        "val_loss": state.scores.val_loss,
        "val_bpb": state.scores.val_bpb,
        "untrained_val_loss": state.untrained.val_loss,
        "untrained_val_bpb": state.untrained.val_bpb,
        "best_step": state.best.step if state.best else None,
        "ended_early": state.ended == "early",
        "skipped_steps": len(state.skipped),
        "roll_backs": len(state.roll_backs),
        "skipped": skipped,
        "parameters": state.parameters,
    }


class Trainer:
    """A run in memory: the stepper, the blocks, and how far it is."""

    def __init__(
        self,
        run: Path,
        settings: RunSettings,
        processes: Processes,
        newest: Path | None,
        *,
        parallel: Parallel = "none",
        events: bool = False,
        allow_changes: bool = False,
    ) -> None:
        self.run, self.settings, self.processes = run, settings, processes
        self.allow_changes = allow_changes
        train, corpus = settings.train, settings.corpus
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
        self.dtype = device.choose_dtype(train.dtype, processes.device)
        self.documents = train.document_mask or train.reset_positions

        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(train.seed)
        on_cuda = processes.device.type == "cuda"
        self.stepper = Stepper(
            settings.model,
            train,
            processes,
            dtype=self.dtype,
            compile=on_cuda if train.compile == "auto" else train.compile,
            parallel=parallel,
        )
        self.peak = None
        if on_cuda:
            self.peak = hardware.peak_flops(torch.cuda.get_device_name(processes.device), self.dtype)
        first = processes.rank == 0
        self.saver = Saver(run, train.keep) if first else None
        self.metrics = Metrics(
            run,
            write=first,
            events=events,
            steps=train.last_step,
            log_to=train.log_to,
            settings=settings.model_dump(mode="json"),
        )
        self.state: State | None = None
        if newest is None:
            self.stepper.init(train.seed)
        else:
            self._go_on(newest)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if self.saver is not None:
                self.saver.__exit__(kind, error, trace)
        finally:
            self.metrics.close()

    def _go_on(self, folder: Path) -> None:
        """Take everything from a checkpoint."""
        state = checkpoint.read_state(folder)
        self._check_blocks(folder, state)
        self._load(folder, state)
        self.state = state.model_copy(
            update={
                "settings": checkpoint.decisive(self.settings),
                "data": self.fingerprint,
                "ended": None,
                "worse": 0 if state.ended else state.worse,
            }
        )
        if self.processes.rank == 0:
            checkpoint.remove_after(self.run, state.step)
            print(f"going on from {folder}", file=sys.stderr, flush=True)
            here = self._made_on()
            if state.made_on != here:
                print(
                    f"it was made on {state.made_on}, this is {here}: "
                    "the last bits may differ from an undisturbed run",
                    file=sys.stderr,
                    flush=True,
                )

    def _check_blocks(self, folder: Path, state: State) -> None:
        told = None
        if state.data != self.fingerprint:
            told = (
                f"was trained on other blocks (fingerprint {state.data[:8]}, the train shards now have "
                f"{self.fingerprint[:8]})"
            )
        elif state.order != ORDER_VERSION:
            told = f"took its blocks in another order ({state.order}, now {ORDER_VERSION})"
        if told is not None and not self.allow_changes:
            raise InputError(
                f"{folder} {told}; make a run folder of its own: python -m models new RECIPE; "
                "or go on all the same: --allow-changes"
            )
        if told is not None and self.processes.rank == 0:
            print(f"{folder} {told}; going on, as allowed", file=sys.stderr, flush=True)

    def _load(self, folder: Path, state: State) -> None:
        checkpoint.check_shapes(folder, self.stepper.decoder)
        with (
            checkpoint.open_tensors(folder, WEIGHTS) as weights,
            checkpoint.open_tensors(folder, OPTIMIZER) as moments,
        ):
            self.stepper.load(weights, moments)
            names = [name for name in moments.keys() if name.startswith("random:")]
            checkpoint.restore_random(
                {name: moments.get_tensor(name) for name in names}, self.processes.device
            )
        self.stepper.watch = Watch(self.settings.train.spikes, state.norms)

    def run_to_end(self) -> dict[str, Any] | Stopped:
        """Train, log, score and save as the recipe says, until the last step or a signal."""
        with Stop() as stop:
            if self.state is None:
                self.metrics.cut_after(-1)
                self.state = self._first_state(self.score(0))
                nothing = dict.fromkeys(
                    ("loss", "lr", "grad_norm", "tokens_per_s", "mfu", "memory_bytes"), None
                )
                self._tell(**nothing, **self.state.untrained.model_dump())
            else:
                before = self.state.step + self.state.offset
                self.metrics.cut_after(self.state.step, len(self.state.roll_backs), before)
            return self._loop(stop, self.state)

    def _loop(self, stop: Stop, state: State) -> dict[str, Any] | Stopped:
        train = self.settings.train
        busy, counted = 0.0, state.tokens
        while True:
            started = time.perf_counter()
            update = self.update(state, stop)
            busy += time.perf_counter() - started
            lr = learning_rate(train, state.step)
            if update.bad is None:
                state = self._counted(state, update)
                self.metrics.at(state.step, update.loss)
            else:
                state = self._bad_step(state, update)
                busy, counted = 0.0, state.tokens
            good, step = update.bad is None, state.step
            last = step == train.last_step
            evaluated = good and (last or step % train.eval_every == 0)
            scores: dict[str, float] = {}
            if evaluated:
                state = self._scored(state, self.score(step))
                scores = state.scores.model_dump()
            self.state = state
            if good and (evaluated or step == 1 or step % train.log_every == 0):
                speed = (state.tokens - counted) / busy
                figures = {"loss": update.loss, "lr": lr, "grad_norm": update.grad_norm}
                self._tell(**figures, **self._speed(speed), **scores)
                busy, counted = 0.0, state.tokens
            # Of several processes none leaves alone: only what all have heard of in the update counts.
            asked = update.stop or (self.processes.size == 1 and bool(stop.signal))
            stopped = (stop.signal or signal.SIGTERM) if asked else 0
            best = evaluated and train.patience is not None and state.worse == 0
            done = last or state.ended is not None
            if done or stopped or best or (good and step % train.save_every == 0):
                folder = self.save(state)
            if done or stopped:
                if self.saver is not None:
                    self.saver.wait()
                return result(folder, state, skipped=False) if done else Stopped(stopped, step, folder)

    def update(self, state: State, stop: Stop) -> Update:
        """Make the update that follows a state, from the next blocks."""
        train, (rank, size) = self.settings.train, (self.processes.rank, self.processes.size)
        indices = self.order.step(state.step + state.offset)
        vocab, here = self.settings.model.vocab, self.processes.device
        batches = [
            data.batch(self.blocks, part, vocab, here, documents=self.documents)
            for part in data.micro_batches(indices, rank, size, train.micro_batch)
        ]
        return self.stepper.update(batches, learning_rate(train, state.step), stop=bool(stop.signal))

    def _counted(self, state: State, update: Update) -> State:
        """Return the state after a good update."""
        return state.model_copy(
            update={
                "step": state.step + 1,
                "tokens": state.tokens + update.targets,
                "norms": tuple(self.stepper.watch.norms),
                "bad": 0,
            }
        )

    def _bad_step(self, state: State, update: Update) -> State:
        """Pass over the blocks of a bad step; go back to the newest checkpoint when it is one too many."""
        spikes, data_step = self.settings.train.spikes, state.step + state.offset
        assert update.bad is not None
        if state.bad < spikes.skip:
            self._note(step=state.step + 1, skipped=update.bad, data_step=data_step)
            skip = Skip(data_step=data_step, reason=update.bad)
            return state.model_copy(
                update={"offset": state.offset + 1, "bad": state.bad + 1, "skipped": (*state.skipped, skip)}
            )
        return self._roll_back(state, data_step, update.bad)

    def _roll_back(self, state: State, data_step: int, reason: str) -> State:
        if self.saver is not None:
            self.saver.wait()

        def newest_step() -> int:
            newest = checkpoint.newest_sound(self.run)
            return -1 if newest is None else checkpoint.read_state(newest).step

        back_to = self.processes.first_decides(newest_step)
        train = self.settings.train
        tried = len(state.roll_backs)
        if back_to < 0 or tried >= train.spikes.roll_back:
            blocks = self.order.step(data_step)[:8].tolist()
            after = f" after {tried} roll-backs" if tried else ""
            raise InputError(
                f"step {state.step + 1}: {reason}{after}; the update was not made, and nothing was saved since "
                f"{'the beginning' if back_to < 0 else f'step {back_to}'} (blocks {blocks}...); lower train.lr "
                f"from {train.lr}, or raise train.warmup from {train.warmup}"
            )
        folder = checkpoint.folder_of(self.run, back_to)
        old = checkpoint.read_state(folder)
        self._load(folder, old)
        roll_back = RollBack(back_to=back_to, first=back_to + old.offset, last=data_step, reason=reason)
        if self.processes.rank == 0:
            checkpoint.remove_after(self.run, back_to)  # damaged ones, or it would not have been stepped over
        self.metrics.cut_after(back_to, tried, roll_back.first)
        self._note(
            step=back_to,
            rolled_back_from=state.step + 1,
            reason=reason,
            first_data_step=roll_back.first,
            last_data_step=data_step,
        )
        return old.model_copy(
            update={
                "settings": state.settings,
                "data": state.data,
                "offset": data_step + 1 - back_to,
                "bad": 0,
                "roll_backs": (*state.roll_backs, roll_back),
            }
        )

    def _scored(self, state: State, scores: Scores) -> State:
        """Return the state with a held-out loss: the best so far, or one more that is not."""
        best = state.best is None or scores.val_bpb < state.best.val_bpb
        worse = 0 if best else state.worse + 1
        patience = self.settings.train.patience
        return state.model_copy(
            update={
                "scores": scores,
                "scored_step": state.step,
                "best": Best(step=state.step, val_bpb=scores.val_bpb) if best else state.best,
                "worse": worse,
                "ended": "early" if patience is not None and worse >= patience else None,
            }
        )

    def score(self, step: int) -> Scores:
        """Score held-out blocks, always the same: evenly spread, since neighbours are of one document."""
        train, (rank, size) = self.settings.train, (self.processes.rank, self.processes.size)
        count = min(train.eval_blocks, len(self.held_out))
        own = (np.arange(count) * len(self.held_out) // count)[rank::size]
        at_once = train.micro_batch or math.ceil(train.batch / size)
        sums = score.blocks(
            self.stepper.decoder,
            self.held_out,
            own,
            at_once,
            self.bytes_V,
            self.dtype,
            self.documents,
            math.ceil(math.ceil(count / size) / at_once),
        )
        total = score.Sums(*self.processes.sum(list(sums)))
        if not math.isfinite(total.loss):
            raise InputError(
                f"step {step}: the held-out loss is {total.loss}; nothing was saved since; lower train.lr"
            )
        return Scores(val_loss=total.loss, val_bpb=total.bits_per_byte)

    def save(self, state: State) -> Path:
        """Let the first process write a checkpoint of what all have; return its folder."""
        # One at a time: they are whole tensors, of which a process of several holds only its share.
        weights = ((name, shards.whole(p.detach())) for name, p in self.stepper.decoder.named_parameters())
        moments = self.stepper.optimizers.state()
        # What went wrong in the save before ends all, here, and not one of them between two exchanges.
        self.processes.first_decides(self._written)
        if self.saver is None:
            for _ in chain(weights, moments):  # the first process asks for them, too
                pass
            return checkpoint.folder_of(self.run, state.step)
        here = self.processes.device
        state = state.model_copy(update={"made_on": self._made_on()})
        return self.saver.save(state, weights, chain(moments, checkpoint.random_state(here).items()))

    def _written(self) -> int:
        if self.saver is not None:
            self.saver.wait()
        return 0

    def _made_on(self) -> str:
        several = f"{self.processes.size} processes on " if self.processes.size > 1 else ""
        return several + device.describe(self.processes.device)

    def _first_state(self, untrained: Scores) -> State:
        return State(
            step=0,
            tokens=0,
            settings=checkpoint.decisive(self.settings),
            data=self.fingerprint,
            order=ORDER_VERSION,
            tokenizer=self.tokenizer.fingerprint,
            parameters=count_parameters(self.settings.model),
            made_on="",
            untrained=untrained,
            scores=untrained,
            scored_step=0,
        )

    def _speed(self, tokens_per_s: float) -> dict[str, float | int | None]:
        """Return tokens per second of the updates alone, the share of the GPUs' peak, and memory at its highest."""
        mfu = None
        if self.peak is not None:
            mfu = tokens_per_s * flops_per_token(self.settings) / (self.peak * self.processes.size)
        if self.processes.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.processes.device)
        else:
            memory = hardware.peak_memory()
        return {
            "tokens_per_s": round(tokens_per_s, 1),
            "mfu": None if mfu is None else round(mfu, 4),
            "memory_bytes": memory,
        }

    def _tell(self, **figures: Any) -> None:
        assert self.state is not None
        at = {"step": self.state.step, "steps": self.settings.train.last_step, "tokens": self.state.tokens}
        self.metrics.add({**at, **figures})

    def _note(self, **note: Any) -> None:
        self.metrics.add({**note, "steps": self.settings.train.last_step})
