"""Configuration: precedence, types, and errors that name the closest key or value."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import yaml
from pydantic import ConfigDict, Field, ValidationError

from delo_llava import config as config_module
from delo_llava.config import RunConfig, config_layers, core_config, dump_config, load_config, parse_overrides
from delo_llava.errors import DeloError
from delo_llava.schema import Word, Worded


class ToyConfig(Worded):
    model_config = ConfigDict(extra="forbid")
    rank: int = Field(default=4, ge=1)
    scope: str = "own"


@pytest.fixture(autouse=True)
def toy_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three methods whose `Config` is ToyConfig, in place of the real ones, which import torch."""
    names = {"method": ["delo", "individual", "lora"], "zero": ["1", "2", "3", "2_offload"]}
    monkeypatch.setattr(config_module, "plugin_names", lambda kind: names[kind])
    monkeypatch.setattr(config_module, "load_plugin", lambda kind, name: SimpleNamespace(Config=ToyConfig))


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def test_defaults() -> None:
    config = load_config()
    assert (config.task_seq, config.method, config.zero, config.quant) == ("mini6", "delo", "2", "nf4")
    assert config.output == config.run_dir == Path("runs/mini6-delo-s0")
    assert config.methods == {"delo": {"rank": 4, "scope": "own"}}
    assert (config.missing.ratio, config.missing.kind, config.missing.image) == (0.0, "both", "absent")


def test_precedence_is_code_recipe_file_words(tmp_path: Path) -> None:
    recipe = {"train": {"lr": 1e-3, "clip": 2.0, "epochs": 3}, "seed": 1, "delo": {"rank": 2, "scope": "all"}}
    file = write(tmp_path / "c.yaml", {"train": {"lr": 5e-4, "clip": 3.0}, "methods": {"delo": {"rank": 6}}})
    config = load_config(file, ["--train.lr=1e-4", "--delo.rank", "8"], recipe)
    assert (config.train.lr, config.train.clip, config.train.epochs) == (1e-4, 3.0, 3.0)
    assert config.train.eps == 1e-8, "untouched keys keep the code's default"
    assert config.seed == 1
    assert config.methods == {"delo": {"rank": 8, "scope": "all"}}


def test_override_forms() -> None:
    words = [
        "--a.b=1",
        "--a.c",
        "x",
        "--flag",
        "--list=[1, 2]",
        "--none=null",
        "--neg",
        "-1",
        "--a-b=y",
        "--e=",
    ]
    given = parse_overrides(words)
    assert given == {
        "a": {"b": "1", "c": "x"}, "flag": "true", "list": "[1, 2]", "none": "null", "neg": "-1", "a_b": "y",
        "e": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "481516",
        "2026-11-27",
        "0123",
        "no",
        "on",
        "1e3",
        "runs/a: b",
        "runs/a #1",
        "[1]",
        "{x}",
        "a, b",
        "!x",
        "''",
    ],
)
def test_paths_and_names_are_taken_as_typed(text: str) -> None:
    config = load_config(None, [f"--output={text}", f"--task_seq={text}", f"--data.template={text}"])
    assert (config.output, config.task_seq, config.data.template) == (Path(text), text, text)


def test_the_home_folder_is_written_as_in_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home-of/me")
    config = load_config(None, ["--output=~/x", "--data.root=~", "--model=~/m", "--task_seq=a~b"])
    assert (str(config.output), str(config.data.root)) == ("/home-of/me/x", "/home-of/me")
    assert (config.model, config.task_seq) == ("/home-of/me/m", "a~b")
    with pytest.raises(DeloError, match="whose home folder"):
        load_config(None, ["--output=~nobody-known/x"])


class Sized(Worded):
    rank: Literal["match"] | int | None = 1


def test_other_values_are_yaml() -> None:
    words = ["--train.max_steps=null", "--train.tensorboard", "--train.betas=[0.5, 0.9]", "--train.lr=1E-4"]
    train = load_config(None, words).train
    assert (train.max_steps, train.tensorboard, train.betas, train.lr) == (None, True, (0.5, 0.9), 1e-4)
    assert load_config(None, ["--data.root=null"]).data.root is None
    for text, rank in (("8", 8), ("match", "match"), ("null", None)):
        assert Sized.model_validate({"rank": Word(text)}).rank == rank
    assert load_config(None, ["--per_task.gqa.lr=0.5"]).per_task == {"gqa": {"lr": 0.5}}


@pytest.mark.parametrize("key", ["seed", "missing.seed"])
def test_a_seed_survives_json(key: str) -> None:
    assert load_config(None, [f"--{key}={2**53}"])
    with pytest.raises(DeloError, match="less than or equal to"):
        load_config(None, [f"--{key}={2**53 + 1}"])


@pytest.mark.parametrize("words", [["--zero=2"], ["--zero", "2"]])
def test_a_number_for_a_name_is_its_text(words: list[str]) -> None:
    assert load_config(None, words).zero == "2"


