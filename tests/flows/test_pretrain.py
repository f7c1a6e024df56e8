"""The whole way on a tiny corpus, through the commands that a person types, on a real server."""

import json
import re
import shutil
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(900)  # the first test also waits for the server, the worker and a whole run


@pytest.fixture(scope="module")
def trained(served: Any, tiny: Path) -> Any:
    """`prefect deployment run` of the tiny recipe, by the worker."""
    done = served.run("prefect", "deployment", "run", "pretrain/demo", "--watch", "-p", f'recipe="{tiny}"')
    log = served.flow_log(served.flow_run("pretrain-tiny")["id"])
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log}"
    return served


def test_a_watched_deployment_ends_completed_with_its_pages(trained: Any) -> None:
    run = trained.flow_run("pretrain-tiny")
    assert (run["state_type"], run["state_name"]) == ("COMPLETED", "Completed")
    artifacts = trained.api("artifacts/filter", artifacts={"flow_run_id": {"any_": [run["id"]]}})
    (folder,) = (trained.root / "runs").glob("tiny-*")
    pages = {
        one["key"].removeprefix(f"{folder.name}-"): one["data"]
        for one in artifacts
        if one["type"] == "markdown"
    }
    assert set(pages) == {"ledger", "loss", "bits-per-byte", "samples"}
    assert "| **all** | 86 | 86 | 0 | 0 |" in pages["ledger"]
    assert all("data:image/svg+xml;base64," in pages[key] for key in ("loss", "bits-per-byte"))
    assert "The cat" in pages["samples"]
    rings = {one["key"]: one["data"] for one in artifacts if one["type"] == "progress"}
    assert rings[f"{folder.name}-train"] == rings["tiny-corpus-fetch-train-00"] == 100.0


def test_the_log_of_the_rooms_is_shown_with_the_run(trained: Any) -> None:
    log = trained.flow_log(trained.flow_run("pretrain-tiny")["id"])
    assert "step 6/6" in log
    assert "shard val: no sha256 was known; this one is trusted from now on: " in log
    assert "bytes to download, about" in log


def test_what_is_done_is_not_done_again(trained: Any, tiny: Path) -> None:
    again = trained.run("flows.pretrain", str(tiny))
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("Finished in state UpToDate(") == 7  # fetch and prepare three shards, train
    assert " after 6 steps (watched blocks); " in again.stdout


def test_a_recipe_may_train_its_tokenizer(trained: Any, tiny: Path) -> None:
    recipe, large = (tiny.with_name(f"{name}.toml") for name in ("pieces", "large"))
    for path, vocab in ((recipe, 300), (large, 30_000)):
        text = tiny.read_text().replace('kind = "tiktoken"\nname = "r50k_base"', 'kind = "sentencepiece"')
        text = text.replace("vocab = 50304", f"vocab = {vocab}")
        own = f"bos = 1\neos = 2\n[tokenizer.train]\nvocab = {vocab}"
        path.write_text(text.replace("bos = 50256\neos = 50256", own))
    first = trained.run("flows.pretrain", str(recipe))
    assert first.returncode == 0, first.stderr
    assert " after 6 steps (watched blocks); " in first.stdout
    (model,) = (trained.root / "data" / "tiny-corpus" / "tokenizers").rglob("tokenizer.model")
    (beside,) = (trained.root / "data" / "tiny-corpus" / "blocks").glob("*/tokenizer.model")
    assert model.read_bytes() == beside.read_bytes()
    assert (beside.parent / "README.md").is_file()
    again = trained.run("flows.pretrain", str(recipe))
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("Finished in state UpToDate(") == 8  # as above, and the tokenizer

    # The run has its tokenizer with it, and needs the corpus' no more.
    (run,) = (trained.root / "runs").glob("pieces-*")
    model.unlink()
    written = trained.run("models", "generate", str(run), "The cat")
    assert written.returncode == 0, written.stderr
    shutil.rmtree(run)  # the nights below are of one recipe

    failed = trained.run("flows.pretrain", str(large))
    assert failed.returncode == 2
    assert re.search(r"^error: .*vocab = 30000 is too large for this text: at most \d+", failed.stderr, re.M)
    for run in (trained.root / "runs").glob("large-*"):
        shutil.rmtree(run)


