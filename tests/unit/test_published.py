"""Published tables: every aggregate that follows from its row is recomputed; the others say why not."""

from pathlib import Path

import pytest
import yaml

from delo_eval.cli import main
from delo_eval.metrics.base import metrics
from delo_eval.published.base import PublishedTable, Recomputed, load_table, recomputed
from delo_llava.errors import DeloError
from delo_llava.registry import load_plugin, plugin_names

NAMES = plugin_names("published")
SECTIONS = {
    "7a": {"coin_a", "coin_a_branchlora", "coin_a_branchlora_13b", "coin_a_pclr"},
    "7b": {"coin_b"},
    "7c": {"ucit_hide", "ucit_mcitlib", "ucit_mcitlib_user"},
    "7d": {"mllm_dcl"},
    "7e": {"mllm_acl"},
    "7f": {"smolora_cvit"},
}


def found(table: str, method: str, name: str) -> Recomputed:
    return next(c for c in recomputed(load_table(table)) if (c.method, c.name) == (method, name))


def test_every_table_ships() -> None:
    assert set().union(*SECTIONS.values()) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_printed_aggregates_follow_from_their_rows_or_say_why_not(name: str) -> None:
    table = load_table(name)
    done = {(check.method, check.name): check for check in recomputed(table)}
    assert [check for check in done.values() if not check.follows] == []
    for row in table.rows:
        for printed in row.aggregates:
            told = printed in table.unchecked or printed in row.unchecked
            assert ((row.method, printed) in done) != told, f"{row.method} {printed}"


@pytest.mark.parametrize(
    ("table", "method", "name", "printed", "recomputed"),
    [
        ("coin_a", "LoRA", "BWT", -32.62, -32.625),
        ("coin_a", "LoRA", "ACC", 28.74, 28.73625),
        ("coin_a", "LoRA", "New.ACC", 61.36, 61.36125),
        ("coin_a", "MoELoRA", "BWT", -25.91, -25.90875),
        ("coin_a_pclr", "LoRA", "Forgetting", 37.29, 37.28),
        ("ucit_mcitlib", "DISCO", "BWT", -7.45, -7.452),
        ("ucit_mcitlib", "DISCO", "MFN", 69.66, 69.6633),
        ("mllm_dcl", "LoRA-FT", "BWT", -14.97, -14.975),
        ("mllm_dcl", "LoRA-FT", "MFN", 53.00, 53.00),
        ("coin_b", "phi-DPO", "MFN", 68.86, 68.86375),
        ("mllm_acl", "O-LoRA", "BWT", -3.41, -3.4133),
        ("smolora_cvit", "SMoLoRA", "AP", 83.44, 83.4433),
    ],
)
def test_known_aggregates(table: str, method: str, name: str, printed: float, recomputed: float) -> None:
    check = found(table, method, name)
    assert check.printed == printed and check.recomputed == pytest.approx(recomputed, abs=1e-3)
    assert check.tolerance <= 0.0184


def test_pclr_s_forgetting_is_coin_s_row_over_t_minus_1() -> None:
    row = load_table("coin_a").rows[0]
    assert row.immediate is not None and row.final is not None
    pairs = list(zip(row.immediate, row.final, strict=True))
    drop = sum(a - b for a, b in pairs if a is not None and b is not None) / 7
    assert drop == pytest.approx(37.286, abs=1e-3)
    assert load_table("coin_a_pclr").rows[0].aggregates["Forgetting"] == pytest.approx(drop, abs=0.005)


def test_a_mean_of_six_does_not_follow_from_four_columns() -> None:
    """HiDe's `Last` is the mean of six tasks, of which two are not at hand; the table says so."""
    table = load_table("ucit_hide")
    assert list(recomputed(table)) == [] and "two of the six" in table.unchecked["Last"]
    for row in table.rows:
        assert row.final is not None
        known = [cell for cell in row.final if cell is not None]
        assert len(known) == 4 and abs(sum(known) / 4 - row.aggregates["Last"]) > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_every_table_says_where_it_is_from_and_which_convention_it_prints(name: str) -> None:
    table = load_table(name)
    assert table.source and table.protocol.start_weights and table.protocol.data
    assert set(table.aggregates.values()) <= {*metrics(), "mif"}


def test_a_wrong_number_would_be_noticed(tmp_path: Path) -> None:
    path = load_plugin("published", "coin_a")
    assert isinstance(path, Path)
    content = yaml.safe_load(path.read_text())
    content["rows"][0]["aggregates"]["BWT"] = -37.29  # the other divisor
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    wrong = [c.name for c in recomputed(load_table(str(tmp_path / "own.yaml"))) if not c.follows]
    assert wrong == ["BWT"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"certainty": "sure"}, "certainty"),
        ({"aggregates": {"ACC": "ap"}}, "no metric is named"),
        ({"tasks": ["a", "b"]}, "cells are needed"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_tables_are_checked_when_read(tmp_path: Path, change: dict[str, object], fault: str) -> None:
    path = load_plugin("published", "coin_a")
    assert isinstance(path, Path)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    with pytest.raises(DeloError, match=fault):
        load_table(str(tmp_path / "own.yaml"))


def test_one_cell_has_one_value() -> None:
    row = {"method": "x", "immediate": [1, 2], "final": [1, 3]}
    protocol = {
        "task_seq": None,
        "data": "d",
        "start_weights": "w",
        "scoring": "compat",
        "split": "test",
        "order": "o",
    }
    with pytest.raises(ValueError, match="one cell"):
        PublishedTable.model_validate(
            {"title": "t", "source": "s", "certainty": "V", "protocol": protocol, "tasks": ["a", "b"],
             "aggregates": {}, "rows": [row]}
        )  # fmt: skip


def test_command_lists_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["published", "list"]) == 0 and main(["published"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in NAMES)
    assert main(["published", "show", "coin_a"]) == 0
    shown = capsys.readouterr().out
    assert "-32.62" in shown and "[C] recalled" in shown and "6 of 6 aggregates follow" in shown
    assert "BWT is bwt_T here" in shown and "Vicuna-7B-v1.5" in shown


def test_unknown_table_names_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["published", "show", "coin_c"])
    assert "did you mean coin_" in capsys.readouterr().err
