"""AccuracyMatrix: cells, holes, JSON, the finished part."""

import json

import numpy as np
import pytest

from delo_eval.matrix.accuracy import ZERO_SHOT, AccuracyMatrix
from delo_eval.matrix.plan import Plan
from delo_llava.errors import DeloError

TASKS = ("a", "b", "c")


def filled(stages: int, mode: str = "matched") -> AccuracyMatrix:
    matrix = AccuracyMatrix(Plan.one_each(TASKS))
    for stage in range(stages):
        for j, task in enumerate(TASKS[: stage + 2]):
            matrix.set(mode, stage, task, 10 * stage + j, count=5)  # type: ignore[arg-type]
    return matrix


def test_grid_has_none_where_nothing_was_run() -> None:
    assert filled(2).grid("matched") == [[0, 1, None], [10, 11, 12], [None] * 3]
    assert filled(2).grid("oracle") == [[None] * 3] * 3


def test_json_round_trip_keeps_every_cell() -> None:
    matrix = filled(3)
    matrix.set("oracle", 2, "b", 77.25, count=5)
    matrix.set("matched", 2, "a", 1 / 3, count=4, pattern="image")
    matrix.set("oracle", 2, "a", 2 / 3, count=4, pattern="image")
    for task in TASKS:
        matrix.set("matched", ZERO_SHOT, task, 3.5, count=5)
    matrix.note("standard_errors", "matched", 2, "a", 1.5, pattern="image")
    matrix.note("standard_errors", "matched", ZERO_SHOT, "c", 0.5)
    matrix.note("instruction_following", "oracle", 2, "b", 98.0)
    matrix.note("instruction_following", "oracle", 2, "a", None)
    again = AccuracyMatrix.from_json(json.loads(json.dumps(matrix.to_json(), allow_nan=False)))
    assert again == matrix
    assert again.to_json()["standard_errors"]["image"]["matched"][2] == [1.5, None, None]
    assert again.patterns == ["run", "image"]


def test_files_from_before_standard_errors_are_read() -> None:
    data = filled(2).to_json()
    assert data.pop("standard_errors") is None and data.pop("instruction_following") is None
    assert AccuracyMatrix.from_json(data) == filled(2)


def test_what_stands_beside_a_cell_is_cleared_with_it() -> None:
    matrix = filled(2)
    for stage in (0, 1):
        matrix.note("standard_errors", "matched", stage, "a", 1.0)
    matrix.clear(1, ["run"])
    assert matrix.beside["standard_errors"] == {("matched", 0, "a", "run"): 1.0}


def test_json_form() -> None:
    data = filled(1).to_json()
    assert data["tasks"] == ["a", "b", "c"]
    assert data["matrix"] == {"matched": [[0, 1, None], [None] * 3, [None] * 3], "oracle": [[None] * 3] * 3}
    assert data["patterns"] == {} and data["zero_shot"] is None
    assert data["records"] == {"run": {"a": 5, "b": 5}}


def test_finished_part_is_the_leading_square() -> None:
    grid, zero_shot = filled(2).finished_part("matched")
    np.testing.assert_array_equal(grid, [[0, 1], [10, 11]])
    assert zero_shot is None
    assert filled(2).finished_part("oracle")[0].shape == (0, 0)


def test_a_hole_below_the_diagonal_ends_the_finished_part() -> None:
    matrix = filled(3)
    del matrix.scores["matched", 1, "a", "run"]
    assert matrix.finished_stages("matched") == 1
    matrix = filled(3)
    del matrix.scores["matched", 0, "b", "run"]  # above the diagonal: not needed
    assert matrix.finished_stages("matched") == 3


def test_zero_shot_row_is_no_stage() -> None:
    matrix = AccuracyMatrix(Plan.one_each(TASKS))
    matrix.set("matched", ZERO_SHOT, "a", 9, count=5)
    assert matrix.zero_shot() == [9, None, None]
    assert not matrix.ran("matched") and matrix.finished_stages("matched") == 0


def test_clear_forgets_only_the_named_cells() -> None:
    matrix = filled(2)
    matrix.set("matched", 1, "a", 50, count=7, pattern="image")
    matrix.clear(1, ["run"])
    assert matrix.row("matched", 1) == [None] * 3
    assert matrix.row("matched", 0) == [0, 1, None]
    assert matrix.row("matched", 1, "image") == [50, None, None]
    matrix.clear(0, ["run"])
    matrix.set("matched", 0, "a", 1, count=99)  # no cell of that column is left, so another size is fine


def test_refused_cells() -> None:
    matrix = filled(1)
    with pytest.raises(DeloError, match="did you mean"):
        AccuracyMatrix(Plan.one_each(("digits", "words"))).set("matched", 0, "digit", 1, count=1)
    for stage in (-2, 3):
        with pytest.raises(DeloError, match="no such stage"):
            matrix.set("matched", stage, "a", 1, count=5)
    with pytest.raises(DeloError, match="numbers of records"):
        matrix.set("matched", 1, "a", 1, count=6)