def test_one_bad_shard_fails_the_flow_by_its_name(served: Any, half: Path) -> None:
    failed = served.run("flows.pretrain", str(half))
    assert failed.returncode == 2
    said = failed.stderr.strip().splitlines()[-1]
    assert said.startswith("error: 1 of 3 shards failed: train/01: ")
    assert "Traceback" not in failed.stderr
    run = served.flow_run("pretrain-half")
    assert run["state_type"] == "FAILED"
    assert said.removeprefix("error: ") in run["state"]["message"]
    # The sound shards are done, and nothing was trained on what is left.
    manifests = (served.root / "data" / "half-corpus" / "blocks").rglob("manifest.json")
    assert len(list(manifests)) == 2
    (folder,) = (served.root / "runs").glob("half-*")
    assert [path.name for path in folder.iterdir()] == ["recipe.toml"]


def test_a_stopped_flow_stops_its_trainers_which_save(served: Any, tiny: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    flow = served.start("flows.pretrain", str(tiny), "--steps", "500000", "--processes", "2", log=log)
    served.wait_for("training", lambda: "step 4/500,000" in log.read_text(), 90, flow)
    (folder,) = (
        one for one in (served.root / "runs").glob("tiny-*") if "500000" in (one / "recipe.toml").read_text()
    )
    started = time.monotonic()
    flow.send_signal(signal.SIGTERM)
    flow.wait(60)
    assert time.monotonic() - started < 25
    assert not trainers(folder)
    assert list((folder / "checkpoints").glob("step-*"))
    assert served.flow_run("pretrain-tiny")["state_type"] == "CRASHED"


def trainers(folder: Path) -> list[str]:
    """Return the command lines of all processes that work in a run folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in command:
            found.append(command)
    return found


def test_the_night_compares_with_the_night_before(trained: Any) -> None:
    first = trained.run("flows.evaluate")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("tiny ") and "(first night)" in first.stdout
    history = trained.root / "runs" / "nightly.jsonl"
    (before,) = map(json.loads, history.read_text().splitlines())
    assert before["recipe"] == "tiny" and set(before["subsets"]) == {"cats", "dogs"}

    # A recipe that cannot be scored does not hide the others, and is not hidden by them.
    other = history.parent / "other-00000000"
    shutil.copytree(trained.root / Path(before["checkpoint"]).parents[1], other)
    recipe = other / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('val = [\n    "val",\n]', 'val = ["nowhere"]'))
    second = trained.run("flows.evaluate")
    shutil.rmtree(other)
    assert second.returncode == 2, second.stderr
    said = second.stderr.strip().splitlines()[-1]
    assert said.startswith("error: 1 of 2 recipes failed: other: ") and "nowhere" in said
    _, after = map(json.loads, history.read_text().splitlines())
    assert {**after, "time": ""} == {**before, "time": ""}
    page = trained.api("artifacts/filter", artifacts={"key": {"any_": ["nightly"]}}, sort="CREATED_DESC")[0]
    assert "+0.0000, same checkpoint |\n| other |  |  | failed |" in page["data"]


def test_a_night_before_the_first_run_is_no_failure(served: Any, tmp_path: Path) -> None:
    empty = served._replace(environment={**served.environment, "PILELINE_RUNS": str(tmp_path)})
    night = empty.run("flows.evaluate")
    assert (night.returncode, night.stdout) == (
        0,
        f"no checkpoint in {tmp_path} yet; run the flow pretrain first\n",
    )


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("OPTIONS", {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}, 400),
        ("POST", {"Origin": "http://evil.example", "Content-Type": "text/plain"}, 403),
    ],
)
def test_another_site_in_the_same_browser_is_refused(
    served: Any, method: str, headers: dict[str, str], status: int
) -> None:
    url = f"{served.address()}/flow_runs/filter"
    request = urllib.request.Request(url, b"{}" if method == "POST" else None, headers, method=method)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    refused.value.close()
    assert refused.value.code == status


def test_the_nightly_schedule_makes_runs(served: Any) -> None:
    """With SQLAlchemy 2.1, Prefect 3.8's scheduler fails in silence: this is the only way to notice."""

    def scheduled() -> Any:
        return [
            run
            for run in served.api("flow_runs/filter", flow_runs={"state": {"type": {"any_": ["SCHEDULED"]}}})
            if run["auto_scheduled"] and run["expected_start_time"][11:16] == "03:00"
        ]

    assert served.wait_for("a run at 03:00 UTC", scheduled, 75)
