"""Training on one GPU: tokens/s, MFU and memory of `2b` and `13m`, beside HF Trainer; the CUDA paths checked.

    python3 -m benchmarks.gpu [--cpu] [2b] [13m] [checks]

All three parts take less than ten minutes of an H100 or H200; BENCH_GPU_SECONDS (560) is when it must end.  It
runs from a bare checkout with torch, numpy, safetensors, transformers and accelerate; nothing reads a corpus, ids
are random.  Tables go to standard output, and to gpu.json in $OUT, if that is set.  Without CUDA, or with
--cpu, it does the same with tiny shapes in a minute: to see that it works before a GPU is paid for.

pydantic, if the machine lacks it, can travel as wheels (3 MB); this fetches those of Python 3.12 on Linux:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \\
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .whl \\
        $(grep -E '^(pydantic|pydantic_core|annotated-types|typing-inspection|typing_extensions)==' constraints.txt)

and there, with no network:

    python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .whl/*.whl
    PYTHONPATH=/tmp/site python3 -m benchmarks.gpu

A step is what models.train does without reading blocks: ids to the GPU, forward, backward, finite check, clipping,
optimizer.  MFU counts 6 operations for each parameter and token, and attention in full (models.estimate), of the
bf16 peak by the data sheet (models.hardware), which no GPU reaches: plain matrix products get to about 80 % of it.
"""

import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.train import command, loop
from models import device
from models.data import Batch
from models.decoder import Decoder
from models.estimate import flops_per_token, memory, needed
from models.hardware import peak_flops, this_machine
from models.loss import IGNORED
from models.processes import Processes
from models.randomness import random_state, restore_random
from models.settings import Model, RunSettings, Train
from models.step import Stepper

PARTS = ("2b", "13m", "checks")
LINE = "@@ "  # before a child's results, among whatever libraries print
TINY = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "ffn": 96, "vocab": 512, "context": 64}


def main(arguments: Sequence[str] = ()) -> None:
    """Run the parts that are named, or all; print the tables."""
    cuda = torch.cuda.is_available() and "--cpu" not in arguments
    wanted = [part for part in arguments if part != "--cpu"] or list(PARTS)
    if unknown := set(wanted) - set(PARTS):
        sys.exit(f"error: no part {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    until = time.monotonic() + float(os.environ.get("BENCH_GPU_SECONDS") or 560)
    found: dict[str, Any] = {"machine": _machine(cuda)}
    print("| machine | |\n|---|---|")
    for name, value in found["machine"].items():
        print(f"| {name} | {value} |")
    print(flush=True)
    jobs = {"2b": _jobs_2b, "13m": _jobs_13m, "checks": _jobs_checks}
    for part in PARTS:
        if part in wanted:
            found[part] = []
            for job in jobs[part](cuda):
                lines = _run(job, cuda, until)
                found[part].append({"job": job, "lines": lines})
                _keep(found)
            _TABLES[part](found[part])


def _machine(cuda: bool) -> dict[str, str]:
    about = {"device": device.describe(torch.device("cuda" if cuda else "cpu"))}
    if cuda:
        about["memory"] = f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.1f} GiB"
        peak = peak_flops(torch.cuda.get_device_name(), torch.bfloat16)
        about["bf16 peak, data sheet"] = "not known" if peak is None else f"{peak / 1e12:.0f} TFLOP/s"
    about["python"] = sys.version.split()[0]
    return about


def _keep(found: dict[str, Any]) -> None:
    if out := os.environ.get("OUT"):
        Path(out, "gpu.json").write_text(json.dumps(found, indent=1))


# The jobs: each a process of its own, so that none has the memory, the compiled code or the faults of another.


