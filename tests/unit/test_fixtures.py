"""Fixtures: every recipe reads its own, answers score as right, batches can be built from them."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from delo_eval.scorers.base import Reference, Scorer
from delo_llava.backbones.base import find_backbone
from delo_llava.data.collate import IGNORE, Collator
from delo_llava.data.readers import read_records, stream_records
from delo_llava.data.recipe import load_sequence, load_task
from delo_llava.errors import DeloError
from delo_llava.mini.build import ensure_mini6
from delo_llava.mini.fixtures import FIXTURES, write_fixture
from delo_llava.registry import load_plugin, plugin_names
from delo_llava.tasks import TaskSpec

RECORDS = 12


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mini6."""
    return ensure_mini6(tmp_path_factory.mktemp("mini"), {"train": 32, "val": 1, "test": 12})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELO_LLAVA_CACHE", str(tmp_path / "cache"))


def test_every_recipe_that_needs_data_has_a_fixture() -> None:
    paths = [load_plugin("recipe", name) for name in plugin_names("recipe")]
    needing = {path.stem for path in paths if isinstance(path, Path) and "\nbuilder:" not in path.read_text()}
    assert {*FIXTURES} == needing


@pytest.mark.parametrize("name", FIXTURES)
def test_a_recipe_reads_its_fixture(name: str, mini: Path, tmp_path: Path) -> None:
    sequence = load_sequence(name, write_fixture(name, tmp_path / "data", RECORDS, mini))
    backbone, path = find_backbone("mini-llava")
    collator = Collator(backbone, backbone.load_processor(path), 512)
    for task in sequence.tasks:
        for split in task.files:
            records = read_records(task, split)
            assert list(records) == list(stream_records(task, split))
            assert all(record.image is None or record.image.is_file() for record in records)
            batch = collator([(record, (True, True)) for record in records[:3]])
            assert batch.labels is not None and (batch.labels != IGNORE).any(1).all()
            if split == "test":
                _answers_are_right(task, list(records))


def _answers_are_right(task: TaskSpec, records: list[Any]) -> None:
    """The reference answers score full marks by the task's scorer, and other answers do not."""
    scorer = load_plugin("scorer", task.scorer)
    assert isinstance(scorer, Scorer)
    references = [Reference.of(record) for record in records]
    for key in scorer.needs:
        there = (any(name in record.extra for name in key.split("|")) for record in records)
        assert all(there), f"{task.name}: {task.scorer} needs {key}"
    right = [scorer(record.answer, ref) for record, ref in zip(records, references, strict=True)]
    wrong = [scorer("something else altogether", ref) for ref in references]
    if task.scorer != "caption":  # no caption is like all others
        assert min(right) > 0.89, task.name  # one of TextVQA's ten answers is another
        assert max(wrong) < 0.5, task.name
    assert sum(right) > sum(wrong)


def test_scienceqa_has_records_without_image_and_gqa_several_turns(mini: Path, tmp_path: Path) -> None:
    tasks = {
        t.name: t for t in load_sequence("coin6", write_fixture("coin6", tmp_path / "d", RECORDS, mini)).tasks
    }
    science = read_records(tasks["scienceqa"], "train")
    assert [record.image is None for record in science] == [n % 5 == 4 for n in range(RECORDS)]
    assert science[0].context is not None and science[0].context.startswith("Hint: ")
    assert science[0].extra["choices"][science[0].extra["answer_index"]] in science[0].instruction
    gqa = read_records(tasks["gqa"], "train")
    assert (len(gqa), gqa.conversations) == (3 * RECORDS, RECORDS)
    assert not any(task.absent for task in tasks.values()), "all optional side files are there"


