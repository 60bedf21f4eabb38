"""docs/support.md: what each method works with, every cell a passed test or the reason why not.

A test of the contract says which column it proves: `@pytest.mark.support("ZeRO {zero}")`, filled from its
parameters; its parameter `name` is the method. A cell passes if all its tests do.
"""

import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
TABLE, CELLS = DOCS / "support.md", DOCS / "support.json"
#: Column -> what is shown, in the table's order; `3_split` is ZeRO-3 with every parameter split.
COLUMNS = {
    "ZeRO 1": "ZeRO 1",
    "ZeRO 2": "ZeRO 2",
    "ZeRO 3_split": "ZeRO 3",
    "4 bit": "4 bit",
    "16 bit": "16 bit",
    "llava": "LLaVA",
    "qwen2_5_vl": "Qwen2.5-VL",
    "llava_next": "tiles (LLaVA-NeXT)",
    "resume": "resume",
    "beams": "beams",
    "merge": "merge",
}
HEAD = """# What works with what

Written by the tests: `pytest tests/contract --long --note_support`. A tick is a passed test of the contract;
where a cell says why not, that combination is refused before a model is loaded.

- ZeRO: two ranks learn what one process learns. resume: a run that was left or killed inside a stage goes on
  to the same bits, in one process and under every ZeRO stage.
- 4 bit, 16 bit: over NF4 and bfloat16 bases the same layers of the method's own train.
- families: start, training, files, answers in any company, missing modalities.
- beams: a row is answered alike in any company. merge: the merged model answers as the unmerged one.
"""


def cells_of(item: pytest.Item) -> list[tuple[str, str]]:
    """(method, column) of each cell that a test proves."""
    called = getattr(item, "callspec", None)
    if called is None or "name" not in called.params:
        return []
    columns = [mark.args[0].format(**called.params) for mark in item.iter_markers("support")]
    return [(called.params["name"], column) for column in columns if column in COLUMNS]


class Recorder:
    """Collects outcomes and writes the table."""

    def __init__(self) -> None:
        self.failed: set[tuple[str, str]] = set()
        self.reasons: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for key, cell in report.user_properties:
            if key != "support":
                continue
            cell = (cell[0], cell[1])
            if report.failed:
                self.failed.add(cell)
            elif report.skipped:
                self.reasons.setdefault(cell, _reason(report))
            elif report.when == "call":
                self.reasons[cell] = ""

    def pytest_sessionfinish(self) -> None:
        known = json.loads(CELLS.read_text()) if CELLS.is_file() else {}
        for method, column in sorted(self.failed | self.reasons.keys()):
            known.setdefault(method, {})[column] = (
                "failed" if (method, column) in self.failed else self.reasons[method, column]
            )
        CELLS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        TABLE.write_text(rendered(known))


def _reason(report: pytest.TestReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def rendered(cells: dict[str, dict[str, str]]) -> str:
    """The page."""
    reasons: list[str] = []

    def shown(value: str | None) -> str:
        if not value:
            return "not run" if value is None else "✓"
        if value not in reasons:
            reasons.append(value)
        return f"– ({reasons.index(value) + 1})"

    lines = [HEAD, f"| method | {' | '.join(COLUMNS.values())} |", f"|---|{'---|' * len(COLUMNS)}"]
    for method, row in sorted(cells.items()):
        told = {column: value.replace(f"`{method}` cannot", "it cannot") for column, value in row.items()}
        lines.append(f"| {method} | {' | '.join(shown(told.get(column)) for column in COLUMNS)} |")
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)), ""]
    return "\n".join(lines)
