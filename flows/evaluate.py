"""Every night: score the newest checkpoint of each recipe, and say what has changed.

prefect deployment run evaluate/nightly     at once instead of at 03:00 UTC
python -m flows.evaluate                    without any server of yours
"""

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from corpora.errors import InputError, PilelineError, run_cli
from flows import cli
from models import runs
from tasks import child, history, logs, report
from tasks.evaluate import evaluate as score
from tasks.generate import generate

Device = Literal["auto", "cpu", "cuda"]


@flow(name="evaluate", flow_run_name="evaluate-newest")
def evaluate(device: Device = "auto") -> State[Any]:
    """Score the newest checkpoint of each recipe on held-out text and compare with its last night.

    Args:
        device: Where the models run; auto takes a GPU when there is one.
    """
    logs.begin()
    child.allow()
    root = runs.runs_root()
    earlier = history.read(root / "nightly.jsonl")
    newest = runs.newest(root)
    if not newest:
        return Completed(message=f"no checkpoint in {root} yet; run the flow pretrain first")

    tonight: list[history.Night] = []
    failures: dict[str, str] = {}
    for recipe, run in sorted(newest.items()):
        try:
            tonight.append(night(recipe, run, device))
        except Exception as error:  # one bad recipe does not hide the others; a cancel is no Exception
            failures[recipe] = str(error) if isinstance(error, PilelineError) else repr(error)
    history.append(root / "nightly.jsonl", tonight)
    report.publish_nights([(now, history.last(earlier, now.recipe)) for now in tonight], failures)

    if failures:
        told = "; ".join(f"{recipe}: {error}" for recipe, error in failures.items())
        raise InputError(f"{len(failures)} of {len(newest)} recipes failed: {told}")
    said = "; ".join(
        f"{now.recipe} {now.bits_per_byte:.3f} bits per byte "
        f"({report.change(now, history.last(earlier, now.recipe))})"
        for now in tonight
    )
    return Completed(message=said)


def night(recipe: str, run: Path, device: Device) -> history.Night:
    """Score one run and let it write."""
    scores = score(run, device)
    tested = generate(run, device)
    return history.Night(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe=recipe,
        checkpoint=scores["checkpoint"],
        step=scores["step"],
        eval_set=scores["eval_set"],
        bits_per_byte=scores["bits_per_byte"],
        subsets={name: one["bits_per_byte"] for name, one in scores["subsets"].items()},
        samples=tuple(sample for sample in tested["samples"] if sample["method"] == "greedy"),
    )


def main() -> None:
    """Run the flow from a terminal."""
    parser = argparse.ArgumentParser(prog="python -m flows.evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    arguments = parser.parse_args()
    with cli.reachable_server():
        state = evaluate(arguments.device, return_state=True)
    state.result()
    print(state.message)


if __name__ == "__main__":
    run_cli(main)
