"""Tasks kept aside: asked of the base and after stages, beside the run's own numbers and never among them."""

import json
from pathlib import Path
from typing import Any

import comparison_support as fake
import pytest
import tiny_models
import training_support as support
from rich.console import Console

from delo_eval.answers.question import Answer
from delo_eval.compare.benchmark import lacks_general, write_page
from delo_eval.harness import stage as stage_module
from delo_eval.harness.generate import Answerer
from delo_eval.harness.run import main
from delo_eval.harness.stage import evaluate_stage
from delo_eval.matrix.general import general_line
from delo_eval.matrix.table import final_table
from delo_llava.cluster.benchmark import Benchmark, entries
from delo_llava.config import RunConfig, load_config
from delo_llava.data.readers import read_records
from delo_llava.data.recipe import load_general, read_recipe
from delo_llava.errors import DeloError
from delo_llava.mini.build import ensure_aside
from delo_llava.runs.job import make_job
from delo_llava.runs.sequence import run_sequence

ASIDE = ("aside0", "aside1")
DELO = ("--method=delo", "--delo.pool_size=4", "--delo.rank=2", "--delo.latent=8")


def sequence(folder: Path) -> Path:
    """Two tasks to learn and two kept aside, each of which has a test file only."""
    recipe = support.write_sequence(folder, records=8)
    content = json.loads(recipe.read_text())
    content["general"] = []
    for number, name in enumerate(ASIDE):
        rows = json.loads((folder / f"task{number}_test.json").read_text())
        (folder / f"{name}.json").write_text(json.dumps(rows * (number + 1)))
        content["general"].append({"name": name, "kind": "colour", "files": {"test": f"{name}.json"}})
    recipe.write_text(json.dumps(content))
    return recipe