def _jobs_2b(cuda: bool) -> list[dict[str, Any]]:
    # The micro-batch, and how many of them are in a step; the recipe's own step has 256 blocks.
    cases = [[4, 8], [8, 4], [16, 2]] if cuda else [[1, 2], [2, 1]]
    job = {"job": "sweep", "recipe": "2b", "whole": 256 if cuda else 4}
    adamw = {**job, "optimizer": "adamw", "cases": cases, "aligned": True, "profile": True, "limit": 300}
    muon = {**job, "optimizer": "muon", "cases": cases[:2], "limit": 180}
    return [adamw, muon]


def _jobs_13m(cuda: bool) -> list[dict[str, Any]]:
    # The recipe's own step is 64 blocks in micro-batches of 16.
    cases = [[16, 4], [64, 1], [128, 1]] if cuda else [[1, 2], [2, 1]]
    ours: dict[str, Any] = {"job": "sweep", "recipe": "13m", "cases": cases, "limit": 150}
    jobs = [{**ours, "optimizer": "adamw", "aligned": True, "profile": True}, {**ours, "optimizer": "muon"}]
    for case in cases:
        jobs.append({"job": "hf", "recipe": "13m", "cases": [case], "limit": 60})
    jobs.append({"job": "hf", "recipe": "13m", "cases": cases[1:2], "compile": True, "limit": 90})
    return jobs if cuda else jobs[:-1]


def _jobs_checks(cuda: bool) -> list[dict[str, Any]]:
    return [{"job": "checks", "limit": 180}]


def _run(job: dict[str, Any], cuda: bool, until: float) -> list[dict[str, Any]]:
    """Run a job in a process of its own; return its results, of which the last may be why it failed."""
    job = {**job, "cuda": cuda}
    limit = min(job["limit"], until - time.monotonic())
    print(f"{ {k: v for k, v in job.items() if k != 'limit'} }", file=sys.stderr, flush=True)
    if limit < 10:
        return [{"failed": "no time left"}]
    try:
        return _hf(job, limit) if job["job"] == "hf" else _child(job, limit)
    except RuntimeError as error:
        text = str(error).strip() or f"ended after {limit:.0f} s"
        return [{"failed": "out of memory" if "OutOfMemoryError" in text else text[-300:]}]


