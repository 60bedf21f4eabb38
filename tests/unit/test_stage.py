"""A stored run of three tasks on the tiny LLaVA: cells, modes, ranks, other splits, the command."""

import json
import shutil
from pathlib import Path
from typing import cast

import pytest
import tiny_models
import torch
import yaml
from run_support import TASKS, Alone, Blind, Chooser, little_recipe, make_run, predictions  # noqa: F401

from delo_eval.cli import main
from delo_eval.compare.assemble import compare
from delo_eval.harness import model as model_module
from delo_eval.harness import stage as stage_module
from delo_eval.harness.folder import Request
from delo_eval.harness.model import open_run
from delo_eval.harness.ranks import current_ranks
from delo_eval.harness.run import evaluate_stage
from delo_eval.scorers.base import Reference, Scorer
from delo_llava.errors import DeloError
from delo_llava.files import sha256_file
from delo_llava.methods.individual import Individual
from delo_llava.methods.lora import Lora
from delo_llava.registry import load_plugin
from delo_llava.runs.manifest import MANIFEST, write_manifest
from delo_llava.runs.store import BASE


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    folder = make_run(tmp_path_factory.mktemp("lora") / "run", recipe, "lora", Lora, 3)
    for stage in (-1, 0, 1, 2):
        assert evaluate_stage(folder, stage) is not None
    return folder


def test_lora_has_all_cells_and_the_same_numbers_in_both_modes(lora_run: Path) -> None:
    found = json.loads((lora_run / "results.json").read_text())
    grid = found["matrix"]["matched"]
    assert [[score is not None for score in row] for row in grid] == [
        [True, True, False],
        [True] * 3,
        [True] * 3,
    ]
    assert found["matrix"]["oracle"] == grid and found["modes"] == ["matched", "oracle"]
    assert found["task_choice"] is None and found["task_choice_accuracy"] is None
    assert None not in found["zero_shot"]["run"] and found["metrics"]["matched"]["fwt"] is not None
    assert set(found["patterns"]) == {"complete", "image", "text"}
    assert (
        found["patterns"]["image"]["matched"][0] == [None] * 3
        and None not in found["patterns"]["image"]["matched"][2]
    )
    assert found["missing"]["effective"]["run"]["words"]["lost_image"] == 2
    assert found["missing"]["effective"]["text"]["words"]["text_ratio"] == 1.0
    assert found["records"]["run"] == dict.fromkeys(TASKS, 9)
    assert found["trainable_parameters_per_task"] == {"shapes": 10, "words": 11, "places": 12}
    base = json.loads((lora_run / "run.json").read_text())["base"]
    assert found["start_weights"] == {"name": str(tiny_models.session("llava")), "sha256": base["sha256"]}
    assert found["differs"] == found["changes"] == []
    assert (
        found["seconds"]["train"] == [1.5] * 3
        and all(found["seconds"]["eval"])
        and (found["world"], found["zero"]) == (2, "3")
    )
    assert (lora_run / "plots" / "heatmap.png").is_file()


def test_predictions_show_what_the_pattern_hides(lora_run: Path) -> None:
    rows = predictions(lora_run, 2, "image")["places"]
    assert [row["record_id"] for row in rows] == [f"places{i}" for i in range(9)]
    assert all(row["presence"] == {"image": False, "text": True} for row in rows)
    rows = predictions(lora_run, 2)["places"]
    assert sum(not row["presence"]["image"] for row in rows) == 2
    assert sum(not row["presence"]["text"] for row in rows) == 2
    assert set(predictions(lora_run, "zero_shot")) == set(TASKS)


def test_one_rank_or_two_write_the_same_bytes(lora_run: Path, tmp_path: Path) -> None:
    request = Request(output=tmp_path)
    assert evaluate_stage(lora_run, 1, request=request, ranks=Alone(1, 2, torch.device("cpu"))) is None
    content = evaluate_stage(lora_run, 1, request=request, ranks=Alone(0, 2, torch.device("cpu")))
    assert content is not None
    alone = json.loads((lora_run / "results.json").read_text())
    assert content["matrix"]["matched"][1] == alone["matrix"]["matched"][1]
    for task in TASKS:
        file = Path("predictions") / "1" / "run" / f"{task}.jsonl"
        assert (tmp_path / file).read_bytes() == (lora_run / file).read_bytes()


