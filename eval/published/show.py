"""A published table in the terminal."""

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from delo_eval.published.base import CERTAINTY, PublishedRow, PublishedTable, recomputed
from delo_eval.tables import rich_table, score_text


def shown(table: PublishedTable) -> list[RenderableType]:
    """The rows as printed, then source, certainty, protocol, notes, and which aggregates follow."""
    protocol = table.protocol
    facts = [
        f"source: {table.source}",
        f"certainty: [{table.certainty}] {CERTAINTY[table.certainty]}",
        f"start weights: {protocol.start_weights}",
        f"data: {protocol.data}",
        f"scoring: {protocol.scoring}; split: {protocol.split}; column order: {protocol.order}",
        *([f"training: {protocol.training}"] if protocol.training else []),
        *(f"{printed} is {metric} here" for printed, metric in table.aggregates.items()),
        *(f"{row.method}: {row.note}" for row in table.rows if row.note),
        *table.notes,
        *_verdicts(table),
    ]
    return [_rows(table), *map(Text, facts)]


def _rows(table: PublishedTable) -> Table:
    shown = rich_table(Text(table.title), [Text(head) for head in ("", *table.tasks, *table.aggregates)])
    for row in table.rows:
        if row.immediate is not None:
            shown.add_row(Text(f"{row.method}, right after its training"), *map(score_text, row.immediate))
        shown.add_row(Text(row.method), *_final(table, row))
    return shown


def _final(table: PublishedTable, row: PublishedRow) -> list[str]:
    cells = row.final or (None,) * len(table.tasks)
    return [*map(score_text, cells), *(score_text(row.aggregates.get(name)) for name in table.aggregates)]


def _verdicts(table: PublishedTable) -> list[str]:
    """One line for all aggregates that follow, one for each that does not or cannot be recomputed."""
    done = list(recomputed(table))
    follow = [check for check in done if check.follows]
    lines = [f"recomputed: {len(follow)} of {len(done)} aggregates follow from their rows within rounding"]
    lines += [
        f"does not follow: {c.method} {c.name} {c.printed}, recomputed {c.recomputed:.3f}"
        for c in done
        if not c.follows
    ]
    reasons = {**table.unchecked}
    for row in table.rows:
        reasons |= {f"{row.method} {name}": reason for name, reason in row.unchecked.items()}
    return lines + [f"not recomputed: {name}, {reason}" for name, reason in reasons.items()]