def _child(job: dict[str, Any], limit: float) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--job", json.dumps(job)]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # for the check of determinism
    if not job["cuda"]:
        environment["OMP_NUM_THREADS"] = "1"  # more would only wait for each other
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        timer = threading.Timer(limit, process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(LINE):
                lines.append(json.loads(line.removeprefix(LINE)))
        timer.cancel()
        if process.wait():
            errors.seek(0)
            why = f"ended after {limit:.0f} s" if process.returncode == -9 else errors.read()[-1500:]
            lines.append({"failed": why})
            print(why, file=sys.stderr, flush=True)
    return lines


def _hf(job: dict[str, Any], limit: float) -> list[dict[str, Any]]:
    settings = _settings(job)
    [[rows, accumulate]] = job["cases"]
    spec = {
        "shape": settings.model.model_dump(),
        "length": settings.blocks.length - 1,
        "rows": rows,
        "accumulate": accumulate,
        "precision": "bf16",
        "compile": job.get("compile", False),
        "device": "cuda" if job["cuda"] else "cpu",
        "warm": 3,
        "steps": 10 if job["cuda"] else 2,
    }
    python, *torch_at = _python_with_accelerate()
    environment = dict(os.environ) if job["cuda"] else {**os.environ, "OMP_NUM_THREADS": "1"}
    with (
        tempfile.TemporaryDirectory(prefix="pileline-bench-") as folder,
        loop(command("hf_trainer", spec, python, *torch_at), Path(folder), environment) as trainer,
    ):
        timer = threading.Timer(limit, trainer.process.kill)
        timer.start()
        about, turns = trainer.ready(), [trainer.turn() for _ in range(3)]
        timer.cancel()
    fastest = min(turns, key=lambda turn: float(turn["wall"]))
    tokens = rows * accumulate * spec["length"]
    told = {"case": [rows, accumulate], "tokens_per_s": tokens * spec["steps"] / fastest["wall"]}
    return [{**about, **fastest, **told}]


def _python_with_accelerate() -> list[str]:
    if importlib.util.find_spec("accelerate") and importlib.util.find_spec("transformers"):
        return [sys.executable]
    try:
        from benchmarks import peers
    except ImportError as error:
        raise RuntimeError(f"transformers and accelerate are not installed ({error})") from None
    python = peers.environment()
    if python is None:
        raise RuntimeError("transformers and accelerate are not installed")
    return [str(python), str(Path(torch.__file__).parents[1])]


# In a job's process.


def job(text: str) -> None:
    """Do a job, telling results line by line."""
    spec = json.loads(text)
    here = device.choose("cuda" if spec["cuda"] else "cpu")
    {"sweep": sweep, "checks": checks}[spec["job"]](spec, here)


def tell(**what: Any) -> None:
    """Write a result for the process that started us."""
    print(LINE + json.dumps(what), flush=True)


def _settings(spec: dict[str, Any]) -> RunSettings:
    """Return the recipe; on a CPU a tiny relative of it."""
    settings = RunSettings.read(spec["recipe"])
    if spec["cuda"]:
        return settings
    model = settings.model.model_copy(update=TINY)
    blocks = settings.blocks.model_copy(update={"length": model.context})
    return settings.model_copy(update={"model": model, "blocks": blocks})


def sweep(spec: dict[str, Any], here: torch.device) -> None:
    """Measure steps of several micro-batches until memory says no; then the recipe's own step, and a profile."""
    settings = _settings(spec)
    train = settings.train.model_copy(update={"optimizer": spec["optimizer"]})
    # Static shapes: after a second batch size the compiler would make code for any, which is slower.
    torch._dynamo.config.automatic_dynamic_shapes = False
    cuda = here.type == "cuda"
    stepper = Stepper(settings.model, train, Processes(0, 1, here), dtype=torch.bfloat16, compile=cuda)
    draw(stepper.decoder)
    length = settings.blocks.length - 1
    flops = flops_per_token(settings)
    peak = peak_flops(torch.cuda.get_device_name(here), torch.bfloat16) if cuda else None
    machine = this_machine(here, idle=True)
    speeds: dict[int, float] = {}

    def measure(rows: int, accumulate: int, warm: int, steps: int, length: int = length) -> dict[str, Any]:
        step = stepping(stepper, rows, accumulate, length, settings.model.vocab)
        began = time.perf_counter()
        for _ in range(warm):
            step()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
        took = time.perf_counter() - started
        speed = steps * rows * accumulate * length / took
        return {
            "case": [rows, accumulate],
            "tokens_per_s": speed,
            "mfu": None if peak is None else speed * flops / peak,
            "memory": torch.cuda.max_memory_allocated() if cuda else None,
            "planned": needed(memory(_at_once(settings, train, rows), machine), machine),
            "warm_up_s": started - began,
        }

    for rows, accumulate in spec["cases"]:
        full = False
        try:
            told = measure(rows, accumulate, 2, 3)
        except torch.OutOfMemoryError:
            full = True
        if full:  # out here nothing holds on to the tensors of the step that failed
            tell(case=[rows, accumulate], failed="out of memory")
            stepper.optimizers.forget()
            gc.collect()
            torch.cuda.empty_cache()
            break
        speeds[rows] = told["tokens_per_s"]
        tell(**told, parameters=sum(p.numel() for p in stepper.decoder.parameters()), flops_per_token=flops)
    if not speeds:
        return
    best = max(speeds, key=lambda rows: speeds[rows])
    accumulate = dict(spec["cases"])[best]
    if spec.get("whole"):
        tell(**measure(best, spec["whole"] // best, 0, 1), note="the recipe's own step")
    if spec.get("aligned"):  # a block of 2^n ids makes rows of one less
        tell(**measure(best, accumulate, 2, 3, length + 1), note=f"rows of {length + 1}")
    if cuda:
        tell(graphs=torch._dynamo.utils.counters["stats"]["unique_graphs"], case=[best, accumulate])
    if spec.get("profile"):
        step = stepping(stepper, best, accumulate, length, settings.model.vocab)
        took = 1e3 * best * accumulate * length / speeds[best]
        tell(profile=profiled(step, cuda), case=[best, accumulate], step_ms=took)


def _at_once(settings: RunSettings, train: Train, rows: int) -> RunSettings:
    return settings.model_copy(update={"train": train.model_copy(update={"micro_batch": rows})})


def draw(decoder: Decoder) -> None:
    """Draw weights where they are: `init_weights` draws the same on every device, which takes a CPU half a minute."""
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def stepping(
    stepper: Stepper, rows: int, accumulate: int, length: int, vocab: int, lr: float = 1e-4
) -> Callable[[], float]:
    """Return a function that makes a step of `accumulate` micro-batches of new random ids."""
    here, chance = stepper.processes.device, np.random.default_rng(1)

    def step() -> float:
        batches = []
        for _ in range(accumulate):
            ids = torch.from_numpy(chance.integers(0, vocab, (rows, length + 1)))
            batches.append(Batch(ids[:, :-1].to(here), ids[:, 1:].to(here), None))
        update = stepper.update(batches, lr)
        if update.bad is not None:
            raise RuntimeError(update.bad)
        return update.loss

    return step


def profiled(step: Callable[[], float], cuda: bool) -> list[dict[str, Any]]:
    """Return what a step spends its time on, the most expensive first: kernels on a GPU, else operators."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if cuda else [])]) as seen:
        step()
    rows = []
    for event in seen.key_averages():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        took = event.self_device_time_total if cuda else event.self_cpu_time_total
        if took and on_gpu == cuda and not getattr(event, "is_user_annotation", False):
            rows.append({"name": event.key, "calls": event.count, "ms": took / 1e3})
    rows.sort(key=lambda row: -row["ms"])
    total = sum(row["ms"] for row in rows)
    return [{**row, "share": row["ms"] / total, "all_ms": total} for row in rows[:40]]


# The checks.


def checks(spec: dict[str, Any], here: torch.device) -> None:
    """Run every check; each tells figures beside what they may be."""
    for check in (_learns, _masks, _head, _compiled, _formats, _checkpointed, _deterministic, _random_state):
        started = time.perf_counter()
        try:
            for what, found, most in check(here):
                passed = found <= most
                tell(check=what, found=found, most=most, passed=passed)
        except Exception as error:  # the others are still worth the machine
            tell(check=check.__name__.strip("_"), failed=f"{type(error).__name__}: {error}"[:600])
        print(f"{check.__name__}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


Checked = Iterator[tuple[str, float, float]]  # what, the figure, the most that it may be


def _model(here: torch.device, **changes: Any) -> Model:
    shape = {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "tie": True, **TINY}
    if here.type == "cuda":
        shape |= {"layers": 4, "width": 256, "heads": 4, "kv_heads": 2, "ffn": 704}
        shape |= {"vocab": 50304, "context": 512}
    return Model(**{**shape, **changes})


def _decoder(model: Model, here: torch.device) -> Decoder:
    decoder = Decoder(model)
    decoder.init_weights(1)
    with torch.no_grad():  # so large that the order of documents matters
        for parameter in decoder.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return decoder.to(here)


def _batch(model: Model, here: torch.device, rows: int = 4) -> Batch:
    """Return random ids of several documents each; an odd length, as blocks have, and some padding."""
    chance = np.random.default_rng(2)
    ids = torch.from_numpy(chance.integers(0, model.vocab, (rows, model.context)))
    documents = torch.from_numpy((chance.random(ids.shape) < 0.03).cumsum(1).astype(np.int32))
    targets = ids[:, 1:].clone()
    targets[0, -5:] = IGNORED
    return Batch(*(t.to(here) for t in (ids[:, :-1], targets, documents[:, :-1].contiguous())))


def _gradients(decoder: nn.Module, loss: Tensor) -> Tensor:
    decoder.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    found = torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None])
    return found.float().cpu()


def _differs(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def _learns(here: torch.device) -> Checked:
    """The same few blocks again and again: the loss must go to nearly 0."""
    model = _model(here)
    ids, targets, _ = _batch(model, here)
    batch = Batch(ids[:, :64], targets[:, :64], None)
    for optimizer in ("adamw", "muon"):
        train = Train(steps=1000, batch=4, lr=3e-3 if optimizer == "adamw" else 1e-2, optimizer=optimizer)
        stepper = Stepper(model, train, Processes(0, 1, here), dtype=torch.bfloat16, compile=_compiles(here))
        stepper.init(1)
        losses = [stepper.update([batch], train.lr).loss for _ in range(80)]
        yield f"loss after 80 steps on one batch, {optimizer} (first {losses[0]:.2f})", losses[-1], 1.0


def _compiles(here: torch.device) -> bool:
    return here.type == "cuda"


def _masks(here: torch.device) -> Checked:
    """Document masks here (FlexAttention on CUDA) and on a CPU (an explicit mask), in float32."""
    cpu = torch.device("cpu")
    model = _model(here)
    for reset, compiled in ((False, False), (True, False), (False, True)):
        if compiled and here == cpu:
            continue
        found = []
        for where, masked in ((cpu, True), (here, True), (cpu, False)):
            decoder = _decoder(model, where)
            if compiled and where == here:
                for block in decoder.blocks:
                    block.compile()
            decoder.document_mask, decoder.reset_positions = masked, reset and masked
            batch = _batch(model, where)
            loss = decoder(*(batch if masked else batch._replace(documents_BT=None)))
            found.append((float(loss.detach()), _gradients(decoder, loss)))
        (reference, gradients), (loss_here, gradients_here), (unmasked, _) = found
        name = f"document mask{', positions reset' * reset}{', compiled' * compiled}"
        yield f"{name}: loss to that on a CPU, relative", abs(loss_here / reference - 1), 1e-5
        yield f"{name}: gradient to that on a CPU, relative", _differs(gradients_here, gradients), 1e-3
        yield f"{name}: changes nothing", float(abs(unmasked / reference - 1) < 1e-5), 0.0


def _head(here: torch.device) -> Checked:
    """The loss head, a chunk of logits at a time, beside cross_entropy of all logits."""
    for tie in (True, False):
        model = _model(here, tie=tie, head_bias=not tie)
        decoder = _decoder(model, here)
        ids, targets, _ = _batch(model, here, rows=16)
        logits = decoder.logits(decoder.hidden(ids)).flatten(0, 1)
        full = F.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=IGNORED)
        reference = _gradients(decoder, full)
        for dtype, most, most_gradient in ((torch.float32, 1e-5, 1e-4), (torch.bfloat16, 2e-3, 5e-2)):
            loss = decoder(ids, targets, dtype=dtype)
            gradient = _gradients(decoder, loss)
            name = f"loss head, {'tied' if tie else 'with a bias'}, {str(dtype)[6:]}"
            yield f"{name}: to full logits in float32, relative", abs(float((loss / full).detach()) - 1), most
            yield f"{name}: its gradient, relative", _differs(gradient, reference), most_gradient


def _compiled(here: torch.device) -> Checked:
    """torch.compile of every block beside eager."""
    model = _model(here)
    batch = _batch(model, here)._replace(documents_BT=None)
    formats = [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)]
    for dtype, most in formats if here.type == "cuda" else formats[:1]:  # a CPU compiles for half a minute
        results = []
        for compiled in (False, True):
            decoder = _decoder(model, here)
            if compiled:
                for block in decoder.blocks:
                    block.compile()
            loss = decoder(*batch, dtype=dtype)
            results.append((float(loss.detach()), _gradients(decoder, loss)))
        (loss_eager, eager), (loss_compiled, compiled_gradient) = results
        name = f"compiled to eager, {str(dtype)[6:]}"
        yield f"{name}: loss, relative", abs(loss_compiled / loss_eager - 1), most
        yield f"{name}: gradient, relative", _differs(compiled_gradient, eager), most


def _formats(here: torch.device) -> Checked:
    """bf16 beside fp32, over 20 steps of training."""
    model = _model(here)
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        train = Train(steps=1000, batch=4, lr=1e-3)
        stepper = Stepper(model, train, Processes(0, 1, here), dtype=dtype)
        stepper.init(1)
        step = stepping(stepper, 4, 1, model.context - 1, model.vocab, lr=1e-3)
        losses[dtype] = [step() for _ in range(20)]
    pairs = zip(losses[torch.bfloat16], losses[torch.float32], strict=True)
    yield "bf16 to fp32: losses of 20 steps, relative", max(abs(a / b - 1) for a, b in pairs), 1e-2


def _checkpointed(here: torch.device) -> Checked:
    """Activation checkpointing gives the same gradient."""
    model = _model(here)
    batch = _batch(model, here)._replace(documents_BT=None)
    results, memory = [], []
    for checkpointed in (False, True):
        decoder = _decoder(model, here)
        decoder.activation_checkpointing = checkpointed
        if here.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        results.append(_gradients(decoder, decoder(*batch)))
        memory.append(torch.cuda.max_memory_allocated() if here.type == "cuda" else 0)
    saved = f" (memory {memory[1] / memory[0]:.2f} of that without)" if memory[0] else ""
    yield f"activation checkpointing: gradient, relative{saved}", _differs(results[1], results[0]), 1e-5


def _deterministic(here: torch.device) -> Checked:
    """Ten steps twice, in the deterministic mode: the same bits."""
    model = _model(here)
    device.make_deterministic()
    try:
        losses = []
        for _ in range(2):
            stepper = Stepper(
                model,
                Train(steps=1000, batch=4, lr=1e-2, optimizer="muon"),
                Processes(0, 1, here),
                dtype=torch.bfloat16,
            )
            stepper.init(1)
            step = stepping(stepper, 4, 2, model.context - 1, model.vocab, lr=1e-2)
            losses.append([step() for _ in range(10)])
    finally:
        torch.use_deterministic_algorithms(False)
    yield (
        "deterministic mode: steps of 10 whose loss differs",
        sum(a != b for a, b in zip(*losses, strict=True)),
        0,
    )


def _random_state(here: torch.device) -> Checked:
    """What a checkpoint keeps of the random generators brings the same numbers again."""
    kept = random_state(here)
    first = (torch.rand(5, device=here).cpu(), torch.rand(5), np.random.rand(5))
    restore_random(kept, here)
    again = (torch.rand(5, device=here).cpu(), torch.rand(5), np.random.rand(5))
    same = [bool((np.asarray(a) == np.asarray(b)).all()) for a, b in zip(first, again, strict=True)]
    yield "random generators after a restore: that go on elsewhere", float(same.count(False)), 0


# The tables.


def _case(line: dict[str, Any]) -> str:
    rows, accumulate = line["case"]
    return f"{rows} x {accumulate}"


def _note(line: dict[str, Any]) -> str:
    return f", {line['note']}" if "note" in line else ""


def _profiles(ran: list[dict[str, Any]]) -> None:
    for one in ran:
        for line in one["lines"]:
            if "profile" not in line:
                continue
            step, busy = line["step_ms"], line["profile"][0]["all_ms"]
            print(f"A step of {one['job']['recipe']}, {_case(line)} blocks, takes {step:.0f} ms; ", end="")
            print(f"all operations together {busy:.0f} ms, and the most expensive:\n")
            print("| operation | calls | ms | share |\n|---|---|---|---|")
            for row in line["profile"][:10]:
                name = row["name"].replace("|", "\\|")
                name = name if len(name) < 100 else name[:60] + "..." + name[-37:]
                print(f"| `{name}` | {row['calls']} | {row['ms']:.2f} | {row['share']:.1%} |")
            print(flush=True)


def _print_2b(ran: list[dict[str, Any]]) -> None:
    print("| 2b | blocks x micro-batches | tokens/s | MFU | peak memory, GiB | by models.estimate, GiB |")
    print("|---|---|---|---|---|---|")
    for one in ran:
        name = one["job"]["optimizer"]
        for line in one["lines"]:
            if "profile" in line or "graphs" in line:
                continue
            if "failed" in line:
                case = _case(line) if "case" in line else ""
                print(f"| {name} | {case} | {_flat(line['failed'])} | | | |")
                continue
            mfu = "n/a" if line["mfu"] is None else f"{line['mfu']:.1%}"
            print(
                f"| {name}{_note(line)} | {_case(line)} | {line['tokens_per_s']:,.0f} | {mfu} | {_memory(line)} |"
            )
    print(flush=True)
    _profiles(ran)


def _print_13m(ran: list[dict[str, Any]]) -> None:
    print("| 13m | blocks x micro-batches | tokens/s | MFU | peak memory, GiB | to HF Trainer |")
    print("|---|---|---|---|---|---|")
    theirs: dict[str, float] = {}  # the faster of eager and compiled
    for one in ran:
        for line in one["lines"]:
            if one["job"]["job"] == "hf" and "tokens_per_s" in line:
                theirs[_case(line)] = max(theirs.get(_case(line), 0.0), line["tokens_per_s"])
    for one in ran:
        told = one["job"]
        name = f"ours, {told['optimizer']}" if told["job"] == "sweep" else "HF Trainer, adamw"
        name += ", torch_compile" if told.get("compile") else ""
        for line in one["lines"]:
            if "profile" in line or "graphs" in line:
                continue
            if "failed" in line:
                case = _case(line) if "case" in line else _case({"case": told["cases"][0]})
                print(f"| {name} | {case} | {_flat(line['failed'])} | | | |")
                continue
            case, speed = _case(line), line["tokens_per_s"]
            ratio = f"{speed / theirs[case]:.2f}" if told["job"] == "sweep" and case in theirs else ""
            mfu = f"{line['mfu']:.1%}" if line.get("mfu") else "n/a"
            memory = f"{line['memory'] / 2**30:.1f}" if line.get("memory") else "n/a"
            print(f"| {name}{_note(line)} | {case} | {speed:,.0f} | {mfu} | {memory} | {ratio} |")
    print(flush=True)
    _profiles(ran)


def _print_checks(ran: list[dict[str, Any]]) -> None:
    print("| check | found | at most | |\n|---|---|---|---|")
    for one in ran:
        for line in one["lines"]:
            if "failed" in line:
                print(f"| {line.get('check', 'checks')} | {_flat(line['failed'])} | | FAILED |")
            else:
                verdict = "passed" if line["passed"] else "FAILED"
                print(f"| {line['check']} | {line['found']:.2g} | {line['most']:g} | {verdict} |")
    print(flush=True)


def _memory(line: dict[str, Any]) -> str:
    measured = "n/a" if line["memory"] is None else f"{line['memory'] / 2**30:.1f}"
    return f"{measured} | {line['planned'] / 2**30:.1f}"


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[-200:]


_TABLES = {"2b": _print_2b, "13m": _print_13m, "checks": _print_checks}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        job(sys.argv[2])
    else:
        main(sys.argv[1:])
