"""The flow's parameters change the recipe, or are refused in one line."""

import socket
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from corpora.errors import InputError
from flows import cli
from flows.pretrain import choose


def test_parameters_change_the_recipe() -> None:
    recipe = choose("demo", 1, 30, 1, 2, 4, {"train.lr": 0.5})
    assert (recipe.corpus.train, recipe.train.steps, recipe.train.lr) == (("train/00",), 30, 0.5)
    assert choose("demo", None, None, 1, 2, 4, None).corpus.train == ("train/00", "train/01")


def test_one_budget_takes_the_place_of_the_other() -> None:
    recipe = choose("llama-250m", None, 30, 1, 2, 4, None)  # which says tokens
    assert (recipe.train.steps, recipe.train.tokens) == (30, None)
    assert choose("llama-250m", None, None, 1, 2, 4, {"train.steps": 30}).train.last_step == 30
    recipe = choose("demo", None, None, 1, 2, 4, {"train.tokens": 4 * 255 * 70})  # which says steps
    assert (recipe.train.last_step, recipe.train.tokens) == (70, 4 * 255 * 70)
    with pytest.raises(InputError, match=r"leave one of them out"):
        choose("demo", None, 60, 1, 2, 4, {"train.tokens": 4 * 255 * 70})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (("nothing", None, None, 1, 2, 4, None), "recipe 'nothing' is unknown; known: 13m, "),
        (("demo", 3, None, 1, 2, 4, None), "shards is 3; recipe demo has 2 train shards"),
        (("demo", 0, None, 1, 2, 4, None), "shards is 0; recipe demo has 2 train shards"),
        (("demo", None, 0, 1, 2, 4, None), r"\[train\] steps: .*greater than or equal to 1"),
        (("demo", None, None, 0, 2, 4, None), "processes is 0; at least 1 is needed"),
        (("demo", None, None, 1, 0, 4, None), "workers is 0; at least 1 is needed"),
        (("demo", None, None, 1, 2, 0, None), "downloads is 0; at least 1 is needed"),
        (
            ("demo", None, None, 1, 2, 4, {"train.learning_rate": 1}),
            r"learning_rate: unknown key \(known: seed",
        ),
    ],
)
def test_parameters_that_make_no_sense(parameters: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        choose(*parameters)
    assert "\n" not in str(caught.value)


def test_a_server_that_does_not_answer_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:  # bound, not listening: nobody else can answer here
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/api"
        with temporary_settings({PREFECT_API_URL: url}):
            with cli.reachable_server():
                assert PREFECT_API_URL.value() is None
            assert PREFECT_API_URL.value() == url
    assert capsys.readouterr().out.startswith(f"no Prefect server answers at {url}; ")


def test_a_dotenv_of_the_user_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from deployments import serve

    path = tmp_path / ".env"
    with serve.dotenv("http://one/api", path):
        assert path.read_text().splitlines() == [serve.MARK, "PREFECT_API_URL=http://one/api"]
    assert not path.exists()
    path.write_text(f"{serve.MARK}\nPREFECT_API_URL=http://killed/api\n")
    with serve.dotenv("http://two/api", path):
        assert "http://two/api" in path.read_text()
    path.write_text("MINE=1\n")
    with serve.dotenv("http://three/api", path):
        pass
    assert path.read_text() == "MINE=1\n"
    assert "export PREFECT_API_URL=http://three/api" in capsys.readouterr().out
