"""What a recipe's training takes on a machine, before anything starts: memory and time, and what to set if it is too much.

The memory is reckoned from what the code keeps (see `models.decoder`, `models.loss`, `models.optimize`).  A test holds
the sums for a block against what autograd saves.  Sizes are in bytes.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from corpora.errors import InputError
from models import loss
from models.hardware import Machine, peak_flops, this_machine
from models.settings import Model, Parallel, RunSettings, Train

DAY = 86_400.0
LONGEST = 30 * DAY  # that training without a GPU may take, unless it is allowed to take longer
# Operations per second that the slowest CPU makes: what takes less than a month even so need not be measured.
SLOWEST = 1e9
# Of its peak that a GPU reaches in a good training loop on models of 1B and more; small ones less.
SHARE = 0.4
# Of the speed of its matrix products that a CPU reaches, in models of 7M and 13M parameters and in one of 250M: in
# narrow ones all that is no product takes most of the time.
WIDE = 512
CPU_SHARE = {torch.float32: (0.55, 0.9), torch.bfloat16: (0.17, 0.35)}
USUAL = {
    "H100": "NVIDIA H100 80GB HBM3",
    "A100": "NVIDIA A100-SXM4-80GB",
    "RTX 4090": "NVIDIA GeForce RTX 4090",
}

# Python, torch and what reads the corpus; or a GPU's context, kernels and workspaces.
FRAMEWORK = {"cpu": 450 << 20, "cuda": 1 << 30}
HOST = 4 << 30  # main memory of a process that uses a GPU, beside the copy of a checkpoint


def tokens(settings: RunSettings) -> int:
    """Return how many tokens the recipe trains on."""
    return settings.train.last_step * settings.train.batch * (settings.blocks.length - 1)


def flops_per_token(settings: RunSettings) -> int:
    """Return the floating-point operations of a training step for each token: 6 N + 12 layers x width x length.

    N counts what is multiplied with, so an input table of its own does not count (PaLM, appendix B).
    """
    model = settings.model
    tables = 0 if model.tie else model.vocab * model.width
    if model.positions == "learned":
        tables += model.context * model.width
    return 6 * (sizes(model).all - tables) + 12 * model.layers * model.width * settings.blocks.length


class Memory(NamedTuple):
    """Bytes of the device that a process needs.

    kept: activations, from the forward pass to the backward pass
    passing: the most that a step needs beside them: the loss head, a block that is computed again, or the update
    copy: of a checkpoint, which is written from it while training goes on; beside a GPU it is not on the device
    """

    parameters: int
    gradients: int
    optimizer: int
    kept: int
    passing: int
    copy: int
    framework: int

    @property
    def state(self) -> int:
        """Parameters, their gradients and what the optimizer keeps of them."""
        return self.parameters + self.gradients + self.optimizer


class Sizes(NamedTuple):
    """Numbers in a model: all parameters, the matrices of all blocks, the largest of those."""

    all: int
    matrices: int
    largest: int


def sizes(model: Model) -> Sizes:
    """Count a model's parameters, as `decoder.count_parameters` does by building it, which takes seconds."""
    D, F, V = model.width, model.ffn, model.vocab
    E = D // model.heads
    qkv = D * (D + 2 * E * (model.kv_heads or model.heads))
    up = D * F * (2 if model.mlp == "swiglu" else 1)
    matrices = qkv + D * D + up + D * F
    norm = D * (2 if model.norm == "layernorm" and model.bias else 1)
    vectors = 2 * norm + (2 * E if model.qk_norm else 0) + (D + up // D + D if model.bias else 0)
    tables = V * D * (1 if model.tie else 2) + (model.context * D if model.positions == "learned" else 0)
    outside = tables + norm + (V if model.head_bias else 0)
    return Sizes(model.layers * (matrices + vectors) + outside, model.layers * matrices, max(qkv, up))


def memory(
    settings: RunSettings, machine: Machine, processes: int = 1, parallel: Parallel = "none"
) -> Memory:
    """Return what each process needs; the checkpoint's copy is in the first one only."""
    model, train = settings.model, settings.train
    dtype, on_cuda = dtype_on(train, machine), machine.kind == "cuda"
    size = dtype.itemsize
    counted, optimizer = sizes(model), moments(model, train)
    rows, length = rows_at_once(train, processes), settings.blocks.length - 1
    N, table = rows * length, model.vocab * model.width
    several = rows < math.ceil(train.batch / processes)  # micro-batches, whose gradients are added up

    cast = size * counted.matrices if dtype == torch.bfloat16 else 0  # autocast's copies of float32 weights
    block = N * block_bytes(model, length, dtype, on_cuda=on_cuda, masked=train.document_mask)
    going_back = N * (8 * model.width + 4 * size * model.ffn)  # gradients inside a block
    if train.activation_checkpointing:
        kept = N * 4 * model.width * model.layers
        # Autocast holds the copies of all blocks to the end of the forward pass; a compiled block makes its own.
        compiled = train.compile is True or (train.compile == "auto" and on_cuda)
        passing = max(0 if compiled else cast, block + cast // model.layers + going_back)
    else:
        kept, passing = block * model.layers + cast, going_back
    head = head_bytes(model, N, dtype, on_cuda=on_cuda) + (4 * table if several else 0)
    looked_up = 4 * table * (2 if model.tie or several else 1)  # the gradient of the input's table, dense
    passing = max(passing, head, max(looked_up, update_bytes(model, train, machine)) - kept)
    parameters, gradients = 4 * counted.all, 4 * counted.all
    # What is freed does not always fit what comes next.  CUDA's allocator loses little by that; the heap of a CPU,
    # which `device.choose` lets keep all it ever had, lost at most so much in models of 0.2M to 250M parameters.
    if on_cuda:
        passing += (kept + passing) // 10
    else:
        apart = several or train.activation_checkpointing
        passing += round(0.3 * kept + 1.5 * passing) + (gradients if apart else 0)
    copy = parameters + optimizer
    if parallel == "ddp":
        gradients *= 2  # its buckets
    if parallel == "fsdp":
        outside = 4 * (counted.all - counted.matrices)
        gathered = outside + 8 * counted.matrices // model.layers  # one block, and the next that is fetched
        parameters = parameters // processes + gathered
        # Gradients are whole until the last micro-batch, when each process gets its share of their sum.
        gradients = gradients if several else gradients // processes + gathered
        optimizer //= processes
    return Memory(
        parameters,
        gradients,
        optimizer,
        kept,
        passing,
        copy,
        FRAMEWORK[machine.kind],
    )


def needed(memory: Memory, machine: Machine) -> int:
    """Return the bytes of the device that a process needs in all."""
    beside = memory.copy if machine.kind == "cpu" else 0
    return memory.state + memory.kept + memory.passing + memory.framework + beside


def fits(memory: Memory, machine: Machine) -> bool:
    """Tell whether the device has so much, and the main memory beside a GPU room for a checkpoint's copy."""
    room = machine.host is None or machine.kind == "cpu" or memory.copy + HOST <= machine.host
    return room and needed(memory, machine) <= machine.memory


def dtype_on(train: Train, machine: Machine) -> torch.dtype:
    """Return the number format of matrix products, as `device.choose_dtype` does."""
    return (
        torch.bfloat16 if train.dtype == "bf16" or (train.dtype == "auto" and machine.bf16) else torch.float32
    )


def rows_at_once(train: Train, processes: int) -> int:
    """Return how many blocks one forward pass of one process takes."""
    own = math.ceil(train.batch / processes)
    return min(train.micro_batch or own, own)


def moments(model: Model, train: Train) -> int:
    """Return what the optimizer keeps: 8 bytes for each number, with Muon 4 in matrices of blocks, or 8 bits and scales."""
    counted = sizes(model)
    if train.optimizer == "adamw8bit":
        return math.ceil(counted.all * (2 + 2 * 4 / 256))
    return 8 * counted.all - (4 * counted.matrices if train.optimizer == "muon" else 0)


def update_bytes(model: Model, train: Train, machine: Machine) -> int:
    """Return what an update needs beside gradients and moments: only Muon works on copies."""
    counted = sizes(model)
    if train.optimizer != "muon":
        return 0
    from models import muon  # brings torch's distributed tensors, which take a second to import

    at_once = min(counted.matrices, muon.AT_ONCE + counted.largest)
    return at_once * (5 * (2 if machine.bf16 else 4) + 4)


def block_bytes(model: Model, length: int, dtype: torch.dtype, *, on_cuda: bool, masked: bool) -> int:
    """Return what autograd keeps of one block for each token, beside autocast's copies of its weights."""
    size, D, H = dtype.itemsize, model.width, model.heads
    q, kv = D, D // H * (model.kv_heads or H)  # numbers of a query, and of a key or a value
    own = size if on_cuda else 4  # attention is in float32 on a CPU
    if model.norm == "layernorm":
        norm = 4 * D + 8
    else:  # several operations on a CPU, which keep the normed input too
        norm = 4 * D + 4 + (0 if on_cuda else 4 * D)
    norms = 2 * (norm + size * D)

    turned = model.positions == "rope" or model.qk_norm  # query and key are new tensors
    as_made = size * (q + 2 * kv)  # the one tensor that all three are cut from
    if turned:
        heads = own * (q + kv) + (as_made if own == size else own * kv)
    else:
        heads = as_made if own == size else own * (q + 2 * kv)
    if model.qk_norm:
        heads += (4 * (q + kv) if size != 4 else 0) + (0 if on_cuda else 4 * (q + kv)) + 4 * (H + kv * H // q)
    out = own * q + 4 * H + (size * q if turned or own != size else 0)
    if masked and not on_cuda:
        out += 4 * length  # the mask as numbers
    if on_cuda and size == 4 and q != kv:
        out += 4 * (H * length + 2 * q)  # no fused kernel groups heads in float32: all scores are kept

    hidden = {"swiglu": 4, "gelu": 2, "relu": 1}[model.mlp] * size * model.ffn
    return norms + heads + out + hidden


def head_bytes(model: Model, N: int, dtype: torch.dtype, *, on_cuda: bool) -> int:
    """Return what the last norm, the head and the loss need at their peak, beside the weight's gradient."""
    size, D = dtype.itemsize, model.width
    cast = dtype == torch.bfloat16
    logits = min(N, loss.CUDA_CHUNK if on_cuda else loss.CHUNK) * model.vocab * size
    weight = 8 * model.vocab * D if cast else 0  # the head's copy, and a chunk's gradient before it is added
    hidden = 12 * D + 4 + (4 * D if model.norm == "rmsnorm" and not on_cuda else 0)
    return logits + weight + N * (hidden + size * D * (2 if cast else 1))


class Plan(NamedTuple):
    """How a recipe would be trained on a machine."""

    settings: RunSettings
    machine: Machine
    processes: int
    parallel: Parallel
    memory: Memory

    @property
    def text(self) -> str:
        """The memory and the time, as a table."""
        settings, machine, memory = self.settings, self.machine, self.memory
        train, own = settings.train, "of each process" if self.processes > 1 else ""
        operations = tokens(settings) * flops_per_token(settings)
        rows = rows_at_once(train, self.processes)
        how = [
            f"{rows} block{'s' if rows > 1 else ''} of {settings.blocks.length - 1:,} tokens at a time",
            "bf16" if dtype_on(train, machine) == torch.bfloat16 else "fp32",
            train.optimizer,
            *(["activation checkpointing"] if train.activation_checkpointing else []),
            *([f"{self.parallel} over {self.processes} processes"] if self.processes > 1 else []),
        ]
        lines = [
            f"model       {sizes(settings.model).all:,} parameters, trained on {tokens(settings):,} tokens "
            f"({operations:.2e} operations)",
            f"memory      {own or 'needed'} on {machine.name}, in GiB: {', '.join(how)}",
        ]
        parts = {
            "parameters": memory.parameters,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "activations": memory.kept,
            "loss head and what else passes": memory.passing,
            "framework": memory.framework,
        }
        if machine.kind == "cpu":
            parts["copy of a checkpoint"] = memory.copy
        lines += [f"  {name:<32} {_gib(part):>7}" for name, part in parts.items()]
        lines.append(f"  {'in all':<32} {_gib(needed(memory, machine)):>7} of {_gib(machine.memory)}")
        if machine.host is not None and machine.kind != "cpu":
            host = _gib(memory.copy + HOST)
            lines.append(f"  {'main memory, for checkpoints':<32} {host:>7} of {_gib(machine.host)}")
        lines.append(f"time        {_time(settings, machine, self.processes)}")
        hours = {
            name: operations / (SHARE * (peak_flops(gpu, torch.bfloat16) or math.nan)) / 3600
            for name, gpu in USUAL.items()
        }
        told = ", ".join(f"{name} {hour:,.2f}" for name, hour in hours.items())
        return "\n".join([*lines, f"GPU hours   {told} (one GPU at {SHARE:.0%} of its bf16 peak)"])


def preflight(
    settings: RunSettings, device: torch.device, *, processes: int = 1, allow_cpu: bool = False
) -> Plan:
    """Plan the training of a recipe on this device, of which each process has one (a CPU they share)."""
    return plan(settings, this_machine(device, processes), processes=processes, allow_cpu=allow_cpu)


def plan(settings: RunSettings, machine: Machine, *, processes: int = 1, allow_cpu: bool = False) -> Plan:
    """Plan the training of a recipe on a machine.

    Raises InputError for what does not fit, with the first settings that do; for what would take months because
    there is no GPU, unless `allow_cpu`; and for blocks that cannot be shared out equally.
    """
    if settings.train.batch % processes:
        raise InputError(
            f"train.batch {settings.train.batch} cannot be shared equally by {processes} processes"
        )
    operations = tokens(settings) * flops_per_token(settings)
    if machine.kind == "cpu" and not allow_cpu and operations > LONGEST * SLOWEST:
        seconds = _seconds(settings, machine, processes)
        if seconds is not None and seconds > LONGEST:
            raise InputError(
                f"{_count(tokens(settings))} tokens through {_count(sizes(settings.model).all)} parameters would "
                f"take about {_duration(seconds)} on this CPU; use a machine with a GPU, or --allow-cpu to train "
                "here all the same"
            )
    parallel = _parallel(settings, machine, processes)
    made = memory(settings, machine, processes, parallel)
    if not (fits(made, machine) and _shareable(settings.train, parallel)):
        told = _shortage(made, machine)
        if fits(made, machine):
            told = "train.optimizer adamw8bit cannot be shared out over processes (train.parallel fsdp)"
        raise InputError(f"{told}: {_cure(settings, machine, processes)}")
    return Plan(settings, machine, processes, parallel, made)


def _parallel(settings: RunSettings, machine: Machine, processes: int) -> Parallel:
    """Return what `train.parallel` comes to: by itself, all weights in each process, as long as they fit."""
    if processes == 1:
        return "none"
    if settings.train.parallel != "auto":
        return settings.train.parallel
    return "ddp" if fits(memory(settings, machine, processes, "ddp"), machine) else "fsdp"


def _shareable(train: Train, parallel: Parallel) -> bool:
    """Tell whether the optimizer can work so: bitsandbytes does not know shares of tensors."""
    return parallel != "fsdp" or train.optimizer != "adamw8bit"


def _shortage(made: Memory, machine: Machine) -> str:
    if needed(made, machine) <= machine.memory and machine.host is not None:
        return (
            f"the copy of a checkpoint takes {_above(made.copy + HOST)} GiB of main memory beside {machine.name}, and "
            f"{_gib(machine.host)} are free"
        )
    return (
        f"training takes {_above(needed(made, machine))} GiB of memory ({_gib(made.state)} for parameters, gradients "
        f"and optimizer, {_gib(made.kept + made.passing)} for a step), and {machine.name} has {_gib(machine.memory)}"
    )


def _cure(settings: RunSettings, machine: Machine, processes: int) -> str:
    """Return the first settings that fit, tried from the least harm on, and no more of them than it takes."""
    train = settings.train
    measures: list[tuple[str, Any]] = []
    if dtype_on(train, machine) == torch.float32 and machine.bf16:
        measures.append(("dtype", "bf16"))
    if not train.activation_checkpointing:
        measures.append(("activation_checkpointing", True))
    if train.optimizer == "adamw8bit" and processes > 1:
        measures.append(("optimizer", "adamw"))
    elif train.optimizer != "adamw8bit" and processes == 1:
        measures.append(("optimizer", "adamw8bit"))
    if processes > 1 and train.parallel == "ddp":
        measures.append(("parallel", "fsdp"))

    def fit(changes: list[tuple[str, Any]], rows: int, count: int) -> bool:
        changed = _changed(settings, {**dict(changes), "micro_batch": rows})
        parallel = _parallel(changed, machine, count)
        return _shareable(changed.train, parallel) and fits(
            memory(changed, machine, count, parallel), machine
        )

    tries: Iterator[tuple[int, int]] = ((processes, n) for n in range(len(measures) + 1))
    several = () if machine.kind == "cpu" else (2, 4, 8, 16, 32, 64)
    more = [n for n in several if n > processes and train.batch % n == 0]
    for count, last in (*tries, *((n, len(measures)) for n in more)):
        chosen = [one for one in measures[:last] if count == processes or one[1] != "adamw8bit"]
        if not fit(chosen, 1, count):
            continue
        for measure in reversed(chosen):  # what came before the one that was still missing may be too much
            without = [other for other in chosen if other != measure]
            if measure[0] != "dtype" and fit(without, 1, count):  # bf16 does no harm, and is faster
                chosen = without
        rows = most = rows_at_once(train, count)
        while not fit(chosen, rows, count):
            rows = max(1, rows // 2)
        keys = [] if rows == most else [f"train.micro_batch = {rows}"]
        keys += [f"train.{key} = {_toml(value)}" for key, value in chosen]
        told = f"set {', '.join(keys)}" if keys else ""
        if count == processes:
            return told
        over = f"train on {count} of them together (--processes {count})"
        return f"{over} and {told}" if told else over
    least = _changed(settings, {**dict(measures), "micro_batch": 1})
    left = needed(memory(least, machine, processes, _parallel(least, machine, processes)), machine)
    return f"nothing that can be set brings it below {_above(left)} GiB; use a machine with more memory"


def _changed(settings: RunSettings, changes: dict[str, Any]) -> RunSettings:
    return settings.model_copy(update={"train": settings.train.model_copy(update=changes)})


def _seconds(settings: RunSettings, machine: Machine, processes: int) -> float | None:
    """Return how long all steps will take, or None when the device's speed is not known."""
    dtype = dtype_on(settings.train, machine)
    peak = machine.peak(dtype)
    if peak is None:
        return None
    speed = peak * (_cpu_share(settings.model, dtype) if machine.kind == "cpu" else SHARE * processes)
    return tokens(settings) * flops_per_token(settings) / speed


def _cpu_share(model: Model, dtype: torch.dtype) -> float:
    return CPU_SHARE[dtype][model.width >= WIDE]


def _time(settings: RunSettings, machine: Machine, processes: int) -> str:
    seconds, dtype = _seconds(settings, machine, processes), dtype_on(settings.train, machine)
    if seconds is None:
        return f"not known: the table of peaks has no {machine.name}"
    peak = f"{(machine.peak(dtype) or 0) / 1e12:,.3g} TFLOP/s"
    if machine.kind == "cpu":
        share = _cpu_share(settings.model, dtype)
        return f"about {_duration(seconds)}, at {share:.0%} of the {peak} that were measured just now"
    each = f" of each of {processes}" if processes > 1 else ""
    return f"about {_duration(seconds)}, at {SHARE:.0%} of its peak of {peak}{each}"


def _duration(seconds: float) -> str:
    for unit, size in (("year", 365.25 * DAY), ("day", DAY), ("hour", 3600.0), ("minute", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}s"
    return f"{math.ceil(seconds)} seconds"


def _count(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,.0f}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f}" if size >= 2**30 else f"{size / 2**30:,.2f}"


def _above(size: int) -> str:
    return f"{math.ceil(10 * size / 2**30) / 10:,.1f}"


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"'