def test_a_stage_evaluated_again_with_another_batch_size_gives_the_same_results(lora_run: Path) -> None:
    before, said = json.loads((lora_run / "results.json").read_text()), predictions(lora_run, 1)
    after = evaluate_stage(lora_run, 1, request=Request(batch_size=1))
    assert after is not None
    assert {k: v for k, v in after.items() if k != "seconds"} == {
        k: v for k, v in before.items() if k != "seconds"
    }
    assert predictions(lora_run, 1) == said


def test_another_split_goes_to_a_folder_of_its_own(lora_run: Path) -> None:
    before = (lora_run / "results.json").read_bytes()
    content = evaluate_stage(lora_run, 0, request=Request(split="val"))
    assert content is not None and content["split"] == "val" and content["records"]["run"]["shapes"] == 5
    assert (lora_run / "eval-val" / "results.json").is_file()
    assert (lora_run / "results.json").read_bytes() == before


def test_a_limit_keeps_each_records_presence(lora_run: Path, tmp_path: Path) -> None:
    evaluate_stage(lora_run, 0, request=Request(limit=4, output=tmp_path))
    full = {row["record_id"]: row["presence"] for row in predictions(lora_run, 0)["shapes"]}
    few = {row["record_id"]: row["presence"] for row in predictions(tmp_path, 0)["shapes"]}
    assert len(few) == 4 and few.items() <= full.items()


def test_needing_the_task_leaves_only_the_oracle(tmp_path: Path, recipe: Path) -> None:
    folder = make_run(tmp_path / "run", recipe, "individual", Individual, 2)
    evaluate_stage(folder, 0)
    found = evaluate_stage(folder, 1)
    assert found is not None
    assert found["matrix"]["matched"] == [[None] * 3] * 3 and found["modes"] == ["oracle"]
    assert [[score is not None for score in row] for row in found["matrix"]["oracle"]] == [
        [True, False, False],
        [True, True, False],
        [False] * 3,
    ]
    assert found["metrics"]["oracle"]["forgetting"] == 0 and found["metrics"]["matched"]["ap"] is None
    # Adapters of their own: what was said on the first task cannot change.
    assert [r["prediction"] for r in predictions(folder, 0)["shapes"]] == [
        r["prediction"] for r in predictions(folder, 1)["shapes"]
    ]


