"""The time of answering with the last stage ÷ the base's: what is measured, cached and shown."""

import json
from pathlib import Path
from typing import Any

import comparison_support as fake
import pytest
import tiny_models
import training_support as support

from delo_eval.cli import main
from delo_eval.compare.benchmark import lacks_decoding, write_page
from delo_eval.harness import decoding_time
from delo_eval.harness.decoding_time import measure
from delo_eval.harness.stage import evaluate_stage
from delo_llava.cluster.benchmark import Benchmark, entries
from delo_llava.config import RunConfig, load_config
from delo_llava.errors import DeloError
from delo_llava.runs.job import make_job
from delo_llava.runs.sequence import run_sequence


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two tasks: of a method that chooses, of one that needs the task, and of the base."""
    folder = tmp_path_factory.mktemp("decoding")
    recipe, model = support.write_sequence(folder, records=8), tiny_models.session("llava")
    delo = ("--delo.pool_size=4", "--delo.rank=2", "--delo.latent=8")
    for method, more in (("delo", delo), ("individual", ()), ("zero_shot", ())):
        words = support.words(
            recipe, model, folder / method, f"--method={method}", "--train.max_steps=1", *more
        )
        run_sequence(make_job(load_config(None, words)), evaluate_stage)
    return folder


@pytest.mark.parametrize("method", ["delo", "individual"])
def test_pairs_are_of_all_tasks_and_say_what_they_are_worth(method: str, place: Path) -> None:
    before = (place / method / "results.json").read_bytes()
    found = measure(place / method, rounds=2)
    assert (found["pairs"], found["batch_size"], found["tokens"]) == (4, 32, [8])
    for key in ("ratio", "control"):
        assert 0 < found[key]["low"] <= found[key]["median"] <= found[key]["high"]
    assert len(found["adapters"]) == 2 and found["base_seconds"] > 0
    assert (place / method / "results.json").read_bytes() == before


def test_a_slower_last_stage_is_measured_as_such(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are made up: 20 ms for the base, 60 ms for what was trained, every round with another load."""
    calls: list[bool] = []

    def seconds(ready: Any, batch: Any, tasks: Any, tokens: int) -> float:
        calls.append(bool(ready.trained))
        return (3.0 if ready.trained else 1.0) * (1 + len(calls) // 3)

    monkeypatch.setattr(decoding_time, "_seconds", seconds)
    found = measure(place / "delo", rounds=3)
    assert calls[:6] == [False, True, False] * 2 and len(calls) == 3 * 2 * 4, "a round is not counted"
    assert found["ratio"]["median"] == pytest.approx(3.0, rel=0.2)
    assert found["control"]["median"] == pytest.approx(1.0, rel=0.3)


def test_both_decode_the_whole_number_of_tokens(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    plain = decoding_time.decoding

    def noted(*given: Any) -> Any:
        made.append(plain(*given))
        return made[-1]

    monkeypatch.setattr(decoding_time, "decoding", noted)
    measure(place / "delo", rounds=1)
    assert {(each.min_new_tokens, each.max_new_tokens) for each in made} == {(8, 8)}


def test_the_command_writes_a_file_and_says_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = place / "out.json"
    assert main(["decoding", "--run", str(place / "delo"), "--rounds", "1", "--output", str(file)]) == 0
    assert "decoding ÷ base:" in capsys.readouterr().out
    assert json.loads(file.read_text())["schema"] == "delo-llava/decoding/1"
    with pytest.raises(DeloError, match="Nothing is trained"):
        measure(place / "zero_shot")


def test_the_page_has_a_column_where_it_was_measured(tmp_path: Path) -> None:
    plan = Benchmark("mini6", entries(["delo", "lora"]), [0], ["complete"], tmp_path)
    for method in ("delo", "lora"):
        run = plan.run(entries([method])[0], "complete", 0, 1)
        fake.write_run(run.folder, fake.outcomes((0.5, 0.5)), config=RunConfig(method=method))
        (run.folder / "complete.json").write_text("{}")
    write_page(plan, tmp_path / "page.md")
    assert "decoding ÷ base" not in (tmp_path / "page.md").read_text()
    assert all(lacks_decoding(plan, entry) for entry in plan.entries)
    ratio = {"ratio": {"median": 1.234, "low": 1.2, "high": 1.3}, "control": {"low": 0.98, "high": 1.03}}
    file = plan.decoding_file(plan.entries[0])
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"schema": "delo-llava/decoding/1", "pairs": 30, "adapters": [], **ratio}))
    assert not lacks_decoding(plan, plan.entries[0])
    file.write_text(file.read_text().replace('"adapters": []', '"adapters": ["0"]'))
    assert lacks_decoding(plan, plan.entries[0]), "it was measured with other adapters"
    write_page(plan, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "decoding ÷ base" in text and "1.23 (1.20–1.30)" in text and "0.98 and 1.03" in text
