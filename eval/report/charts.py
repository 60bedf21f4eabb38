"""Line charts as plain geometry; the template draws them as inline SVG and escapes every label."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

#: The drawing area in the units of the SVG, close to the pixels of a phone so that text keeps its size.
WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 36

#: Styles of lines, told apart by dash and marker as well as by colour (classes `s0` … in the style sheet).
STYLES = 8


@dataclass(frozen=True)
class Line:
    """One line: (x, y) points in data units; `style` chooses colour, dash and marker."""

    label: str
    points: Sequence[tuple[float, float]]
    style: int = 0
    markers: bool = True


@dataclass(frozen=True)
class Chart:
    """What to draw.

    Attributes:
        title: shown above, and the name that screen readers say.
        summary: one sentence with what the picture says, for those who do not see it.
        x_ticks: (place, label); y ticks are chosen.
        y_range: (low, high), or None to fit the data.
        rules: vertical lines, for example between stages.
    """

    title: str
    lines: Sequence[Line]
    x_label: str = ""
    y_label: str = ""
    summary: str = ""
    x_ticks: Sequence[tuple[float, str]] = ()
    y_range: tuple[float, float] | None = None
    rules: Sequence[float] = ()
    ends: bool = False


@dataclass(frozen=True)
class Drawn:
    """A chart in SVG units, as the template needs it."""

    chart: Chart
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    rules: list[float]
    lines: list[dict[str, object]] = field(default_factory=list)

    @property
    def legend(self) -> list[tuple[str, int]]:
        """(label, style) of the lines, empty for a single one."""
        labels = list(dict.fromkeys((line.label, line.style % STYLES) for line in self.chart.lines))
        return labels if len(labels) > 1 else []


def drawn(chart: Chart) -> Drawn | None:
    """The chart laid out; None when it has no point."""
    points = [point for line in chart.lines for point in line.points]
    if not points:
        return None
    xs = [x for x, _ in points] + [x for x, _ in chart.x_ticks] + list(chart.rules)
    low_x, high_x = min(xs), max(xs)
    if low_x == high_x:
        low_x, high_x = low_x - 0.5, high_x + 0.5
    marks = ticks(*(chart.y_range or (min(y for _, y in points), max(y for _, y in points))))
    low_y, high_y = marks[0], marks[-1]

    def place(x: float) -> float:
        return round(LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT), 1)

    def level(y: float) -> float:
        return round(TOP + (high_y - y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM), 1)

    lines: list[dict[str, object]] = []
    for line in chart.lines:
        spots = [(place(x), level(y)) for x, y in line.points]
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in spots) if len(spots) > 1 else ""
        ends: list[tuple[float, float, str]] = []
        if chart.ends and spots:
            ends = [(*spots[i], number_text(line.points[i][1])) for i in sorted({0, len(spots) - 1})]
        lines.append(
            {"path": path, "spots": spots if line.markers or len(spots) == 1 else [],
             "style": line.style % STYLES, "ends": ends}
        )  # fmt: skip
    return Drawn(
        chart,
        [(place(x), label) for x, label in chart.x_ticks],
        [(level(y), number_text(y)) for y in marks],
        [place(x) for x in chart.rules],
        lines,
    )


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers that cover `low` … `high` in about `wanted` equal steps."""
    if not high > low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number_text(value: float) -> str:
    """A short label: `0.002`, `5e-05`, `67.5`."""
    text = f"{value:.3g}"
    return f"{value:.1f}".removesuffix(".0") if 1 <= abs(value) < 1000 else text