def test_choosing_shows_both_modes_and_the_confusion(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run", recipe, "individual", Individual, 2)
    monkeypatch.setattr(
        model_module, "load_plugin", lambda k, n: Chooser if k == "method" else load_plugin(k, n)
    )
    found = evaluate_stage(folder, 1)
    assert found is not None
    assert found["task_choice"]["1"]["run"]["confusion"] == [[9, 0, 0], [1, 8, 0], [0, 0, 0]]
    assert found["task_choice_accuracy"] == pytest.approx(100 * 17 / 18)
    assert found["task_choice_accuracy_without_instruction"] == pytest.approx(50)
    rows = predictions(folder, 1)
    told = {row["record_id"]: row["oracle_prediction"] for row in rows["words"]}
    for row in rows["words"]:
        assert (row["task_used"] == "shapes") == (row["record_id"] == "words3")
        assert row["prediction"] == row["oracle_prediction"] or row["record_id"] == "words3"
    misrouted = rows["words"][3]
    assert misrouted["prediction"] != misrouted["oracle_prediction"]
    assert all(row["oracle_prediction"] is None for row in rows["places"])  # the next task has no oracle yet
    assert found["matrix"]["oracle"][1][2] is None and found["matrix"]["matched"][1][2] is not None
    # The oracle of a choosing method says what the same adapters say when the task is given.
    monkeypatch.undo()
    evaluate_stage(folder, 1, request=Request(output=tmp_path / "told"))
    assert {r["record_id"]: r["prediction"] for r in predictions(tmp_path / "told", 1)["words"]} == told


def test_without_evidence_the_first_trained_task_answers_and_is_counted(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run", recipe, "individual", Individual, 2)
    monkeypatch.setattr(
        model_module, "load_plugin", lambda k, n: Blind if k == "method" else load_plugin(k, n)
    )
    for _ in range(2):  # given, and read again from the stored answers
        found = evaluate_stage(folder, 1)
        assert found is not None
        choice = found["task_choice"]["1"]["run"]
        assert choice["fallback"] == {"shapes": 1, "words": 1}
        assert choice["fallback_without_instruction"] == {"shapes": 9, "words": 9}
        assert choice["confusion"] == [
            [9, 0, 0],
            [2, 7, 0],
            [0, 0, 0],
        ]  # words3 is a wrong choice, words5 none
        (folder / "predictions" / "1" / "run" / "words.jsonl").unlink()
    evaluate_stage(folder, 1)
    rows = {row["record_id"]: row for row in predictions(folder, 1)["words"]}
    assert rows["words5"]["task_used"] == "shapes"
    assert rows["words5"]["fallback"] == ["task_used", "task_without_instruction"]
    assert rows["words4"]["fallback"] == ["task_without_instruction"]
    assert rows["words4"]["task_used"] == "words"


def test_the_command_prints_the_row_and_writes_the_same_numbers(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [
            "--run",
            str(lora_run),
            "--stage",
            "words",
            "--patterns",
            "run,text",
            "--output",
            str(tmp_path),
            "--local_rank=0",
        ]
    )
    said = capsys.readouterr().out
    assert "after 2. words" in said and "results:" in said
    assert "both · run" in said and "both · text" in said and "both: matched and oracle" in said
    assert "answers, known / new: 2. words: 0 / " in said
    there, here = (json.loads((folder / "results.json").read_text()) for folder in (lora_run, tmp_path))
    assert here["matrix"]["matched"][1] == there["matrix"]["matched"][1]
    assert (tmp_path / "plots" / "forgetting.png").is_file()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--stage", "7"], "no such stage"),
        (["--stage", "word"], "did you mean words"),
        (["--patterns", "txt"], "did you mean text"),
        (["--run", "nowhere"], "config.yaml is missing"),
    ],
)
def test_bad_requests_end_with_exit_code_2(
    lora_run: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--run", str(lora_run), *words])
    assert left.value.code == 2 and told in capsys.readouterr().err


def test_a_changed_adapter_and_an_untrained_stage_are_refused(tmp_path: Path, recipe: Path) -> None:
    folder = make_run(tmp_path / "run", recipe, "lora", Lora, 1)
    with pytest.raises(DeloError, match="not trained yet"):
        evaluate_stage(folder, 1)
    file = folder / "adapters" / "shapes" / "adapter_config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(DeloError, match="adapter_config.json"):
        evaluate_stage(folder, 0)
    assert not (folder / "results.json").exists()


@pytest.mark.parametrize("what", ["base", "data_hashes"])
def test_another_base_or_other_data_is_refused_or_written_elsewhere_and_marked(
    lora_run: Path, tmp_path: Path, what: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    recorded = json.loads((run / "run.json").read_text())
    changed = recorded[what] | ({"sha256": "ab"} if what == "base" else {TASKS[0]: {"test": "ab"}})
    for folder in (run / "adapters").iterdir() if what == "base" else ():  # all of it made over another one
        (folder / BASE).write_text(json.dumps({"name": "other", "sha256": "ab"}))
        write_manifest(folder)
        recorded["stages"][folder.name]["manifest"] = sha256_file(folder / MANIFEST)
    (run / "run.json").write_text(json.dumps(recorded | {what: changed}))
    before = (run / "results.json").read_bytes()
    with pytest.raises(
        DeloError, match="base weights: the run" if what == "base" else f"data {TASKS[0]}.test"
    ):
        evaluate_stage(run, 0, request=Request(cache=False))
    assert (run / "results.json").read_bytes() == before
    found = evaluate_stage(run, 0, request=Request(output=tmp_path / "other"))
    assert found is not None and len(found["differs"]) == 1
    assert evaluate_stage(run, 0, request=Request(output=tmp_path / "other"))["differs"] == found["differs"]  # type: ignore[index]
    with pytest.raises(DeloError, match="differs"):
        compare([lora_run, tmp_path / "other"])


def test_alone_without_a_process_group(lora_run: Path) -> None:
    assert (
        current_ranks(open_run(lora_run).config).rank,
        current_ranks(open_run(lora_run).config).world,
    ) == (0, 1)


def rescored(recipe: Path, folder: Path, **scorers: str) -> Path:
    """The recipe with other scorers for some of its tasks."""
    content = yaml.safe_load(recipe.read_text())
    for task in content["tasks"]:
        task["scorer"] = scorers.get(task["name"], "exact_match")
    file = folder / "little.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_compat_scores_by_the_official_rules_and_says_so(tmp_path: Path, recipe: Path) -> None:
    file = rescored(recipe, tmp_path, shapes="gqa", words="imagenet", places="contains")
    more = (f"--data.root={recipe.parent}", "--eval.scoring=compat")
    folder = make_run(tmp_path / "run", file, "lora", Lora, 1, *more)
    found = evaluate_stage(folder, 0)
    assert found is not None and found["scoring"] == "compat"
    ids = {"shapes": "gqa.coin.v2", "words": "imagenet.coin.v1", "places": "contains.polaris.v1"}
    assert found["scorer_ids"] == ids
    for task, rows in predictions(folder, 0).items():
        scorer = cast(Scorer, load_plugin("scorer", ids[task].partition(".")[0])).in_mode("compat")
        scores = [scorer(row["prediction"], Reference(row["record_id"], row["answer"])) for row in rows]
        assert [row["score"] for row in rows] == scores
        cell = found["matrix"]["matched"][0][TASKS.index(task)]
        assert cell == pytest.approx(100 * sum(scores) / len(scores))
    other = make_run(tmp_path / "other", file, "lora", Lora, 1, f"--data.root={recipe.parent}")
    (other / "results.json").write_text((folder / "results.json").read_text())
    with pytest.raises(DeloError, match="another scoring: compat"):
        evaluate_stage(other, 0)


@pytest.mark.parametrize(
    ("scorer", "scoring", "told"),
    [("textvqa", "native", "needs `answers`"), ("class_exact", "compat", "no official script")],
)
def test_what_cannot_be_scored_is_refused_before_a_model_is_loaded(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, scorer: str, scoring: str, told: str
) -> None:
    file = rescored(recipe, tmp_path, shapes=scorer)
    more = (f"--data.root={recipe.parent}", f"--eval.scoring={scoring}")
    folder = make_run(tmp_path / "run", file, "lora", Lora, 1, *more)
    monkeypatch.setattr(stage_module, "answerer", lambda *given: pytest.fail("a model is loaded"))
    with pytest.raises(DeloError, match=told):
        evaluate_stage(folder, 0)


def test_a_rule_over_the_corpus_fills_its_cell(tmp_path: Path, recipe: Path) -> None:
    file = rescored(recipe, tmp_path, shapes="multilabel_f1")
    folder = make_run(tmp_path / "run", file, "lora", Lora, 1, f"--data.root={recipe.parent}")
    found = evaluate_stage(folder, 0)
    assert found is not None
    rows = predictions(folder, 0)["shapes"]
    scorer = cast(Scorer, load_plugin("scorer", "multilabel_f1"))
    references = [Reference(row["record_id"], row["answer"]) for row in rows]
    expected = 100 * scorer.total([row["prediction"] for row in rows], references)
    assert found["matrix"]["matched"][0][0] == pytest.approx(expected)
