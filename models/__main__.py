"""Training and what comes after it by hand, without Prefect:  python -m models STEP --help"""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from corpora.errors import EXIT_INPUT, EXIT_UNAVAILABLE, InputError, run_cli
from corpora.files import data_root
from corpora.progress import emit, log_above_bars, say
from corpora.settings import read_toml, recipe_path
from models import runs
from models.settings import RunSettings


def main() -> int:
    """Parse the command line and run one step; return the exit code."""
    # Read when torch is imported.  Threads that wait actively halve the speed of a machine that is also busy
    # with something else, such as a Prefect server, and gain little on an idle one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = argparse.ArgumentParser(
        prog="python -m models",
        description="Train a model on prepared blocks, score it and let it write, step by step. RUN is a run "
        "folder, which `new` makes in $PILELINE_RUNS (default: runs/). Blocks are read from $PILELINE_DATA "
        "(default: data/).",
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")

    step = steps.add_parser("new", help="make the run folder of a recipe, and print it")
    step.add_argument("recipe", metavar="RECIPE", help="a name in deployments/ or a path ending in .toml")

    step = steps.add_parser(
        "estimate",
        help="tell the memory and the time that a recipe's training takes here (exit code 2: it does not fit)",
        description="Tell the memory and the time that a recipe's training takes on this machine, and refuse what "
        "does not fit with the first settings that do. Nothing is read or downloaded but the recipe.",
    )
    step.add_argument("recipe", metavar="RECIPE", help="a name in deployments/ or a path ending in .toml")
    _processes_argument(step)
    _device_argument(step)
    _allow_cpu_argument(step)
    step.add_argument("--events", action="store_true", help="report the result as a JSON line")

    step = steps.add_parser(
        "train",
        help="train to the recipe's last step, or go on from the newest checkpoint",
        description="Train to the recipe's last step, or go on from the newest checkpoint. Ctrl-C saves and stops. "
        "For GPUs of several machines, start it with torchrun.",
    )
    _run_arguments(step, events=True)
    _processes_argument(step)
    _allow_cpu_argument(step)
    step.add_argument(
        "--allow-changes",
        action="store_true",
        help="go on from a checkpoint of another recipe or of other blocks, with a warning",
    )

    step = steps.add_parser("evaluate", help="bits per byte of held-out documents, per subset")
    _run_arguments(step, events=True)
    _checkpoint_argument(step)

    step = steps.add_parser(
        "smoke", help="continue the recipe's prompts and check what comes (exit code 2: it failed)"
    )
    _run_arguments(step, events=True)
    _checkpoint_argument(step)

    step = steps.add_parser(
        "fetch",
        help="download a model folder and verify it by its lists of checksums",
        description="Download every file that a model's lists of checksums name, and verify it; go on where the "
        "last time ended. Exit code 2: a file is missing or wrong; 75: try again later.",
    )
    step.add_argument("url", metavar="URL", help="of the folder: https:, http:, file: or hf://OWNER/NAME")
    step.add_argument("folder", metavar="DIR", type=Path, help="where the files go")
    step.add_argument(
        "--checklist",
        metavar="NAME",
        action="append",
        help="list of checksums in the folder (may be given again); default: the usual names, the hub's own list",
    )
    step.add_argument("--parallel", metavar="N", type=_count, default=4, help="files at a time; default: 4")
    step.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of an hf:// URL; default: main"
    )

    step = steps.add_parser("generate", help="continue a prompt")
    _run_arguments(step, events=False)
    _checkpoint_argument(step)
    step.add_argument("prompt", metavar="PROMPT", help='text to continue; "" starts a new document')
    step.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    step.add_argument("--max-new-tokens", type=_count, help="default: the recipe's")
    step.add_argument(
        "--temperature", type=_positive, help="below 1: safer, above 1: wilder; default: the recipe's"
    )
    step.add_argument(
        "--top-p",
        type=_share,
        help="draw from the likeliest tokens with this much probability together; default: the recipe's",
    )
    step.add_argument("--seed", type=int, help="another seed, another text; default: the recipe's")

    step = steps.add_parser("log", help="show a run that was trained in TensorBoard, or another such tool")
    step.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    step.add_argument(
        "--to",
        choices=("tensorboard", "wandb", "mlflow", "trackio"),
        default="tensorboard",
        help="default: tensorboard",
    )

    arguments = vars(parser.parse_args())
    run: dict[str, Callable[..., int]] = {
        "new": _new,
        "estimate": _estimate,
        "train": _train,
        "evaluate": _evaluate,
        "smoke": _smoke,
        "generate": _generate,
        "fetch": _fetch,
        "log": _log,
    }
    return run[arguments.pop("step")](**arguments)


def _run_arguments(step: argparse.ArgumentParser, *, events: bool) -> None:
    step.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    _device_argument(step)
    if events:
        step.add_argument("--events", action="store_true", help="report progress and result as JSON lines")


def _device_argument(step: argparse.ArgumentParser) -> None:
    step.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )


def _processes_argument(step: argparse.ArgumentParser) -> None:
    step.add_argument(
        "--processes",
        metavar="N",
        type=_count,
        default=1,
        help="that train together, one for each GPU; default: 1",
    )


def _allow_cpu_argument(step: argparse.ArgumentParser) -> None:
    step.add_argument(
        "--allow-cpu", action="store_true", help="train without a GPU even if that takes more than a month"
    )


