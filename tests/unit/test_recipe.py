"""Recipes: shipped ones are sound, faults are told, missing data is listed before anything else happens."""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from delo_llava.config import check_tasks, core_config, dump_config
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
    path.write_text(
        yaml.safe_dump({"name": "mine", "tasks": [TASK] if tasks is None else tasks, **more}, sort_keys=False)
    )
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
    with pytest.raises(DeloError, match=r"did you mean coin[68]\?"):
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
    assert core_config({"task_seq": name}, recipe_defaults(name)).data.template == recipe.template
    assert recipe.builder or all(entry.obtain for entry in recipe.tasks)


ORDERS = {
    "coin6": "scienceqa textvqa imagenet gqa vqav2 ocrvqa",
    "coin8": "scienceqa textvqa imagenet gqa vizwiz grounding vqav2 ocrvqa",
    "coin_long10": "docvqa okvqa chartqa pathvqa aokvqa infovqa iconqa vizwiz clevr_math ai2d",
    "ucit": "imagenet_r arxivqa vizwiz_caption iconqa clevr_math flickr30k_caption",
    "mllm_acl": "ocr math_logic vp gui",
    "mllm_dcl": "rs med ad sci fin",
    "trigap": "pmcvqa docvqa chartqa iconqa infographicvqa arxivqa roadside chemvqa floodnetvqa clevr",
    "smolora_cvit": "scienceqa textvqa flickr30k imagenet gqa vqav2",
    "food101_cmml": " ".join(f"task{number}" for number in range(1, 11)),
    "mm_imdb_cmml": " ".join(f"task{number}" for number in range(1, 6)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_published_orders(name: str) -> None:
    assert [entry.name for entry in read_recipe(name).tasks] == ORDERS[name].split()


def test_published_settings_of_single_tasks_and_what_a_user_says_over_them() -> None:
    published = core_config({"task_seq": "mllm_dcl"}, recipe_defaults("mllm_dcl"))
    epochs = [published.for_task(name).train.epochs for name in ORDERS["mllm_dcl"].split()]
    assert (epochs, published.for_task("med").train.lr) == ([1, 3, 1, 2, 1], 2e-5)
    acl = core_config({}, recipe_defaults("mllm_acl"))
    trains = [acl.for_task(name).train for name in ORDERS["mllm_acl"].split()]
    assert [(t.epochs, t.lr, t.global_batch) for t in trains] == [
        (3, 5e-5, 16), (1, 2e-4, 16), (1, 2e-4, 16), (3, 2e-4, 16),
    ]  # fmt: skip
    coin = core_config({}, recipe_defaults("coin8"))
    batches = [coin.for_task(name).train.global_batch for name in ORDERS["coin8"].split()]
    assert batches == [896, 896, 1024, 384, 896, 384, 512, 640]
    told = core_config({"train": {"global_batch": 32}}, recipe_defaults("coin8"))
    assert {told.for_task(name).train.global_batch for name in ORDERS["coin8"].split()} == {32}
    one = core_config(
        {"train": {"epochs": 5}, "per_task": {"med": {"epochs": 9}}}, recipe_defaults("mllm_dcl")
    )
    assert [one.for_task(name).train.epochs for name in ("rs", "med", "sci")] == [5, 9, 5]
    again = core_config(yaml.safe_load(dump_config(told)))
    assert again.for_task("gqa").train.global_batch == 32, "the stored configuration says the same"


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
        "cl_dataset/TextVQA/TextVQA_0.5.1_val.json",
        *(f"{folder}/{task}/{name}.json" for task in tasks for name in ("train", test.get(task, "test"))),
    )
    images = ("ScienceQA", "TextVQA/train_images", "GQA/images", "COCO2014/train2014", "COCO2014/val2014")
    for place in (*images, "OCR-VQA/images"):
        (tmp_path / "cl_dataset" / place).mkdir(parents=True)
    sequence = load_sequence("coin6", tmp_path)
    assert all(folder in str(path) for task in sequence.tasks for path in task.files.values())
    assert {task.image_root for task in sequence.tasks} == {tmp_path / "cl_dataset"}


VARIANTS = {
    "templates": {"plain": ["plain", "old"], "many": {"folders": "many", "suffix": "_x2"}},
    "tasks": [
        TASK
        | {
            "files": {"train": "{template}/train{suffix}.json", "test": "{template}/test.json"},
            "image_root": ["pics", "."],
        }
    ],
}


def test_a_template_chooses_folders_and_names(tmp_path: Path) -> None:
    recipe, root = write(tmp_path, **VARIANTS), tmp_path / "d"
    fill(root, "old/train.json", "old/test.json", "many/train_x2.json", "many/test.json")
    plain, many = load_sequence(recipe, root), load_sequence(recipe, root, "many")
    assert (plain.template, many.template) == ("plain", "many")
    assert plain.tasks[0].files == {"train": root / "old/train.json", "test": root / "old/test.json"}
    assert many.tasks[0].files["train"] == root / "many/train_x2.json"
    assert plain.tasks[0].image_root == root
    (root / "pics").mkdir()
    assert load_sequence(recipe, root).tasks[0].image_root == root / "pics"
    assert recipe_defaults(recipe)["data"] == {"template": "plain"}


def test_an_unknown_template_is_answered_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(DeloError, match="did you mean many") as caught:
        load_sequence(write(tmp_path, **VARIANTS), tmp_path, "mony")
    assert "plain, many" in str(caught.value)
    with pytest.raises(DeloError, match="no template 'any'"):
        load_sequence(write(tmp_path), tmp_path, "any")
    with pytest.raises(DeloError, match="uses a template, but there are none"):
        load_sequence(write(tmp_path, VARIANTS["tasks"]), tmp_path)


SIDE = {"name": "hints", "file": ["a/hints.json", "hints.json"], "key": "id", "context": "hint"}


def test_an_optional_side_file_is_joined_or_said_and_a_required_one_demanded(tmp_path: Path) -> None:
    root = tmp_path / "d"
    fill(root, "one/train.json", "one/test.json")
    recipe = write(tmp_path, [TASK | {"sides": [SIDE]}])
    [task] = load_sequence(recipe, root).tasks
    assert (task.sides, len(task.absent)) == ((), 1)
    assert "hints (a/hints.json or hints.json): without it records lack context" in task.absent[0]
    demanded = write(tmp_path, [TASK | {"sides": [SIDE | {"required": True, "obtain": "from the attic"}]}])
    with pytest.raises(DeloError, match="one: a/hints.json or hints.json") as caught:
        load_sequence(demanded, root)
    assert "where to get one: from the attic" in str(caught.value)
    fill(root, "hints.json")
    [task] = load_sequence(demanded, root).tasks
    assert (task.sides[0].path, task.sides[0].key, task.absent) == (root / "hints.json", ("id",), ())


@pytest.mark.parametrize(
    ("side", "told"),
    [
        ({"key": []}, "needs a `key`"),
        ({"name": "test"}, "are no split's"),
        ({"context": None}, "nothing is taken"),
        ({"shape": "row"}, "list, map, keys"),
        ({"file": "../x.json"}, "stay inside"),
        ({"contex": "x"}, "did you mean context"),
    ],
)
def test_faults_of_side_files_are_told(tmp_path: Path, side: dict[str, Any], told: str) -> None:
    with pytest.raises(DeloError, match=told):
        read_recipe(write(tmp_path, [TASK | {"sides": [SIDE | side]}]))


@pytest.mark.parametrize(("word", "read"), [("off", False), ("~", None), ("'off'", "off"), ("7", "7")])
def test_words_that_yaml_takes_for_something_else_are_told_to_be_quoted(
    tmp_path: Path, word: str, read: Any
) -> None:
    file = Path(write(tmp_path, [TASK]))
    file.write_text(file.read_text().replace(f"name: {TASK['name']}", f"name: {word}"))
    if isinstance(read, str):
        assert read_recipe(str(file)).tasks[0].name == read
        return
    with pytest.raises(DeloError, match=r"`tasks\.0\.name`") as error:
        read_recipe(str(file))
    assert error.value.given == repr(read) and "in quotes" in str(error.value.fix)


def test_a_recipe_like_another_takes_and_changes_its_tasks(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    second = TASK | {"name": "two", "max_new_tokens": 3}
    base.write_text(
        yaml.safe_dump({"name": "base", "source": "S", "tasks": [TASK, second], "defaults": {"seed": 1}})
    )
    mine = read_recipe(
        write(
            tmp_path,
            ["two", {"name": "one", "kind": "other"}, TASK | {"name": "new"}],
            like=str(base),
            title="T",
        )
    )
    assert [entry.name for entry in mine.tasks] == ["two", "one", "new"]
    assert (mine.name, mine.title, mine.source, mine.defaults) == ("mine", "T", "S", {"seed": 1})
    assert (mine.tasks[0].max_new_tokens, mine.tasks[1].kind, mine.tasks[1].files) == (
        3,
        "other",
        mine.tasks[2].files,
    )
    with pytest.raises(DeloError, match="did you mean two"):
        read_recipe(write(tmp_path, ["tow"], like=str(base)))
    with pytest.raises(DeloError, match="is like itself"):
        read_recipe(write(tmp_path, like=str(tmp_path / "mine.yaml")))


def test_class_names_are_demanded_only_where_the_recipe_says_so(tmp_path: Path) -> None:
    fill(tmp_path / "d", "all.json")
    files = dict.fromkeys(("train", "test"), "all.json")
    classes = {"number": 0, "per_task": 2, "instruction": "Which?", "names": "classes.json"}
    optional = write(tmp_path, [TASK | {"files": files, "classes": classes}])
    [task] = load_sequence(optional, tmp_path / "d").tasks
    assert task.classes is not None and task.classes.names is None
    demanded = write(tmp_path, [TASK | {"files": files, "classes": classes | {"names_required": True}}])
    with pytest.raises(DeloError, match=r"one: classes\.json"):
        load_sequence(demanded, tmp_path / "d")
    fill(tmp_path / "d", "classes.json")
    [task] = load_sequence(demanded, tmp_path / "d").tasks
    assert task.beside == {"classes": tmp_path / "d/classes.json"}


def test_settings_of_a_task_that_does_not_exist_are_told(tmp_path: Path) -> None:
    recipe = write(tmp_path)
    config = core_config({"task_seq": recipe, "per_task": {"won": {"epochs": 2}}})
    with pytest.raises(DeloError, match="did you mean one"):
        check_tasks(config, ["one"])
    with pytest.raises(DeloError, match=r"per_task\.one\.epoch"):
        core_config({"task_seq": recipe, "per_task": {"one": {"epoch": 2}}})
