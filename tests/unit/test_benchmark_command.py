"""`delo-llava benchmark`: which runs it plans, which rate it takes, what its page says, and that it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import comparison_support as fake
import pytest
import tiny_models
import training_support as support

from delo_eval.compare.benchmark import chosen_factor, lacks_wording, write_page
from delo_eval.matrix.results import WORDED
from delo_llava.cluster.benchmark import Benchmark, Entry, _watched, entries, resolved
from delo_llava.config import RunConfig, dump_config
from delo_llava.engines import signals
from delo_llava.errors import DeloError
from delo_llava.registry import plugin_names


def plan(output: Path, *methods: str, **changes: Any) -> Benchmark:
    given = {"factors": (0.5, 1.0, 2.0), "settings": ["missing70", "complete"], "seeds": [0, 1]} | changes
    return Benchmark("mini6", entries(methods or ["delo", "lora"]), output=output, **given)


def finish(
    folder: Path, right: tuple[float, float] = (0.5, 0.5), seed: int = 0, method: str = "lora"
) -> None:
    fake.write_run(folder, fake.outcomes(right, seed), config=RunConfig(method=method, seed=seed))
    (folder / "complete.json").write_text("{}")


def test_all_is_every_registered_method_and_a_plugin_needs_its_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "toy_method.py").write_text('"""A toy."""\n')
    monkeypatch.setenv("DELO_LLAVA_PLUGINS", str(tmp_path))
    found = [entry.label for entry in entries(["all"])]
    assert "toy_method" in found
    assert found == list(plugin_names("method"))
    assert entries(["toy_method"]) == [Entry("toy_method")]


def test_options_make_another_row_of_one_method() -> None:
    plain, other = entries(["hide", "hide --hide.cross_terms=true"])
    assert (plain.label, other.label) == ("hide", "hide+cross_terms=true")
    assert other.words == ("--hide.cross_terms=true",)


@pytest.mark.parametrize(("given", "told"), [(["lorra"], "lora"), (["lora", "lora"], "twice"), ([""], "all")])
def test_unknown_and_repeated_methods_are_refused(given: list[str], told: str) -> None:
    with pytest.raises(DeloError) as refused:
        entries(given)
    assert told in str(refused.value)


def test_a_wrong_option_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(DeloError, match="data.subb"):
        plan(tmp_path, words=("--data.subb=1",)).rates(Entry("lora"), 1.0)
    with pytest.raises(DeloError, match="hide.cross"):
        plan(tmp_path).rates(Entry("hide", ("--hide.cross=true",)), 1.0)


def test_a_run_says_all_that_makes_it(tmp_path: Path) -> None:
    run = plan(tmp_path, words=("--data.sub=0.5",)).run(Entry("lora"), "missing70", 1, 2.0)
    assert run.folder == tmp_path / "missing70" / "lora-s1"
    assert run.words == (
        "--task_seq=mini6", "--method=lora", "--data.sub=0.5", "--seed=1", "--missing.ratio=0.7",
        "--missing.kind=both", "--missing.seed=1", "--train.lr=0.004", f"--output={run.folder}",
    )  # fmt: skip


def test_factors_are_of_the_rate_that_file_or_words_give(tmp_path: Path) -> None:
    mine = plan(tmp_path, words=("--train.lr=0.1",))
    assert mine.rates(Entry("lora"), 0.5) == pytest.approx({"lr": 0.05})
    assert plan(tmp_path).rates(Entry("lora"), 2.0) == pytest.approx({"lr": 0.004})  # mini6.yaml says 0.002
    own = plan(tmp_path, words=("--train.projector_lr=0.01",))
    assert "--train.projector_lr=0.02" in own.run(Entry("lora"), "complete", 0, 2.0).words


def test_a_finished_run_of_other_settings_is_not_taken_for_the_planned_one(tmp_path: Path) -> None:
    def run(*words: str) -> Any:
        return plan(tmp_path, words=words).run(Entry("lora"), "complete", 0, 1.0)

    folder = run().folder
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(resolved(run("--data.max_length=128").words)))
    run().require_same()  # a length gives way to the base
    with pytest.raises(DeloError, match=r"data.sub: the run has 1.0, wanted 0.5") as refused:
        run("--data.sub=0.5").require_same()
    assert "--output" in str(refused.value)


FAMILY = """
import os, subprocess, sys, time
late = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3)"
child = [sys.executable, "-c", late]
pid = subprocess.Popen(child).pid
open(sys.argv[1] + ".part", "w").write(f"{os.getpid()} {pid}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(60)
"""


def test_a_signal_ends_the_launcher_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    monkeypatch.setattr(signals, "requested", lambda: "SIGTERM" if pids.is_file() else None)
    with pytest.raises(signals.Preempted, match="training x"):
        _watched([sys.executable, "-c", FAMILY, str(pids)], "training x")
    for pid in map(int, pids.read_text().split()):
        with pytest.raises(ProcessLookupError):  # the child did not leave at once, and was waited for
            os.kill(pid, 0)


def test_trials_train_the_first_task_and_look_at_validation_records_only(tmp_path: Path) -> None:
    mine = plan(tmp_path)
    mine.write_first()
    from delo_llava.data.recipe import read_recipe, recipe_defaults

    trial = mine.trial(Entry("lora"), 0.5)
    recipe = next(word for word in trial.words if word.startswith("--task_seq=")).partition("=")[2]
    assert [task.name for task in read_recipe(recipe).tasks] == ["science"]
    assert recipe_defaults(recipe) == recipe_defaults("mini6")
    assert {"--eval.split=val", "--train.lr=0.001"} <= set(trial.words)


def test_without_validation_records_rates_cannot_be_chosen(tmp_path: Path) -> None:
    sequence = support.write_sequence(tmp_path)
    with pytest.raises(DeloError, match="validation") as refused:
        Benchmark(str(sequence), entries(["lora"]), [0], ["complete"], tmp_path, (1.0, 2.0)).write_first()
    assert "--rates 1" in str(refused.value)


@pytest.mark.parametrize(
    ("right", "expected"), [((0.2, 0.5, 0.6), 2.0), ((0.6, 0.5, 0.5), 0.5), ((0.5, 0.5, 0.5), 1.0)]
)
def test_the_best_validated_rate_is_taken_and_noted(
    tmp_path: Path, right: tuple[float, ...], expected: float
) -> None:
    mine = plan(tmp_path)
    for factor, share in zip(mine.factors, right, strict=True):
        finish(mine.trial(Entry("lora"), factor).folder, (share, share))
    assert chosen_factor(mine, Entry("lora")) == expected
    note = json.loads((tmp_path / "rates" / "lora.json").read_text())
    assert note["rate"] == pytest.approx(0.002 * expected)
    assert [tried["validation"] for tried in note["tried"]] == pytest.approx([100 * share for share in right])


def test_a_trial_that_did_not_end_is_no_candidate(tmp_path: Path) -> None:
    mine = plan(tmp_path)
    finish(mine.trial(Entry("lora"), 0.5).folder, (0.3, 0.3))
    finish(mine.trial(Entry("lora"), 2.0).folder, (0.9, 0.9))
    (mine.trial(Entry("lora"), 2.0).folder / "complete.json").unlink()
    assert chosen_factor(mine, Entry("lora")) == 0.5


def test_the_page_shows_rows_intervals_costs_rates_and_what_is_missing(tmp_path: Path) -> None:
    mine = plan(tmp_path)
    for seed in mine.seeds:
        finish(mine.run(Entry("delo"), "missing70", seed, 1).folder, (0.9, 0.8), seed, "delo")
        finish(mine.run(Entry("lora"), "missing70", seed, 1).folder, (0.4, 0.5), seed)
    adapter = mine.run(Entry("delo"), "missing70", 0, 1).folder / "adapters" / "science" / "a.safetensors"
    adapter.parent.mkdir(parents=True)
    adapter.write_bytes(bytes(8_000_000))
    for factor in mine.factors:
        finish(mine.trial(Entry("lora"), factor).folder, (factor / 4, factor / 4))
    chosen_factor(mine, Entry("lora"))
    page = tmp_path / "docs" / "comparison.md"
    assert str(page) in write_page(mine, page, "The machine was busy.")
    assert "\nThe machine was busy.\n" in page.read_text()
    text = page.read_text()
    assert "| lora | 0.004 | ×2 | 12.5 | 25.0 | 50.0 |" in text
    assert "| missing70 | delo | 2 | 85.0 ± 0.0 |" in text
    assert "lora − delo" in text
    assert "-40.00 \\[" in text
    assert "| delo | 1,000.00 | 0.0002 | 2.00 | 3 | 1.00 |" in text.replace("1,000 ", "1,000.00 ")
    assert "- complete, delo: seeds 0, 1" in text
    assert (tmp_path / "docs" / "comparison-missing70.png").stat().st_size > 1000
    assert not (tmp_path / "docs" / "comparison-complete.png").exists()


def test_rows_that_were_not_made_alike_are_marked(tmp_path: Path) -> None:
    mine = plan(tmp_path, seeds=[0], settings=["complete"])
    finish(mine.run(Entry("delo"), "complete", 0, 1).folder, method="delo")
    other = mine.run(Entry("lora"), "complete", 0, 1).folder
    fake.write_run(
        other, fake.outcomes((0.5, 0.5)), facts={"start_weights": {"name": "x", "sha256": "e" * 64}}
    )
    (other / "complete.json").write_text("{}")
    write_page(mine, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "NOT COMPARABLE" in text
    assert "start" in text


def test_the_page_tells_the_choice_with_without_and_in_one_wording(tmp_path: Path) -> None:
    mine = plan(tmp_path, seeds=[0], settings=["complete"])
    run = mine.run(Entry("delo"), "complete", 0, 1)
    fake.write_run(
        run.folder, fake.outcomes((0.5, 0.5)), config=RunConfig(method="delo"), task_choice_accuracy=98.0,
        task_choice_accuracy_without_instruction=90.0,
    )  # fmt: skip
    (run.folder / "complete.json").write_text("{}")
    finish(mine.run(Entry("lora"), "complete", 0, 1).folder)
    assert lacks_wording(run) and not lacks_wording(mine.run(Entry("lora"), "complete", 0, 1))
    fake.write_run(run.folder / WORDED, fake.outcomes((0.1, 0.1)), task_choice_accuracy=37.5)
    assert not lacks_wording(run), "it was asked already"
    write_page(mine, tmp_path / "page.md")
    assert "| delo | 98.00 | 90.00 | 37.50 |" in (tmp_path / "page.md").read_text()


def test_runs_of_the_neutral_template_are_a_column_of_the_choice(tmp_path: Path) -> None:
    mine = plan(tmp_path, seeds=[0], settings=["missing70"])
    mine.check_settings()
    for setting, right in (("missing70", 98.0), ("neutral70", 61.5)):
        run = mine.run(Entry("delo"), setting, 0, 1)
        chosen = {"task_choice_accuracy": right, "task_choice_accuracy_without_instruction": 90.0}
        fake.write_run(run.folder, fake.outcomes((0.5, 0.5)), config=RunConfig(method="delo"), **chosen)
        if setting == "missing70":
            (run.folder / "complete.json").write_text("{}")
    assert "--data.template=neutral" in run.words
    write_page(mine, tmp_path / "page.md")
    assert "trained with one wording" not in (tmp_path / "page.md").read_text(), "it has not ended"
    (run.folder / "complete.json").write_text("{}")
    write_page(mine, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| delo | 98.00 | 90.00 | – | 61.50 |" in text and "`neutral70`" in text


def test_a_sequence_without_the_neutral_template_is_refused_its_settings(tmp_path: Path) -> None:
    sequence = support.write_sequence(tmp_path)
    mine = Benchmark(str(sequence), entries(["lora"]), [0], ["neutral"], tmp_path)
    with pytest.raises(DeloError, match="no template `neutral`") as told:
        mine.check_settings()
    assert "missing70" in str(told.value) and "neutral70" not in str(told.value)


def test_a_task_on_which_nobody_beats_majority_is_named(tmp_path: Path) -> None:
    mine = plan(tmp_path, "lora", seeds=[0], settings=["complete"])
    folder = mine.run(Entry("lora"), "complete", 0, 1).folder
    floors = {
        task: {"scorer": "s", "records": 40, "answer": "yes", "majority": m, "chance": 1.0}
        for task, m in (("science", 70.0), ("ocr", 20.0))
    }
    fake.write_run(folder, fake.outcomes((0.5, 0.5)), floors=floors)
    (folder / "complete.json").write_text("{}")
    write_page(mine, tmp_path / "page.md")
    assert "No method beats the most frequent answer on: science." in (tmp_path / "page.md").read_text()


@pytest.mark.slow
def test_it_trains_what_is_not_finished_and_only_its_part(tmp_path: Path) -> None:
    sequence = support.write_sequence(tmp_path, records=8)
    output = tmp_path / "out"
    words = [
        sys.executable, "-m", "delo_llava.cli", "benchmark", "--task_seq", str(sequence), "--methods", "lora",
        "zero_shot", "--seeds", "0", "--rates", "1", "--settings", "complete", "--ranks", "1", "--output",
        str(output), f"--data.root={tmp_path}", f"--model={tiny_models.session('llava')}", "--device=cpu",
        "--quant=none", "--train.max_steps=1", "--train.global_batch=8", "--train.micro_batch=8",
    ]  # fmt: skip
    here = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.run([*words, "--part", "2/2"], capture_output=True, text=True, env=here, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    assert not (output / "complete" / "lora-s0").exists()
    assert "- complete, lora: seeds 0" in (output / "comparison.md").read_text()
    again = subprocess.run(words, capture_output=True, text=True, env=here, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "zero_shot-s0" not in again.stdout.partition("page:")[0]  # finished: not touched
    assert "Not finished" not in (output / "comparison.md").read_text()
