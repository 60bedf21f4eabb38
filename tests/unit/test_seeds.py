"""The table over seeds: means, deviations, and the refusal to merge runs that were made differently."""

import json
from pathlib import Path
from typing import Any

import pytest

from delo_eval.compare.seeds import summarise_seeds
from delo_eval.matrix.results import SCHEMA
from delo_llava.errors import DeloError

#: What results say of how they were made, and another value for each.
CONDITIONS: dict[str, Any] = {
    "task_seq": "mini", "quant": "none", "tasks": ["a", "b"], "split": "test", "limit": None,
    "scoring": "native", "metric_ids": {"ap": "ap.v1"}, "scorer_ids": {"a": "s.v1", "b": "s.v1"},
    "start_weights": {"name": "base", "sha256": "a"}, "data_hashes": {"a": {"test": "1"}},
    "missing": {"spec": {"ratio": 0.7, "kind": "both", "seed": 0, "image": "absent"}},
}  # fmt: skip
OTHERS: dict[str, Any] = {
    "task_seq": "other", "quant": "nf4", "tasks": ["b", "a"], "split": "val", "limit": 5,
    "scoring": "compat", "metric_ids": {"ap": "ap.v2"}, "scorer_ids": {"a": "s.v1", "b": "s.v2"},
    "start_weights": {"name": "base", "sha256": "b"}, "data_hashes": {"a": {"test": "2"}},
    "missing": {"spec": {"ratio": 0.5, "kind": "both", "seed": 0, "image": "absent"}},
}  # fmt: skip


#: A matrix of two tasks that was not run.
NOTHING = [[None, None], [None, None]]


def write(folder: Path, ap: float, mode: str = "matched", **changes: Any) -> None:
    """A results.json with what the table reads."""
    folder.mkdir(parents=True)
    both = {"matched": {"ap": None, "forgetting": None}, "oracle": {"ap": ap + 1, "forgetting": 0.0}}
    both[mode] = {"ap": ap, "forgetting": 2.0}
    content = CONDITIONS | {
        "schema": SCHEMA,
        "modes": [mode],
        "metrics": {**both, "complete": True},
        "patterns": {
            "image": {"matched": NOTHING, "oracle": NOTHING, mode: [[1.0, 2.0], [ap, ap + 2]]},
        },
        "task_choice_accuracy": None,
        "task_choice_accuracy_without_instruction": None,
        "trainable_parameters_per_task": {"a": 1500, "b": 2500},
        "method": folder.name.partition("-")[0],
        "seed": 0,
        "matrix": {"matched": NOTHING, "oracle": NOTHING},
        "zero_shot": None,
        "records": {},
        "task_choice": None,
        "seconds": {"train": [], "eval": [], "zero_shot": None},
        **changes,
    }
    (folder / "results.json").write_text(json.dumps(content))


def test_mean_and_deviation_over_seeds(tmp_path: Path) -> None:
    for seed, ap in enumerate((10.0, 20.0, 30.0)):
        write(tmp_path / "easy" / f"delo-s{seed}", ap)
    write(tmp_path / "easy" / "individual-s0", 50.0, mode="oracle")
    table = summarise_seeds(tmp_path, ["easy"], ["delo", "individual", "absent"])
    assert "| easy | delo | 3 | 20.0 ± 10.0 | 2.0 ± 0.0 |" in table and "2,000" in table
    assert "| easy | individual | 1 | 50.0 | 2.0 |" in table and "absent" not in table
    row = json.loads((tmp_path / "table.json").read_text())[0]
    assert row["AP, no image"]["mean"] == 21.0 and row["AP"]["values"] == [10.0, 20.0, 30.0]


def test_unfinished_runs_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "easy" / "delo-s0", 10.0, metrics={"complete": False})
    assert "delo" not in summarise_seeds(tmp_path, ["easy"], ["delo"])


@pytest.mark.parametrize("key", OTHERS)
def test_runs_made_differently_are_not_merged(tmp_path: Path, key: str) -> None:
    write(tmp_path / "easy" / "delo-s0", 10.0)
    write(tmp_path / "easy" / "delo-s1", 10.0, **{key: OTHERS[key]})
    with pytest.raises(DeloError, match=key):
        summarise_seeds(tmp_path, ["easy"], ["delo"])


def test_each_seed_may_draw_its_own_missing_records_and_old_ids_are_known(tmp_path: Path) -> None:
    write(tmp_path / "easy" / "delo-s0", 10.0, metric_ids={"forgetting": "forgetting.v1"})
    spec = CONDITIONS["missing"]["spec"] | {"seed": 1}
    ids = {"forgetting": "forgetting.diag_Tm1.v1", "forgetting_max_all": "forgetting_max_all.Tm1.v1"}
    write(tmp_path / "easy" / "delo-s1", 30.0, missing={"spec": spec}, metric_ids=ids)
    assert "20.0 ± 14.1" in summarise_seeds(tmp_path, ["easy"], ["delo"])
