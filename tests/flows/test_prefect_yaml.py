"""prefect.yaml says what is there: every entrypoint, parameter and recipe, under the names that are typed."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow
from prefect.utilities.importtools import import_object

from deployments import recipe as recipes

ROOT = Path(__file__).resolve().parents[2]
YAML = yaml.safe_load((ROOT / "prefect.yaml").read_text("utf-8"))
DEPLOYMENTS = {one["name"]: one for one in YAML["deployments"]}


def flow_of(deployment: dict[str, Any]) -> Flow[..., Any]:
    flow = import_object(deployment["entrypoint"])
    assert isinstance(flow, Flow)
    return flow


def test_the_names_that_are_typed() -> None:
    names = {f"{flow_of(one).name}/{name}" for name, one in DEPLOYMENTS.items()}
    assert names == {
        "pretrain/demo",
        "pretrain/tiny",
        "pretrain/13m",
        "pretrain/13m-gpt",
        "pretrain/13m-sp",
        "pretrain/llama-250m",
        "pretrain/2b",
        "pretrain/2b-gpt",
        "evaluate/nightly",
    }
    assert len(DEPLOYMENTS) == len(YAML["deployments"])


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_fits_its_flow(name: str) -> None:
    deployment = DEPLOYMENTS[name]
    flow = flow_of(deployment)
    module, _, function = deployment["entrypoint"].rpartition(".")
    assert (flow.fn.__module__, flow.fn.__name__) == (module, function)
    assert ":" not in deployment["entrypoint"]  # a path would put flows/ first on sys.path
    flow.validate_parameters(deployment.get("parameters", {}))
    assert deployment["work_pool"]["name"] == "pileline"
    assert deployment["concurrency_limit"]["limit"] == 1


@pytest.mark.parametrize(
    "name", [name for name, one in DEPLOYMENTS.items() if "recipe" in one.get("parameters", {})]
)
def test_a_pretrain_deployment_is_named_after_its_recipe(name: str) -> None:
    assert DEPLOYMENTS[name]["parameters"] == {"recipe": name}
    assert name in recipes.names()
    recipes.load(name)


def test_every_recipe_has_a_deployment() -> None:
    assert set(recipes.names()) == set(DEPLOYMENTS) - {"nightly"}


def test_the_night_is_scheduled_in_utc_and_never_twice() -> None:
    nightly = DEPLOYMENTS["nightly"]
    assert nightly["schedules"] == [{"cron": "0 3 * * *", "timezone": "UTC", "active": True}]
    assert nightly["concurrency_limit"]["collision_strategy"] == "CANCEL_NEW"
