"""From raw text shards to a trained, tested language model: the whole way in one flow.

prefect deployment run pretrain/13m        with `make serve` running
python -m flows.pretrain demo --steps 60   without any server of yours
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

from prefect import flow, runtime, unmapped
from prefect.task_runners import ThreadPoolTaskRunner

from corpora.errors import InputError, run_cli
from corpora.parallel import cores
from deployments import recipe as recipes
from flows import cli
from tasks import child, logs, report
from tasks.begin import begin, check
from tasks.evaluate import evaluate
from tasks.fetch import fetch
from tasks.generate import generate
from tasks.outcome import every_shard
from tasks.prepare import prepare
from tasks.train import train
from tasks.train_tokenizer import train_tokenizer

Device = Literal["auto", "cpu", "cuda"]


def run_name() -> str:
    """Name the flow run after its recipe, which may be a path."""
    return f"pretrain-{Path(runtime.flow_run.parameters['recipe']).stem}"


@flow(name="pretrain", flow_run_name=run_name)
def pretrain(
    recipe: str = "demo",
    shards: int | None = None,
    steps: int | None = None,
    device: Device = "auto",
    processes: int = 1,
    workers: int | None = None,
    downloads: int = 4,
    overrides: dict[str, Any] | None = None,
    allow_cpu: bool = False,
) -> dict[str, Any]:
    """Fetch, prepare, train, evaluate and generate, as one recipe says.

    What was done before is found on disk and skipped, so a run that was stopped goes on where it was.

    Args:
        recipe: A recipe in deployments/ by its name, or a path to a .toml file.
        shards: Train on this many of the recipe's train shards only.
        steps: Train for this many steps instead of the recipe's.
        device: Where the model runs; auto takes a GPU when there is one.
        processes: Processes that train together, one for each GPU.
        workers: Processes that turn text into blocks, over all shards; by default one for each core.
        downloads: Shards that are fetched at the same time.
        overrides: Other keys of the recipe to change, such as {"train.lr": 0.003}.
        allow_cpu: Train without a GPU even if that takes more than a month.
    """
    logs.begin()
    child.allow()
    workers = cores() if workers is None else workers
    settings = choose(recipe, shards, steps, processes, workers, downloads, overrides)
    name, corpus = Path(recipe).stem, settings.corpus
    toml = settings.toml()
    unknown = check(name, settings, toml, device, processes, allow_cpu)
    fetcher: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=downloads)
    runner: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=workers)
    with fetcher, runner:
        if unknown:  # the run is named after its shards' hashes
            every_shard(unknown, fetcher.map(fetch, {"corpus": unmapped(corpus), "shard": unknown}))
        run = begin(name, settings, toml)
        names = corpus.shards
        fetched = fetcher.map(fetch, {"corpus": unmapped(corpus), "shard": names})
        if settings.tokenizer.train is not None:
            every_shard(names, fetched)
            train_tokenizer(run)
        prepared = runner.map(
            prepare,
            {"run": unmapped(run), "shard": names, "fetched": fetched, "workers": unmapped(workers)},
        )
        shards_done = every_shard(names, fetched, prepared)
    report.ledger(run, settings, shards_done)

    trained = train(run, device, processes, allow_cpu, return_state=True).result()
    scores = evaluate(run, device)
    generate(run, device)
    return {
        "run": str(run),
        "step": trained["step"],
        "untrained_val_bpb": trained["untrained_val_bpb"],
        "val_bpb": trained["val_bpb"],
        "bits_per_byte": scores["bits_per_byte"],
        "prompt": settings.generate.prompts[0],
    }


def choose(
    recipe: str,
    shards: int | None,
    steps: int | None,
    processes: int,
    workers: int,
    downloads: int,
    overrides: dict[str, Any] | None,
) -> recipes.Recipe:
    """Load the recipe with the flow's parameters put in."""
    changes = dict(overrides or {})
    for key, count in (("processes", processes), ("workers", workers), ("downloads", downloads)):
        if count < 1:
            raise InputError(f"{key} is {count}; at least 1 is needed")
    if shards is not None:
        train_shards = recipes.load(recipe, changes).corpus.train
        if not 1 <= shards <= len(train_shards):
            raise InputError(f"shards is {shards}; recipe {recipe} has {len(train_shards)} train shards")
        changes["corpus.train"] = list(train_shards[:shards])
    if steps is not None:
        changes["train.steps"] = steps
    for said, instead in (("train.steps", "train.tokens"), ("train.tokens", "train.steps")):
        if said in changes:  # the recipe's own budget, in the other unit, counts no more
            changes.setdefault(instead, None)
    return recipes.load(recipe, changes)


def main() -> None:
    """Run the flow from a terminal."""
    parser = argparse.ArgumentParser(prog="python -m flows.pretrain", description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", nargs="?", default="demo", help="name in deployments/, or a .toml file")
    parser.add_argument("--shards", type=int, help="train on the first SHARDS train shards only")
    parser.add_argument("--steps", type=int, help="train for STEPS steps instead of the recipe's")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--processes", type=int, default=1, help="processes that train together, one for each GPU"
    )
    parser.add_argument("--workers", type=int, help="processes that make blocks; default: one for each core")
    parser.add_argument("--downloads", type=int, default=4, help="shards fetched at the same time")
    parser.add_argument(
        "--allow-cpu", action="store_true", help="train without a GPU even if that takes more than a month"
    )
    arguments = parser.parse_args()
    given = arguments
    choose(
        given.recipe, given.shards, given.steps, given.processes, given.workers or 1, given.downloads, None
    )
    with cli.reachable_server():
        done = pretrain(**vars(arguments))
    print(
        f"\nBits per byte of held-out text: {done['untrained_val_bpb']:.3f} before training, "
        f"{done['val_bpb']:.3f} after {done['step']:,} steps (watched blocks); "
        f"{done['bits_per_byte']:.3f} over documents\n"
        f"Run folder: {done['run']}\n"
        f"Let it write: {shlex.join([_python(), '-m', 'models', 'generate', done['run'], done['prompt']])}"
    )


def _python() -> str:
    """Return how a person here calls this Python: .venv/bin/python, when that is where it is."""
    here = Path(sys.executable)
    return str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else "python"


if __name__ == "__main__":
    run_cli(main)
