"""Learning curves: what was logged at each step, all stages of the sequence one after the other."""

from collections.abc import Mapping

from delo_eval.report.charts import Chart, Drawn, Line, drawn
from delo_eval.report.content import Json, RunContent, value_at

#: More points than this in a stage are thinned out evenly; the eye cannot tell.
POINTS = 200


Course = list[tuple[float, float]]


def learning(content: RunContent) -> list[Drawn]:
    """Charts of each loss term, the learning rates and the gradient norm; empty without a log."""
    stages = _stages(content)
    terms = list(dict.fromkeys(name for s in content.steps for name in s.get("terms", {})))
    rates = list(dict.fromkeys(name for s in content.steps for name in s.get("lr", {})))
    wanted: dict[str, dict[str, tuple[str, ...]]] = {"loss": {"loss": ("loss",)}}
    if len(terms) > 1:
        wanted |= {f"loss term {term}": {term: ("terms", term)} for term in terms}
    wanted["learning rate"] = {rate: ("lr", rate) for rate in rates}
    wanted["gradient norm before clipping"] = {"gradient norm": ("grad_norm",)}
    charts = [_chart(title, series, stages) for title, series in wanted.items()]
    return [chart for chart in charts if chart is not None]


def loss_overlay(contents: Mapping[str, RunContent]) -> Drawn | None:
    """The loss of several runs in one chart; the borders are those of the first."""
    lines, borders = [], [0.0]
    for style, (name, content) in enumerate(contents.items()):
        stages = _stages(content)
        starts = _starts(stages)
        borders = starts if style == 0 else borders
        lines += [Line(name, part, style, markers=False) for part in _courses(("loss",), stages, starts)]
    return _drawn("loss", lines, borders)


def _stages(content: RunContent) -> list[list[Json]]:
    """The logged steps of each stage."""
    return [_thinned([s for s in content.steps if s["stage"] == i]) for i in range(len(content.plan.stages))]


def _chart(title: str, series: Mapping[str, tuple[str, ...]], stages: list[list[Json]]) -> Drawn | None:
    """One figure over the steps of all stages; its lines break where a stage ends.

    Args:
        series: label -> where each logged step holds the value.
    """
    starts = _starts(stages)
    courses = {name: _courses(path, stages, starts) for name, path in series.items()}
    if len(courses) > 1 and len({str(parts) for parts in courses.values()}) == 1:
        courses = {" = ".join(courses): next(iter(courses.values()))}
    lines = [
        Line(name, part, style, markers=False)
        for style, (name, parts) in enumerate(courses.items())
        for part in parts
    ]
    return _drawn(title, lines, starts)


def _drawn(title: str, lines: list[Line], starts: list[float]) -> Drawn | None:
    """A chart over the steps of a sequence whose stages begin at `starts`; None without a point."""
    values = [y for line in lines for _, y in line.points]
    if not values:
        return None
    borders = enumerate(zip(starts, starts[1:], strict=False))
    return drawn(
        Chart(
            title=title, lines=lines, x_label="stage (steps one after the other)",
            x_ticks=[((a + b) / 2, str(i + 1)) for i, (a, b) in borders if b > a],
            y_range=(min(0.0, *values), max(values)), rules=starts,
            summary=f"{title} over {starts[-1]:.0f} steps, between {min(values):.3g} and {max(values):.3g}.",
        )
    )  # fmt: skip


def _courses(path: tuple[str, ...], stages: list[list[Json]], starts: list[float]) -> list[Course]:
    """One value over the steps of each stage that has it."""
    parts = [
        [(start + step["step"], float(y)) for step in steps if (y := value_at(step, *path)) is not None]
        for start, steps in zip(starts, stages, strict=False)
    ]
    return [part for part in parts if part]


def _starts(stages: list[list[Json]]) -> list[float]:
    """The first step of each stage in the sequence, and the end of the last that has steps."""
    starts = [0.0]
    for steps in stages:
        starts.append(starts[-1] + (steps[-1]["step"] + 1 if steps else 0))
    return starts


def _thinned(steps: list[Json]) -> list[Json]:
    """At most `POINTS` of a stage's steps, the last among them."""
    stride = -(-len(steps) // POINTS)
    return steps if stride <= 1 else [*steps[:-1:stride], steps[-1]]