def test_templates_differ_in_their_wording_only(mini: Path, tmp_path: Path) -> None:
    root = write_fixture("coin6", tmp_path / "d", RECORDS, mini)
    asked: dict[str, list[str]] = {}
    for template in ("original", "diverse", "10type"):
        task = load_sequence("coin6", root, template).tasks[2]
        asked[template] = [record.instruction for record in read_records(task, "train")]
    firsts = [[text.partition("\n")[0] for text in texts] for texts in asked.values()]
    assert firsts[0] == firsts[1] == firsts[2]
    wordings = {template: {text.partition("\n")[2] for text in texts} for template, texts in asked.items()}
    assert {template: len(found) for template, found in wordings.items()} == {
        "original": 1,
        "diverse": 1,
        "10type": 10,
    }


def test_without_optional_side_files_a_recipe_still_reads_and_says_so(mini: Path, tmp_path: Path) -> None:
    root = write_fixture("coin6", tmp_path / "d", RECORDS, mini)
    for path in (root / "cl_dataset").rglob("*.json"):
        if path.name != "TextVQA_0.5.1_val.json":
            path.unlink()
    tasks = load_sequence("coin6", root).tasks
    assert [len(task.absent) for task in tasks] == [2, 2, 0, 1, 3, 0]
    assert all(record.context is None for task in tasks for record in read_records(task, "test"))
    (root / "cl_dataset/TextVQA/TextVQA_0.5.1_val.json").unlink()
    with pytest.raises(DeloError, match=r"textvqa: cl_dataset/TextVQA/TextVQA_0\.5\.1_val\.json"):
        load_sequence("coin6", root)


def test_the_val_names_of_coin_and_the_layout_of_its_sibling(mini: Path, tmp_path: Path) -> None:
    """CoIN-ASD calls every val.json test.json and keeps everything in annotations/."""
    root = write_fixture("coin8", tmp_path / "d", RECORDS, mini)
    before = [list(read_records(task, "test")) for task in load_sequence("coin8", root).tasks]
    (root / "Instructions_Original").rename(root / "annotations")
    for path in (root / "annotations").glob("*/val.json"):
        path.rename(path.with_name("test.json"))
    for path in (root / "annotations").glob("*/train.json"):
        (path.with_name("train_x20.json")).write_text(json.dumps(json.loads(path.read_text())[:5]))
    assert [list(read_records(task, "test")) for task in load_sequence("coin8", root).tasks] == before
    mixed = load_sequence("coin8", root, "asd_x20").tasks
    assert [read_records(task, "train").conversations for task in mixed] == [5] * 8


def test_mllm_acl_has_folders_of_its_own_for_the_test(mini: Path, tmp_path: Path) -> None:
    root = write_fixture("mllm_acl", tmp_path / "d", RECORDS, mini)
    vp = load_sequence("mllm_acl", root).tasks[2]
    train, test = read_records(vp, "train")[0], read_records(vp, "test")[0]
    assert train.image == root / "MLLM-CL/VP/images/000000.jpg"
    assert test.image == root / "MLLM-CL/CV-Benchv2/images/t00000.jpg"
    (root / "MLLM-CL/CV-Benchv2").rename(root / "MLLM-CL/VP_test")
    again = load_sequence("mllm_acl", root).tasks[2]
    assert read_records(again, "test")[0].image == root / "MLLM-CL/VP_test/images/t00000.jpg"
    assert load_task("mllm_acl", "gui", "train", root).split_roots == {}
    for path in (root / "MLLM-CL/APP_test").rglob("*.jpg"):
        path.unlink()
    (root / "MLLM-CL/APP_test/images").rmdir()
    (root / "MLLM-CL/APP_test/test.json").unlink()
    (root / "MLLM-CL/APP_test").rmdir()
    with pytest.raises(DeloError, match=r"(?s)gui: MLLM-CL/APP_test/test\.json.*gui: MLLM-CL/APP_test/"):
        load_sequence("mllm_acl", root)


@pytest.mark.parametrize(
    ("folder", "task", "told"), [("APP_test", 3, "server"), ("Math_test", 1, "MathVista")]
)
def test_where_mllm_acl_has_no_answers_the_user_is_asked(
    folder: str, task: int, told: str, mini: Path, tmp_path: Path
) -> None:
    root = write_fixture("mllm_acl", tmp_path / "d", RECORDS, mini)
    path = root / "MLLM-CL" / folder / "test.json"
    path.write_text(json.dumps([e | {"answer": None} for e in json.loads(path.read_text())]))
    with pytest.raises(DeloError, match=rf"(?s)there is no answer.*{told}.*`answer`"):
        read_records(load_sequence("mllm_acl", root).tasks[task], "test")


