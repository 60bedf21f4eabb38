"""The command line: instant help, errors before anything heavy, and what reaches training and the harness."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

from delo_eval.cli import main as evaluate
from delo_llava import __version__, cli, endings
from delo_llava.config import load_config
from delo_llava.errors import DeloError
from delo_llava.registry import plugin_names


def run(*words: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """The console command in a process of its own, and the seconds of processor time it took.

    Processor time, since a busy machine must not fail the test.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "delo_llava.cli", *words],
        capture_output=True, text=True, check=False, env=os.environ | environment,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    """Top-level packages the process imported."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


HEAVY = {"torch", "transformers", "deepspeed", "peft", "datasets", "matplotlib"}


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    runs = [run("--help") for _ in range(3)]
    done, _ = runs[0]
    assert done.returncode == 0
    assert {"train", "eval", "list", "data"} <= set(done.stdout.split())
    assert not imported(done) & {*HEAVY, "numpy", "pydantic", "yaml"}
    assert min(seconds for _, seconds in runs) < 0.5


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"delo-llava {__version__}"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--task_seq=coin6", "--data.root=/nowhere"], "Instructions_Original/OCRVQA/train.json"),
        (["--task_seq=coin5"], "did you mean coin8?"),
        (["--quant=nf3"], "did you mean nf4?"),
        (["--train.leaning_rate=1"], "train.leaning_rate"),
        (["--method=dello"], "did you mean delo?"),
        (["--config=none.yaml"], "no such YAML file"),
        (["--config"], "--config needs a value"),
    ],
)
def test_mistakes_end_with_code_2_before_anything_heavy(words: list[str], told: str) -> None:
    done, seconds = run("train", *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not imported(done) & HEAVY
    assert seconds < 1.0


def test_a_method_s_own_keys_are_checked_too() -> None:
    """The real methods; their modules import torch, so this one is slower."""
    with pytest.raises(DeloError, match=r"did you mean rank\?"):
        load_config(None, ["--delo.rnk=4"])


@pytest.mark.parametrize(("what", "name"), [("methods", "delo"), ("recipes", "coin6"), ("zero", "2_offload")])
def test_list(
    what: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert cli.main(["list", what]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert name in names
    assert names == sorted(names)


def test_train_help_lists_every_key_and_imports_nothing_heavy() -> None:
    done, seconds = run("train", "--help")
    for line in ("--missing.ratio=0.0", "--train.global_batch=32", "--zero='2'", "--eval.patterns=[run]"):
        assert line in done.stdout
    assert "`--help --method delo` says what they are" in done.stdout
    assert done.returncode == 0 and not imported(done) & HEAVY and seconds < 2.0


@pytest.fixture
def sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with one task of two records, complete with images."""
    monkeypatch.setenv("DELO_LLAVA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}] * 2
    train = [{"id": "a", "image": "a.png", "conversations": turns, "context": "c"}]
    test = [{"question_id": "b", "text": "Q", "answer": "A"}]
    for name, entries in (("train", train), ("test", test)):
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    Image.new("RGB", (2, 2)).save(tmp_path / "images" / "a.png")
    files = {"train": "train.json", "test": "test.json"}
    task = {"name": "one", "kind": "vqa", "files": files, "image_root": "images"}
    recipe = {"name": "mine", "tasks": [task], "defaults": {"train": {"lr": 0.5, "clip": 2}, "seed": 4}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def check(sequence: Path, *more: str) -> int:
    """`data check` with its memory in the test's folder."""
    state = sequence / "state.sqlite"
    words = ["data", "check", str(sequence / "mine.yaml"), "--root", str(sequence), "--state", str(state)]
    return cli.main([*words, *more])


def test_data_check_passes(sequence: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(sequence) == 0
    text = capsys.readouterr().out
    assert "turn_repeated: " in text
    assert text.endswith(f"0 faults; report: {sequence / 'state.jsonl'}\n")


def test_data_check_tells_missing_images_and_bad_entries(
    sequence: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sequence / "images" / "a.png").unlink()
    (sequence / "test.json").write_text(json.dumps([{"question_id": "b", "text": "Q"}]))
    assert check(sequence, "--no-tokens") == 1
    text = capsys.readouterr().out
    assert "image_missing: " in text
    assert "answer_empty: " in text
    assert "2 faults; report: " in text


def test_data_check_refuses_unknown_kinds_of_faults(sequence: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        check(sequence, "--allow=overlap")


def test_data_check_of_absent_files_ends_with_code_2(sequence: Path) -> None:
    (sequence / "test.json").unlink()
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "check", str(sequence / "mine.yaml"), "--root", str(sequence)])
    assert caught.value.code == 2


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What training and the harness are called with, neither being run."""
    calls: list[Any] = []
    modules = {
        "delo_llava.runs.job": SimpleNamespace(make_job=lambda config: config),
        "delo_llava.runs.sequence": SimpleNamespace(run_sequence=lambda *given: calls.append(given)),
        "delo_eval.harness.run": SimpleNamespace(
            evaluate_stage="the callback", main=lambda words: calls.append(words)
        ),
    }
    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=modules.__getitem__))
    return calls


def words(sequence: Path, *more: str) -> list[str]:
    return ["--task_seq", str(sequence / "mine.yaml"), "--data.root", str(sequence), "--method=lora", *more]


def test_train_hands_over_the_resolved_configuration(sequence: Path, handed: list[Any]) -> None:
    file = sequence / "c.yaml"
    file.write_text("train: {lr: 0.25}\nmissing: {ratio: 0.3}\n")
    more = ["--local_rank=1", "--config", str(file), "--missing.ratio=0.5", "--local_rank", "0"]
    assert cli.main(["train", *words(sequence, *more)]) == 0
    [(config, callback, planner)] = handed
    assert (config.train.lr, config.train.clip, config.seed, config.missing.ratio) == (0.25, 2.0, 4, 0.5)
    assert config.output == Path("runs/mine-lora-s4")
    assert list(config.methods) == ["lora"]
    assert callback == "the callback" and planner is cli.planned_bytes


def test_options_of_a_method_that_is_not_run_are_told(
    sequence: Path, handed: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["train", *words(sequence, "--individual.rank=3", "--delo.rank=3")])
    told = "--individual.…: without effect, the method is lora\n"
    assert capsys.readouterr().err == told and len(handed) == 1, "delo's decide the rank at equal size"
    cli.main(["train", *words(sequence, "--lora.rank=3")])
    assert not capsys.readouterr().err


def test_a_run_is_found_again_from_any_folder(
    sequence: Path, handed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sequence)
    cli.main(["train", "--task_seq=mine.yaml", "--data.root=.", "--method=lora"])
    monkeypatch.setenv("DELO_LLAVA_DATA", ".")
    cli.main(["train", "--task_seq=mine.yaml", "--method=lora"])
    for (config, *_), _ in zip(handed, range(2), strict=True):
        assert (config.data.root, config.task_seq) == (sequence, str(sequence / "mine.yaml"))
        assert config.output == Path("runs/mine-lora-s4") and config.model == "mini-llava"


def test_print_config_writes_yaml_and_trains_nothing(
    sequence: Path, handed: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main_train(words(sequence, "--print_config")) == 0
    assert not handed
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["train"]["lr"], printed["method"], printed["zero"]) == (0.5, "lora", "2")


def test_official_scoring_of_a_task_without_an_official_script_is_refused_before_training(
    sequence: Path, handed: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", *words(sequence, "--eval.scoring=compat")])
    assert caught.value.code == 2 and not handed
    assert "exact_match.v2 has no official script" in capsys.readouterr().err


def test_eval_hands_its_words_to_the_harness(handed: list[Any]) -> None:
    assert cli.main(["eval", "--run", "runs/x", "--stage", "3"]) == 0
    assert handed == [["--run", "runs/x", "--stage", "3"]]


def test_other_ranks_let_the_first_tell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(endings.time, "sleep", waits.append)
    for rank, expected in (("0", []), ("1", [endings.TELL_FIRST])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as caught:
            cli.main_train(["--quant=nf3"])
        assert caught.value.code == 2
        assert waits == expected
    assert capsys.readouterr().err.count("did you mean nf4?") == 2


@pytest.mark.parametrize(
    "line",
    [
        "data check mini6 --workers -1", "data show mini6 -n 0", "slurm --nodes 0", "slurm --time tomorrow",
        "plan --gpus 0", "compare x y --resamples 0", "eval --run x --limit -5",
        "eval --run x --batch_size 0",
    ],
)  # fmt: skip
def test_numbers_that_mean_nothing_are_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(line.split())
    told = capsys.readouterr().err
    assert line.split()[-1] in told and ("whole number" in told or "time limit" in told)


@pytest.mark.parametrize("words", [["list", "backbones"], ["list", "methods"]])
def test_lists_keep_to_the_terminal_and_lose_nothing(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert cli.main(words) == 0
    whole = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(words) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 80 < max(map(len, whole.splitlines()))
    assert narrow.split() == whole.split()


def test_help_of_the_harness_names_its_other_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        evaluate(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in plugin_names("eval_command"))
    assert max(map(len, said.splitlines())) <= 80