def _checkpoint_argument(step: argparse.ArgumentParser) -> None:
    step.add_argument(
        "--checkpoint",
        metavar="WHICH",
        type=_which,
        help="newest, best (on held-out text) or the number of a step; default: newest, and best for a run that "
        "ended early",
    )


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0 (for no randomness use --greedy)")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _which(text: str) -> str | int:
    if text in ("newest", "best"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is neither newest nor best nor the number of a step")
    return int(text)


def _new(recipe: str) -> int:
    path = recipe_path(recipe)
    settings = RunSettings.read(path)
    inputs = runs.inputs_of(settings.corpus, data_root())
    text = runs.recipe_text(settings, str(read_toml(path).get("description", "")))
    print(runs.create(path.stem, text, inputs, runs.runs_root()))
    return 0


def _fetch(url: str, folder: Path, checklist: list[str] | None, parallel: int, revision: str | None) -> int:
    from models.fetch import fetch

    log_above_bars()
    results = fetch(url, folder, checklist, revision=revision, parallel=parallel, tell=say)
    failures = [result for result in results if result.failed]
    for failure in failures:
        print(f"error: {failure.line}", file=sys.stderr)
    if all(failure.state == "unavailable" for failure in failures):
        return EXIT_UNAVAILABLE if failures else 0
    return EXIT_INPUT


def _log(run: Path, to: str) -> int:
    from models.loggers import replay

    print(replay(run, to))
    return 0


# torch takes a second or two to import: only the steps that need it do.


def _estimate(recipe: str, device: Any, processes: int, allow_cpu: bool, events: bool) -> int:
    from models import device as devices
    from models.estimate import plan
    from models.hardware import this_machine

    path = recipe_path(recipe)
    settings = RunSettings.read(path)
    machine = this_machine(devices.choose(device), processes, idle=True)
    try:
        made = plan(settings, machine, processes=processes, allow_cpu=allow_cpu)
    except InputError as error:
        raise InputError(f"recipe {path.stem}: {error}") from None
    if events:
        emit("result", text=made.text, parallel=made.parallel)
    else:
        print(made.text)
    return 0


def _train(run: Path, device: Any, events: bool, processes: int, allow_cpu: bool, allow_changes: bool) -> int:
    if processes > 1:
        from models.launch import launch

        flags = {"--events": events, "--allow-cpu": allow_cpu, "--allow-changes": allow_changes}
        given = [flag for flag, there in flags.items() if there]
        return launch(processes, ["train", str(run), "--device", device, *given])
    from models.train import Stopped, train

    done = train(run, device, events=events, allow_changes=allow_changes, allow_cpu=allow_cpu)
    first = os.environ.get("RANK", "0") == "0"
    if isinstance(done, Stopped):
        if first:
            print(
                f"stopped by {signal.Signals(done.signal).name} after step {done.step}, saved in "
                f"{done.checkpoint}; run the same command again to go on",
                file=sys.stderr,
                flush=True,
            )
        return 128 + done.signal
    if not first:
        return 0
    if events:
        emit("result", **done)
        return 0
    state = "step {step:,} was reached before" if done["skipped"] else "done: step {step:,}"
    print(
        f"{state}, {{val_bpb:.3f}} bits per byte (untrained {{untrained_val_bpb:.3f}}), {{checkpoint}}".format(
            **done
        )
    )
    return 0


def _evaluate(run: Path, device: Any, checkpoint: str | int | None, events: bool) -> int:
    from models.evaluate import evaluate

    scores = evaluate(run, device, checkpoint, events=events)
    if events:
        emit("result", **scores)
        return 0
    print(f"{'subset':<28} {'documents':>10} {'bytes':>12} {'bits per byte':>14}")
    for name, one in (*scores["subsets"].items(), ("all", scores)):
        print(f"{name:<28} {one['documents']:>10,} {one['bytes']:>12,} {one['bits_per_byte']:>14.4f}")
    print(scores["file"])
    return 0


def _smoke(run: Path, device: Any, checkpoint: str | int | None, events: bool) -> int:
    from models.smoke import smoke

    told = smoke(run, device, checkpoint)
    if events:
        emit("result", **told)
        return 0
    for sample in told["samples"]:
        print(
            f"--- {sample['method']}, {sample['new_tokens']} new tokens\n{sample['prompt']}{sample['text']}"
        )
    for check in told["checks"]:
        print(f"passed: {check['check']}")
    print(told["file"])
    return 0


def _generate(
    run: Path,
    device: Any,
    checkpoint: str | int | None,
    prompt: str,
    greedy: bool,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
) -> int:
    from models.generate import Sampling, write
    from models.trained import open_run

    trained = open_run(run, device, checkpoint)
    recipe = trained.settings.generate
    sampling = Sampling(
        temperature or recipe.temperature, top_p or recipe.top_p, recipe.seed if seed is None else seed
    )
    written = write(
        trained.decoder,
        trained.tokenizer,
        prompt,
        max_new_tokens or recipe.max_new_tokens,
        None if greedy else sampling,
    )
    print(prompt + written.text)
    return 0


if __name__ == "__main__":
    try:
        run_cli(main)
    except SystemExit as end:
        # A thread of gloo that lets go of its last tensor while the interpreter shuts down ends the process with
        # SIGABRT, and all is done here: what several processes share needs no shutting down.
        if os.environ.get("WORLD_SIZE", "1") != "1":
            with suppress(BrokenPipeError):
                sys.stdout.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise
