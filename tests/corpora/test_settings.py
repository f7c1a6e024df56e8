"""What a recipe may say, and what the person who got it wrong is told."""

from pathlib import Path

import pytest

from corpora.errors import InputError
from corpora.settings import DataSettings, recipe_path

GOOD = """
[corpus]
name = "tiny"
train = ["a"]
val = ["v"]
[tokenizer]
name = "r50k_base"
[blocks]
length = 16
[model]
anything = "is not looked at"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_the_data_half_is_read_from_any_recipe(tmp_path: Path) -> None:
    settings = DataSettings.read(write(tmp_path, GOOD))
    assert (settings.corpus.train, settings.blocks.length, settings.tokenizer.bos) == (("a",), 16, None)
    assert DataSettings.read("demo").corpus.name == "demo"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "length = 16",
            "lenght = 16",
            r"\[blocks\] length: missing; \[blocks\] lenght: unknown key \(known: length, format, packer, part_bytes\)",
        ),
        (
            "length = 16",
            "length = 1",
            r"\[blocks\] length: Input should be greater than or equal to 2 \(got 1\)",
        ),
        (
            "[blocks]",
            "[tokenizer.train]\nbytez = 5\n[blocks]",
            r"\[tokenizer.train\] bytez: unknown key \(known: vocab, bytes\)",
        ),
        ('name = "tiny"', 'name = "../tiny"', r"\[corpus\] name: .* \(got '../tiny'\)"),
        ('val = ["v"]', 'val = ["a"]', r"corpus: shard 'a' is listed twice"),
        ('name = "r50k_base"', "", r'tokenizer: kind = "tiktoken" needs a name'),
        ("[blocks]", "[blocks", "not valid TOML"),
        ("[blocks]\nlength = 16", "", "blocks: missing"),
    ],
)
def test_faults_are_named(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in GOOD
    with pytest.raises(InputError, match=rf"mine\.toml: {message}"):
        DataSettings.read(write(tmp_path, GOOD.replace(before, after)))


def test_an_unknown_recipe_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="'13M' is unknown; known: 13m, 13m-gpt, 13m-sp, 2b, 2b-gpt, demo, llama-250m, tiny"
    ):
        recipe_path("13M")
    with pytest.raises(InputError, match="no such file"):
        recipe_path(tmp_path / "none.toml")


def test_lock_and_model_lie_beside_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "sub" / "mine.toml"
    recipe.parent.mkdir()
    recipe.write_text(
        '[corpus]\nname = "mine"\ntrain = ["a"]\nval = ["b"]\nlock = "mine.lock.json"\n'
        '[tokenizer]\nkind = "sentencepiece"\nmodel = "../own.model"\n[blocks]\nlength = 8\n'
    )
    settings = DataSettings.read(recipe)
    assert settings.corpus.lock == recipe.parent / "mine.lock.json"
    assert settings.tokenizer.model is not None
    assert settings.tokenizer.model.resolve() == tmp_path / "own.model"
    recipe.write_text(recipe.read_text().replace("mine.lock.json", "/data/mine.lock.json"))
    assert DataSettings.read(recipe).corpus.lock == Path("/data/mine.lock.json")