def train(folder: Path, name: str, *words: str, recipe: Path | None = None) -> Path:
    recipe = recipe or folder / "tiny.yaml"
    given = support.words(recipe, tiny_models.session("llava"), folder / name, "--train.max_steps=2", *words)
    run_sequence(make_job(load_config(None, given)), evaluate_stage)
    return folder / name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of three methods, with and without what is kept aside."""
    folder = tmp_path_factory.mktemp("general")
    sequence(folder)
    train(folder, "plain", *DELO)
    train(folder, "asked", *DELO, "--eval.general=true")
    train(folder, "every", "--eval.general=true", "--eval.general_stages=all")
    train(folder, "told", "--method=individual", "--eval.general=true")
    return folder


def results(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found


def written(run: Path) -> dict[str, bytes]:
    files = [*(run / "predictions").rglob("*.jsonl"), *(run / "adapters").rglob("*.safetensors")]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def test_asking_changes_nothing_of_the_run_s_own(place: Path) -> None:
    plain, asked = (results(place / name) for name in ("plain", "asked"))
    assert "general" not in plain and not (place / "plain/eval-general").exists()
    assert asked.pop("general")
    for found in (plain, asked):
        found.pop("seconds")
    assert plain == asked
    assert written(place / "plain") == written(place / "asked")


def test_the_base_and_the_last_stage_are_asked_and_all_where_that_is_wanted(place: Path) -> None:
    found = results(place / "asked")["general"]
    assert list(found["stages"]) == ["zero_shot", "1"]
    assert list(results(place / "every")["general"]["stages"]) == ["zero_shot", "0", "1"]
    for row in found["stages"].values():
        assert [cell["records"] for cell in row.values()] == [4, 8]
        assert {cell["scorer"] for cell in row.values()} == {"exact_match.v2"}
    scores = [cell["score"] for cell in found["stages"]["1"].values()]
    assert found["last"] == pytest.approx(sum(scores) / 2)
    assert found["change"] == pytest.approx(found["last"] - found["base"])
    rows = (place / "asked/eval-general/predictions/1/complete/aside1.jsonl").read_text().splitlines()
    assert sum(json.loads(row)["score"] for row in rows) / 8 * 100 == pytest.approx(scores[1])
    assert all(json.loads(row)["presence"] == {"image": True, "text": True} for row in rows)


def test_a_method_that_chooses_answers_as_a_task_that_it_learned(place: Path) -> None:
    stages = results(place / "asked")["general"]["stages"]
    for name in ASIDE:
        assert stages["zero_shot"][name]["chosen"] is None
        chosen = stages["1"][name]["chosen"]
        assert set(chosen) <= {"task0", "task1"} and sum(chosen.values()) == pytest.approx(1)
    assert all(cell["chosen"] is None for cell in results(place / "every")["general"]["stages"]["1"].values())


def test_a_method_that_needs_the_true_task_is_asked_before_training_only(place: Path) -> None:
    found = results(place / "told")["general"]
    assert list(found["stages"]) == ["zero_shot"] and found["last"] is None and found["change"] is None
    assert "→ –" in general_line(results(place / "told"))


def test_terminal_and_report_show_it(place: Path) -> None:
    console = Console(width=200, record=True)
    for name, there in (("asked", True), ("plain", False)):
        console.print(final_table(results(place / name)))
        assert ("general ability, base → last stage:" in console.export_text()) is there
        assert ("General ability" in (place / name / "report.html").read_text()) is there


def test_stored_runs_are_asked_later_and_only_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(place, "later", *DELO)
    before = written(run)
    for stage in ("zero-shot", "last"):
        assert main(["--run", str(run), "--stage", stage, "--general"]) == 0
    assert results(run)["general"] == results(place / "asked")["general"]
    assert written(run) == before

    def loaded(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(stage_module, "answerer", loaded)
    assert main(["--run", str(run), "--stage", "last", "--general"]) == 0
    assert main(["--run", str(run), "--stage", "last"]) == 0
    assert results(run)["general"] == results(place / "asked")["general"], "what was asked stays"
    (run / "eval-general/1.json").unlink()
    assert main(["--run", str(run), "--stage", "last", "--general"]) == 0
    assert results(run)["general"] == results(place / "asked")["general"], "scored again, not answered again"


def test_a_killed_evaluation_goes_on_where_it_was(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(place, "killed", *DELO, "--eval.batch_size=2")
    plain, sizes = Answerer.answer, []

    def counted(self: Answerer, questions: Any, tokens: int) -> list[Answer]:
        sizes.append(len(questions))
        if len(sizes) == 4:
            raise MemoryError("killed")
        return plain(self, questions, tokens)

    monkeypatch.setattr(Answerer, "answer", counted)
    with pytest.raises(MemoryError):
        main(["--run", str(run), "--stage", "last", "--general"])
    assert "general" not in results(run)
    assert main(["--run", str(run), "--stage", "last", "--general"]) == 0
    assert sum(sizes) == 12 + 2, "no question twice but those of the batch in which it died"
    own = results(run)["general"]["stages"]["1"]
    assert own == results(place / "asked")["general"]["stages"]["1"]


def test_scores_of_other_adapters_are_not_shown(place: Path) -> None:
    run = train(place, "changed")
    for stage in ("zero-shot", "last"):
        assert main(["--run", str(run), "--stage", stage, "--general"]) == 0
    file = run / "eval-general/1.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"adapters": ["0" * 64, "1" * 64]}))
    assert list(results(run)["general"]["stages"]) == ["zero_shot", "1"]
    assert main(["--run", str(run), "--stage", "last", "--patterns", "run"]) == 0
    assert list(results(run)["general"]["stages"]) == ["zero_shot"]


def test_a_recipe_that_keeps_nothing_aside_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    recipe = support.write_sequence(tmp_path)
    words = support.words(recipe, tmp_path / "no-model", tmp_path / "run", "--eval.general=true")
    with pytest.raises(DeloError, match="keeps no task aside"):
        make_job(load_config(None, words))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": "task0"}, "not unique"),
        ({"files": {"train": "aside0.json"}}, "names no test file"),
        ({"scorer": "exact_mach"}, "no such scorer"),
    ],
)
def test_mistakes_in_what_is_kept_aside_are_told(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    recipe = sequence(tmp_path)
    content = json.loads(recipe.read_text())
    content["general"][0] |= change
    recipe.write_text(json.dumps(content))
    with pytest.raises(DeloError, match=told):
        read_recipe(str(recipe))


def test_missing_files_of_what_is_kept_aside_stop_only_who_asks_for_it(tmp_path: Path) -> None:
    recipe = sequence(tmp_path)
    (tmp_path / "aside1.json").unlink()
    words = support.words(recipe, tiny_models.session("llava"), tmp_path / "run")
    make_job(load_config(None, words))
    with pytest.raises(DeloError, match=r"aside1: aside1\.json"):
        make_job(load_config(None, [*words, "--eval.general=true"]))


def test_mini6_keeps_aside_what_its_base_can_do(tmp_path: Path) -> None:
    """Of test entities, with the wordings of pretraining, which no task of mini6 asks in."""
    root = ensure_aside(tmp_path, {"test": 60})
    assert (root.name, json.loads((root / "manifest.json").read_text())["version"]) == ("mini-aside-v1",) * 2
    for recipe in ("mini6", "mini8"):
        numerals, notes = load_general(recipe, tmp_path)
        assert [task.name for task in (numerals, notes)] == ["numerals", "notes"]
    seen, told = (list(read_records(task, "test")) for task in (numerals, notes))
    assert all(record.image is not None and record.answer not in (record.context or "") for record in seen)
    assert all(record.image is None and record.answer in (record.context or "") for record in told)
    assert len({record.instruction for record in seen}) == 4
    assert not {"numerals", "notes"} & {task.name for task in read_recipe("mini8").tasks}


def test_the_benchmark_s_page_has_a_table_of_it(tmp_path: Path) -> None:
    plan = Benchmark("mini6", entries(["delo", "lora"]), [0, 1], ["complete"], tmp_path)
    for method, last in (("delo", 90.0), ("lora", 40.0)):
        for seed in (0, 1):
            run = plan.run(entries([method])[0], "complete", seed, 1)
            cell = {"standard_error": 1.0, "records": 4, "scorer": "s", "majority": 10.0, "chosen": None}
            stages = {
                stage: {"numerals": {"score": score, **cell}}
                for stage, score in (("zero_shot", 92.0), ("1", last + seed))
            }
            general = {"pattern": "complete", "stages": stages, "base": 92.0, "last": last + seed}
            fake.write_run(
                run.folder, fake.outcomes((0.5, 0.5), seed), config=RunConfig(method=method, seed=seed),
                facts={"general": general | {"change": last + seed - 92.0}},
            )  # fmt: skip
            (run.folder / "complete.json").write_text("{}")
            assert not lacks_general(run, "last") and not lacks_general(run, "zero-shot")
    write_page(plan, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "### General ability, %" in text
    assert "| lora | 92.00 ± 0.00 | 40.50 ± 0.71 | -51.50 ± 0.71 |" in text
    fake.write_run(run.folder, fake.outcomes((0.5, 0.5)), config=RunConfig(method="lora", seed=1))
    assert lacks_general(run, "last") and lacks_general(run, "zero-shot")
    write_page(plan, tmp_path / "page.md")
    assert "| lora | 92.00" not in (tmp_path / "page.md").read_text(), "one seed was not asked"
