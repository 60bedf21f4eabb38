"""Recipes: shipped ones are sound, faults are told, missing data is listed before anything else happens."""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from delo_llava.data import recipe as recipe_module
from delo_llava.data.recipe import DATA_ENV, load_sequence, read_recipe, recipe_defaults
from delo_llava.errors import DeloError
from delo_llava.registry import plugin_names

TASK = {
    "name": "one",
    "kind": "vqa",
    "files": {"train": "one/train.json", "test": ["one/val.json", "one/test.json"]},
}


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(DATA_ENV, raising=False)
    monkeypatch.chdir(tmp_path)


def write(folder: Path, tasks: list[dict[str, Any]] | None = None, **more: Any) -> str:
    """A recipe file with one task unless told otherwise; returns its path."""
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "tasks": [TASK] if tasks is None else tasks, **more}))
    return str(path)


def fill(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("[]")


def test_a_complete_sequence(tmp_path: Path) -> None:
    fill(tmp_path / "d", "one/train.json", "one/test.json")
    sequence = load_sequence(write(tmp_path, title="Mine", defaults={"seed": 3}), tmp_path / "d")
    [task] = sequence.tasks
    assert (sequence.name, sequence.title, sequence.names, sequence.defaults) == (
        "mine",
        "Mine",
        ["one"],
        {"seed": 3},
    )
    assert task.files == {"train": tmp_path / "d/one/train.json", "test": tmp_path / "d/one/test.json"}
    assert (task.image_root, task.scorer, task.max_new_tokens) == (tmp_path / "d", "exact_match", 8)


def test_the_first_accepted_name_wins(tmp_path: Path) -> None:
    fill(tmp_path / "d", "one/train.json", "one/test.json", "one/val.json")
    assert load_sequence(write(tmp_path), tmp_path / "d").tasks[0].files["test"].name == "val.json"


def test_the_root_is_argument_then_environment_then_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)
    for place in ("data/mine", "env", "arg"):
        fill(tmp_path / place, "one/train.json", "one/test.json")

    def root(given: Path | None = None) -> Path:
        return load_sequence(path, given).tasks[0].image_root

    assert root() == tmp_path / "data/mine"
    monkeypatch.setenv(DATA_ENV, str(tmp_path / "env"))
    assert root() == tmp_path / "env"
    assert root(Path("arg")) == tmp_path / "arg"


def test_missing_data_lists_everything_and_the_check(tmp_path: Path) -> None:
    second = TASK | {
        "name": "two",
        "image_root": "pictures",
        "images": ["a", "b"],
        "obtain": "from the archive",
    }
    fill(tmp_path / "d", "one/train.json", "pictures/a/x.png")
    with pytest.raises(DeloError) as caught:
        load_sequence(write(tmp_path, [TASK, second]), tmp_path / "d")
    text = str(caught.value)
    for part in (
        f"below {tmp_path / 'd'}",
        "one: one/val.json or one/test.json",
        "two: pictures/b/",
        "where to get two: from the archive",
        f"delo-llava data check {tmp_path / 'mine.yaml'} --root {tmp_path / 'd'}",
        DATA_ENV,
    ):
        assert part in text
    assert "one: one/train.json" not in text
    assert "pictures/a" not in text


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        ([], "`tasks`"),
        ([TASK, TASK], "not unique"),
        ([TASK | {"name": "../x"}], r"`tasks\.0\.name`"),
        ([TASK | {"scorer": "exact_mach"}], r"did you mean exact_match\?"),
        ([TASK | {"files": {"train": "a.json"}}], "names no test file"),
        ([TASK | {"files": {"train": "a.json", "test": []}}], r"files\.test"),
        ([TASK | {"files": TASK["files"] | {"dev": "a.json"}}], "did you mean|files"),  # type: ignore[operator]
        ([TASK | {"files": {"train": "/a.json", "test": "b.json"}}], "relative to the data root"),
        ([TASK | {"image_root": "../.."}], "stay inside"),
        ([TASK | {"knd": "x"}], r"did you mean kind\?"),
    ],
)
def test_faults_in_a_recipe_are_told(tmp_path: Path, tasks: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(DeloError, match=told) as caught:
        read_recipe(write(tmp_path, tasks))
    assert "mine.yaml" in str(caught.value)


def test_unknown_names_and_files_are_told() -> None:
    with pytest.raises(DeloError, match=r"did you mean coin6\?"):
        load_sequence("coin7")
    with pytest.raises(DeloError, match="no such YAML file"):
        load_sequence("some/where.yaml")


def test_a_builder_gives_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "built", "one/train.json", "one/test.json")
    asked: list[Path | None] = []

    def ensure(root: Path | None = None) -> Path:
        asked.append(root)
        return tmp_path / "built"

    monkeypatch.setattr(
        recipe_module.importlib, "import_module", lambda name: type("M", (), {"ensure_mini6": ensure})
    )
    monkeypatch.setenv(DATA_ENV, "/some/other/data")
    assert load_sequence(write(tmp_path, builder="mini6")).tasks[0].image_root == tmp_path / "built"
    assert asked == [None], "the environment's folder is for data the user provides"
    load_sequence(write(tmp_path, builder="mini6"), Path("mine"))
    assert asked == [None, Path("mine")]


@pytest.mark.parametrize("name", plugin_names("recipe"))
def test_shipped_recipes_are_sound(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.name == name
    assert recipe.title and recipe.source and recipe.licence
    assert recipe.defaults.items() <= recipe_defaults(name).items()
    assert recipe.builder or all(entry.obtain for entry in recipe.tasks)


def test_coin6_is_the_published_order() -> None:
    names = [entry.name for entry in read_recipe("coin6").tasks]
    assert names == ["scienceqa", "textvqa", "imagenet", "gqa", "vqav2", "ocrvqa"]


def test_coin6_without_data_stops_at_once_and_names_every_file() -> None:
    start = time.perf_counter()
    with pytest.raises(DeloError) as caught:
        load_sequence("coin6")
    assert time.perf_counter() - start < 1.0
    text = str(caught.value)
    for folder in ("ScienceQA", "TextVQA", "ImageNet", "GQA", "VQAv2", "OCRVQA"):
        assert f"Instructions_Original/{folder}/train.json" in text
    assert "cl_dataset/COCO2014/train2014/" in text
    assert "delo-llava data check coin6" in text


@pytest.mark.parametrize(
    ("folder", "test"), [("Instructions_Original", {"TextVQA": "val", "VQAv2": "val"}), ("annotations", {})]
)
def test_coin6_accepts_the_layouts_of_coin_and_coin_asd(
    tmp_path: Path, folder: str, test: dict[str, str]
) -> None:
    tasks = ("ScienceQA", "TextVQA", "ImageNet", "GQA", "VQAv2", "OCRVQA")
    fill(
        tmp_path,
        *(f"{folder}/{task}/{name}.json" for task in tasks for name in ("train", test.get(task, "test"))),
    )
    images = ("ScienceQA", "TextVQA/train_images", "GQA/images", "COCO2014/train2014", "COCO2014/val2014")
    for place in (*images, "OCR-VQA/images"):
        (tmp_path / "cl_dataset" / place).mkdir(parents=True)
    sequence = load_sequence("coin6", tmp_path)
    assert all(folder in str(path) for task in sequence.tasks for path in task.files.values())
    assert {task.image_root for task in sequence.tasks} == {tmp_path / "cl_dataset"}
