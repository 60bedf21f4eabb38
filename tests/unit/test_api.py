"""The functions of the package do what the commands do, with the same settings and the same refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import training_support as support

import delo_llava
from delo_llava.errors import DeloError


def test_importing_the_package_is_light_and_it_has_what_it_names() -> None:
    code = (
        "import sys, delo_llava; heavy = {'torch', 'transformers', 'pydantic', 'yaml'} & set(sys.modules); "
        "assert not heavy, heavy; assert all(callable(getattr(delo_llava, n)) for n in delo_llava.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="nonsense"):
        delo_llava.nonsense  # noqa: B018


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    recipe = support.write_sequence(folder / "data")
    return delo_llava.train(
        {"task_seq": recipe, "data.root": recipe.parent, "lora": {"rank": 2}, "missing": {"ratio": 0.4}},
        model=tiny_models.session("llava"), output=folder / "run", method="lora", zero="none", quant="none",
        device="cpu", train={"global_batch": 8, "micro_batch": 2, "max_steps": 1}, eval={"last_patterns": []},
    )  # fmt: skip


def test_train_takes_nested_and_dotted_settings_and_returns_the_folder(run: Path) -> None:
    assert (run / "complete.json").is_file()
    import yaml

    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["missing"]["ratio"], config["methods"]["lora"]["rank"]) == (0.4, 2)
    assert config["train"]["max_steps"] == 1 and config["eval"]["last_patterns"] == []


def test_a_mistake_is_told_as_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(DeloError, match=r"train\.lrr") as refused:
        delo_llava.train(task_seq="mini6", train={"lrr": 1}, output=tmp_path / "x")
    assert "train.lr" in str(refused.value)
    assert not (tmp_path / "x").exists()


def test_evaluate_returns_results_and_says_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = delo_llava.evaluate(run)
    assert found["matrix"] == json.loads((run / "results.json").read_text())["matrix"]
    delo_llava.evaluate(run, "last", limit=2, output=tmp_path / "other")
    asked = [file.read_text().splitlines() for file in (tmp_path / "other" / "predictions").rglob("*.jsonl")]
    assert asked and all(len(lines) == 2 for lines in asked)
    assert not capsys.readouterr().out
    with pytest.raises(DeloError, match="no such stage"):
        delo_llava.evaluate(run, "task7")


def test_a_run_answers(run: Path) -> None:
    with delo_llava.open_run(run, stage="task0") as model:
        image = run.parent / "data" / "images" / "red.png"
        assert isinstance(model.answer("what color is it", image=image), str)


def test_a_base_is_loaded_with_its_processor_and_family() -> None:
    model, processor, backbone = delo_llava.load_base(
        str(tiny_models.session("llava")), quant="none", device="cpu"
    )
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert processor.tokenizer("a")["input_ids"] and backbone.image_token
