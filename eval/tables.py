"""Tables before they have a format, and in the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import TextType


@dataclass(frozen=True)
class Sheet:
    """A table before it has a format.

    Attributes:
        rows: cells by row; the first `words` columns are text, the others numbers.
        best: (row, column) of the best numbers.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    best: frozenset[tuple[int, int]] = frozenset()


def rich_table(title: TextType, heads: Sequence[TextType], words: int = 1) -> Table:
    """An empty table for the terminal: the first `words` columns stand left, the others right."""
    table = Table(title=title, title_justify="left")
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < words else "right")
    return table


def score_text(score: float | None, mark: str = "", error: float | None = None) -> str:
    """`45.00`, `45.00·` with a mark, `45.00 (1.2)` with its standard error, `-` where there is none."""
    if score is None:
        return "-"
    return f"{score:.2f}{mark}" if error is None else f"{score:.2f}{mark} ({error:.1f})"


def show(*parts: RenderableType) -> None:
    """Write tables and lines to standard output; numbers are never cut to a narrow terminal or pipe, while
    lines keep to its width.
    """
    console = Console()
    own = console.width
    for part in parts:
        needed = Measurement.get(console, console.options.update(max_width=10_000), part).maximum
        console.width = max(own, needed) if isinstance(part, Table) else own
        console.print(part)
