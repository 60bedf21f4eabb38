"""Rows of published tables beside runs, where the protocol matches."""

from collections.abc import Iterator
from pathlib import Path

from delo_eval.compare.comparison import BoardRow, Value
from delo_eval.compare.protocol import Protocol
from delo_eval.matrix.results import ResultsJson
from delo_eval.published.base import CERTAINTY, PublishedRow, PublishedTable


def published_rows(
    table: PublishedTable, reference: ResultsJson, protocol: Protocol
) -> Iterator[tuple[BoardRow, Protocol]]:
    """The table's trained rows for a comparison, each with its protocol.

    What a publication does not tell (hashes, versions of scorers) is taken to be as in the reference run: the
    match is one of names. A metric is shown under this project's name of the same convention.
    """
    told = table.protocol
    same_start = reference["start_weights"].get("name") in told.start_names
    same_data = told.task_seq is not None and Path(str(reference["task_seq"])).stem == told.task_seq
    declared = {
        "tasks": list(table.tasks),
        "tasks_seen": list(table.tasks),
        "split": told.split,
        "limit": None,
        "scoring": told.scoring,
        "missing.ratio": 0,
        "start_weights": protocol["start_weights"] if same_start else told.start_weights,
    }
    kept = {key: value for key, value in protocol.items() if key != "missing.seed" and key != "missing.kind"}
    found = {**kept, **declared} if same_data else {**kept, **declared, "published data": told.data}
    for row in table.rows:
        if row.kind == "trained":
            yield _row(table, row), found


def _row(table: PublishedTable, row: PublishedRow) -> BoardRow:
    cells = zip(table.tasks, row.final or [None] * len(table.tasks), strict=True)
    tag = f"[{table.certainty}] {CERTAINTY[table.certainty]}"
    return BoardRow(
        name=f"{row.method} ({table.source})",
        method=row.method,
        mode="published",
        scores={task: Value(cell) for task, cell in cells if cell is not None},
        metrics={table.aggregates[name]: Value(value) for name, value in row.aggregates.items()},
        published=f"{table.title}; {table.source}; {tag}",
        notes=tuple(filter(None, (row.note, *table.notes))),
    )