def test_lists_may_be_written_with_commas() -> None:
    assert load_config(None, ["--eval.patterns=run,image"]).eval.patterns == ["run", "image"]
    assert load_config(None, ["--eval.last_patterns=[text]"]).eval.last_patterns == ["text"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--methud=lora"], r"did you mean method\?"),
        (["--method=dello"], r"did you mean delo\?"),
        (["--dello.rank=2"], r"did you mean delo\?"),
        (["--delo.rnk=2"], r"`delo\.rnk`[\s\S]*did you mean rank\?"),
        (["--delo.rank=0"], r"`delo\.rank`.*greater than or equal to 1"),
        (["--lora.rnk=2"], r"`lora\.rnk`"),
        (["--methods.nix.rank=2"], r"no method called 'nix'"),
        (["--missing.kind=bth"], r"`missing\.kind`[\s\S]*did you mean both\?"),
        (["--missing.knd=both"], r"`missing\.knd`[\s\S]*did you mean kind\?"),
        (["--missing.ratio=1.2"], r"`missing\.ratio`.*less than or equal to 1[\s\S]*given: +1\.2"),
        (["--missing=0.7"], r"`missing`"),
        (["--quant=nf3"], r"allowed: nf4, none  \(did you mean nf4\?\)"),
        (["--zero=4"], r"no zero called '4'[\s\S]*2_offload"),
        (["--lr=1"], r"did you mean train\.lr\?"),
        (["--ratio=1"], r"did you mean missing\.ratio\?"),
        (["--train.lr=fast"], r"`train\.lr`.*number"),
        (["--train.lr=.nan"], r"`train\.lr`"),
        (["--train.lr=0"], r"`train\.lr`.*greater than 0"),
        (["--data.sub=0"], r"`data\.sub`"),
        (["--seed=1.5"], r"`seed`"),
        (["--eval.patterns=run,imge"], r"`eval\.patterns\.1`[\s\S]*did you mean image\?"),
        (["lr=1"], r"--key=value"),
        (["--seed=1", "--seed.x=2"], r"cannot be a section"),
        (["--seed=[1"], r"`seed`.*integer[\s\S]*\[1"),
        (["--zero='2'"], r"did you mean 2\?"),
    ],
)
def test_bad_words_are_told_with_the_closest(words: list[str], told: str) -> None:
    with pytest.raises(DeloError, match=told) as caught:
        load_config(None, words)
    assert caught.value.exit_code == 2


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(DeloError) as caught:
        load_config(None, ["--quant=nf3", "--missing.ratio=2", "--trian.lr=1"])
    for part in ("`quant`", "`missing.ratio`", "`trian`"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train: [", "not valid YAML"),
        ("- a\n- b\n", "keys and values"),
        ("tarin: {lr: 1}", "did you mean train"),
    ],
)
def test_bad_files_are_told(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(DeloError, match=told):
        load_config(file)


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DeloError, match="no such YAML file"):
        load_config(tmp_path / "none.yaml")


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("")
    assert load_config(file) == load_config()


def test_dump_reads_back_the_same(tmp_path: Path) -> None:
    words = [
        "--method=lora",
        "--lora.rank=3",
        "--train.max_steps=5",
        "--data.root=/d",
        "--train.betas=[0.8, 0.9]",
    ]
    config = load_config(None, [*words, "--zero=none", "--output=runs/x"])
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config


def test_sections_of_other_methods_are_checked_and_kept() -> None:
    """The baselines take their size from DeLo's section."""
    methods = load_config(None, ["--lora.rank=3"]).methods
    assert methods == {"delo": {"rank": 4, "scope": "own"}, "lora": {"rank": 3, "scope": "own"}}


def test_core_config_loads_no_method(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: str, name: str) -> object:
        raise AssertionError(f"{kind} {name} was loaded")

    monkeypatch.setattr(config_module, "load_plugin", refuse)
    assert core_config(config_layers(None, ["--delo.rank=2"])).methods == {"delo": {"rank": "2"}}


def test_one_process_engine_and_own_file_need_no_zero_key(tmp_path: Path) -> None:
    assert load_config(None, ["--zero=none"]).zero == "none"
    assert load_config(None, ["--zero=mine", "--ds_config=x.json"]).ds_config == Path("x.json")


def test_a_recipe_file_names_the_run_by_its_stem() -> None:
    assert load_config(None, ["--task_seq=my/six.yaml", "--seed=3"]).output == Path("runs/six-delo-s3")


def test_configuration_is_immutable_and_defaults_are_not_shared() -> None:
    first, second = RunConfig(), RunConfig()
    with pytest.raises(ValidationError):
        first.train.lr = 1.0  # type: ignore[misc]
    first.eval.patterns.append("image")
    assert second.eval.patterns == ["run"]
    assert math.isclose(RunConfig().train.lr, 2e-4)