@pytest.mark.parametrize(
    ("recipe", "records", "told"),
    [("mini6", 8, "no fixture"), ("coin7", 8, "did you mean"), ("ucit", 2, "4 to 1000")],
)
def test_impossible_fixtures_are_told(recipe: str, records: int, told: str, tmp_path: Path) -> None:
    with pytest.raises(DeloError, match=told):
        write_fixture(recipe, tmp_path / "d", records)


def test_a_folder_with_something_in_it_is_left_alone(mini: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(DeloError, match="is not empty"):
        write_fixture("ucit", tmp_path, 8, mini)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


class Stop(Exception):
    """Ends a run after a stage, as a killed process would."""


def words(recipe: str, root: Path, output: Path, *more: str) -> list[str]:
    """A command line for a short run on mini-llava in one process."""
    return [
        f"--task_seq={recipe}",
        f"--data.root={root}",
        f"--output={output}",
        "--model=mini-llava",
        "--method=lora",
        "--lora.rank=2",
        "--zero=none",
        "--quant=none",
        "--device=cpu",
        "--train.global_batch=4",
        "--train.micro_batch=4",
        "--train.gradient_checkpointing=false",
        "--train.max_steps=1",
        "--eval.limit=2",
        "--eval.last_patterns=[run]",
        "--eval.oracle=false",
        *more,
    ]


@pytest.mark.slow
def test_coin6_trains_evaluates_and_resumes(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All six tasks, stopped after the second stage; the same command goes on and keeps what is there."""
    from delo_llava.cli import main_train, resolve
    from delo_llava.runs.job import make_job
    from delo_llava.runs.sequence import run_sequence

    evaluate_stage = importlib.import_module("delo_eval.harness.run").evaluate_stage
    root = write_fixture("coin6", tmp_path / "d", RECORDS, mini)
    run = words("coin6", root, tmp_path / "run")

    def stopping(folder: Path, stage: int) -> None:
        if stage == 2:
            raise Stop
        evaluate_stage(folder, stage)

    with pytest.raises(Stop):
        run_sequence(make_job(resolve(run)), stopping)
    before = {path: path.read_bytes() for path in (tmp_path / "run/adapters").rglob("*.safetensors")}
    assert {path.parent.name for path in before} == {"scienceqa", "textvqa", "imagenet"}
    assert main_train(run) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert len(list((tmp_path / "run/adapters").iterdir())) == 6
    assert [len([score for score in row if score is not None]) for row in results["matrix"]["matched"]] == [
        2, 3, 4, 5, 6, 6,
    ]  # fmt: skip
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["template"] == "original"
    assert record["side_files"]["textvqa"]["joined"][0] == "ten human answers"
    assert "ten human answers" in record["data_hashes"]["textvqa"]
    with pytest.raises(SystemExit):
        main_train([*run, "--data.template=diverse"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mllm_dcl", "mm_imdb_cmml", "mllm_acl", "trigap"])
def test_other_recipes_run(name: str, mini: Path, tmp_path: Path) -> None:
    from delo_llava.cli import main_train

    root = write_fixture(name, tmp_path / "d", 4, mini)
    assert main_train([*words(name, root, tmp_path / "run"), "--train.max_steps=null"]) == 0
    stages = json.loads((tmp_path / "run/run.json").read_text())["stages"]
    steps = {task: stage["steps"] for task, stage in stages.items()}
    published = {
        "mllm_dcl": {"rs": 1, "med": 3, "ad": 1, "sci": 2, "fin": 1},
        "mllm_acl": {"ocr": 3, "math_logic": 1, "vp": 1, "gui": 3},
    }
    assert steps == published.get(name, dict.fromkeys(steps, 1)), "epochs of single tasks"
