"""The passport of a run: each thing that makes a number changes its own part, and rows of unlike parts do not
stand side by side.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comparison_support import FACTS, outcomes, write_run

from delo_eval.compare.assemble import compare
from delo_eval.compare.leaderboard import legend
from delo_eval.matrix.passport import COMPARED, PARTS, passport
from delo_llava.config import RunConfig, load_config
from delo_llava.errors import DeloError
from delo_llava.tasks import TaskSpec

TASKS = [TaskSpec(name, "k", {}, Path()) for name in ("a", "b")]
RULES = {"a": "exact_match.v2", "b": "exact_match.v2"}
RECORD: dict[str, Any] = {
    "base": {"sha256": "w", "files": {"tokenizer.json": "t"}},
    "encoders": {"clip": "e"}, "dialogue": {"end": "</s>"}, "template": "one",
    "data_hashes": {"a": {"test": "d"}},
}  # fmt: skip


def given(*words: str) -> RunConfig:
    return load_config(None, ["--method=lora", "--missing.ratio=0.5", *words])


def changed(**parts: Any) -> set[str]:
    """The parts that are others than those of the plain run."""
    plain = passport(given(), RECORD, TASKS, RULES)
    words = {"config": given(), "record": RECORD, "tasks": TASKS, "rules": RULES} | parts
    found = passport(words["config"], words["record"], words["tasks"], words["rules"])
    assert set(plain) == {"id", *PARTS}
    return {part for part, value in found.items() if plain[part] != value} - {"id"}


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"config": given("--missing.seed=4")}, {"masks"}),
        ({"config": given("--missing.kind=text")}, {"masks"}),
        ({"config": given("--missing.image=dummy")}, {"pictures"}),
        ({"config": given("--data.max_pixels=50000")}, {"pictures"}),
        ({"config": given("--data.max_length=77")}, {"lengths"}),
        ({"config": given("--eval.num_beams=2")}, {"asked"}),
        ({"config": given("--eval.scoring=compat")}, {"scorers"}),
        ({"rules": RULES | {"b": "gqa.v1"}}, {"scorers"}),
        ({"tasks": TASKS[::-1]}, {"order"}),
        ({"tasks": [TASKS[0], replace(TASKS[1], max_new_tokens=9)]}, {"lengths"}),
        ({"record": RECORD | {"base": {"sha256": "w", "files": {"tokenizer.json": "other"}}}}, {"files"}),
        ({"record": RECORD | {"base": {"sha256": "v", "files": {"tokenizer.json": "t"}}}}, {"weights"}),
        ({"record": RECORD | {"dialogue": {"end": "<end>"}}}, {"dialogue"}),
        ({"record": RECORD | {"template": "ten"}}, {"template"}),
        ({"record": RECORD | {"data_hashes": {"a": {"test": "c"}}}}, {"data"}),
        ({"record": RECORD | {"encoders": {"clip": "f"}}}, {"encoders"}),
        ({"config": given("--train.lr=1", "--seed=3", "--zero=none")}, set()),
    ],
)  # fmt: skip
def test_each_thing_changes_its_own_part(parts: dict[str, Any], told: set[str]) -> None:
    assert changed(**parts) == told


def test_without_missing_modalities_the_mask_s_seed_and_kind_say_nothing() -> None:
    one, other = (
        passport(given("--missing.ratio=0", f"--missing.seed={seed}"), RECORD, TASKS, RULES)
        for seed in (1, 2)
    )
    assert one == other


def test_what_a_run_did_not_record_has_no_part() -> None:
    assert {*PARTS} - {*passport(given(), {}, TASKS, RULES)} == {
        "weights", "files", "encoders", "dialogue", "template", "data",
    }  # fmt: skip


@pytest.mark.parametrize("part", COMPARED)
def test_rows_of_unlike_passports_are_refused_by_the_part(part: str, tmp_path: Path) -> None:
    one, other = ({**FACTS["passport"], part: value * 12} for value in "ab")
    runs = [
        write_run(
            tmp_path / name, outcomes((0.75, 0.5)), config=RunConfig(method=method), facts={"passport": p}
        )
        for name, method, p in (("x", "lora", one), ("y", "delo", other))
    ]
    with pytest.raises(DeloError, match=rf"passport\.{part}"):
        compare(runs, resamples=100)
    shown = compare(runs, resamples=100, force=True)
    assert sum("passport 000000000000" in line for line in legend(shown)) == 2


def test_a_run_from_before_there_were_passports_stands_beside_others(tmp_path: Path) -> None:
    old = write_run(tmp_path / "x", outcomes((0.75, 0.5)), passport=None)
    new = write_run(tmp_path / "y", outcomes((0.5, 0.5)), config=RunConfig(method="delo"))
    assert not compare([old, new], resamples=100).differences
