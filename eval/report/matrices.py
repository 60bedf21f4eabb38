"""The matrix as tables of coloured cells, forgetting as small charts, task choice as confusion tables."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from delo_eval.matrix.accuracy import RUN_PATTERN, ZERO_SHOT, Cells
from delo_eval.matrix.plan import Plan
from delo_eval.matrix.results import floor_rows, standard_errors
from delo_eval.report.charts import Chart, Drawn, Line, drawn
from delo_eval.report.colour import step_of
from delo_eval.report.content import Json, RunContent

MODE_WORDS = {"matched": "matched: the method's own task choice", "oracle": "oracle: the true task told"}


@dataclass(frozen=True)
class HeatCell:
    """One coloured cell: text, a smaller second line, a palette step (None: plain), words for the pointer."""

    text: str
    note: str = ""
    step: int | None = None
    title: str = ""


@dataclass(frozen=True)
class HeatTable:
    """A table of coloured cells; `corner` names what rows and columns are."""

    caption: str
    corner: str
    columns: list[str]
    rows: list[tuple[str, list[HeatCell]]]


def matrices(content: RunContent) -> list[dict[str, Any]]:
    """Per missing pattern: its name, a description, and a table for each mode that was run."""
    found = []
    for pattern in content.patterns:
        tables = [table for mode in content.results["modes"] if (table := heat_table(content, pattern, mode))]
        if len(tables) == 2 and content.patterns[pattern]["matched"] == content.patterns[pattern]["oracle"]:
            tables = [replace(tables[0], caption="matched and oracle: the same scores")]
        if tables:
            found.append({"name": pattern, "about": pattern_words(content, pattern), "tables": tables})
    return found


def heat_table(content: RunContent, pattern: str, mode: str) -> HeatTable | None:
    """Stage × task of one pattern and mode; stages that were not evaluated are left out."""
    results, tasks, plan = content.results, content.tasks, content.plan
    grid: list[Cells] = content.patterns[pattern][mode]
    rows: list[tuple[str, list[HeatCell]]] = []
    zero_shot = (results["zero_shot"] or {}).get(pattern)
    if zero_shot and mode == content.headline_mode:
        errors = standard_errors(results, pattern, mode, ZERO_SHOT)
        cells = [_score(s, e, "zero-shot") for s, e in zip(zero_shot, errors, strict=True)]
        rows.append(("before training" if plan.stages else "base", [*cells, _mean(zero_shot)]))
    done = [i for i, row in enumerate(grid) if any(score is not None for score in row)]
    for i in done:
        errors, name, seen = standard_errors(results, pattern, mode, i), plan.names[i], plan.seen(i)
        cells = [
            _score(s, e, f"{task} after {name}", untrained=task not in seen)
            for task, s, e in zip(tasks, grid[i], errors, strict=True)
        ]
        trained = [s for task, s in zip(tasks, grid[i], strict=True) if task in seen]
        rows.append((f"{i + 1} {name}", [*cells, _mean(trained)]))
    if not done and (plan.stages or not rows):
        return None
    if len(done) > 1:
        rows.append(("change since learnt", _changes(grid, plan, done[-1])))
    for label, row in floor_rows(results):
        rows.append((label, [*(_score(s, None, label) for s in row), _mean(row)]))
    columns = [*tasks, "mean of trained" if plan.stages else "mean"]
    return HeatTable(MODE_WORDS[mode], "after training ↓\nscore on →", columns, rows)


def pattern_words(content: RunContent, pattern: str) -> str:
    """What a missing pattern takes away from the test records."""
    if pattern == RUN_PATTERN:
        return f"the run's own: {missing_words(content.results['missing']['spec'])}"
    known = {
        "complete": "nothing is taken away",
        "image": "every record loses its image",
        "text": "every record loses its context",
    }
    return known.get(pattern, "")


def missing_words(spec: Json) -> str:
    """A missing specification in words."""
    if not spec["ratio"]:
        return "nothing is missing"
    what = {"image": "the image", "text": "the context", "both": "image or context (half each)"}[spec["kind"]]
    return f"{spec['ratio']:.0%} of the records lose {what}; a missing image is {spec['image']}"


def forgetting(content: RunContent) -> list[Drawn]:
    """A chart of the mean over trained tasks, then one per task from its own stage on; none where there is
    no later stage to forget in.
    """
    tasks, modes, plan = content.tasks, content.results["modes"], content.plan
    if content.latest is None or (not plan.one_task_each and plan.last < 1):
        return []
    marks = [(float(i), str(i + 1)) for i in range(len(plan.stages))]
    charts = []
    for j, name in enumerate(["mean of trained tasks", *tasks]):
        lines = [
            Line(mode, points, style)
            for style, mode in enumerate(modes)
            if (points := course(content, mode, j - 1 if j else None))
        ]
        if not lines:
            continue
        # Drawn twice at the same place, two lines say no more than one.
        if len(lines) == 2 and list(lines[0].points) == list(lines[1].points):
            lines = [Line("matched = oracle", lines[0].points, lines[0].style)]
        top = max(100.0, *(y for line in lines for _, y in line.points))
        chart = Chart(
            title=name, lines=lines, x_label="after stage", y_label="score %", x_ticks=marks,
            y_range=(0.0, top), ends=True, summary=_spoken(name, lines),
        )  # fmt: skip
        figure = drawn(chart)
        if figure is not None:
            charts.append(figure)
    return charts


def course(content: RunContent, mode: str, task: int | None) -> list[tuple[float, float]]:
    """(stage, score) of one task, or of the mean over trained tasks (None), from the first it exists in."""
    plan, points = content.plan, []
    for i, row in enumerate(content.results["matrix"][mode]):
        seen, wanted = plan.seen(i), plan.tasks if task is None else [plan.tasks[task]]
        known = [row[plan.tasks.index(name)] for name in wanted if name in seen]
        if known and None not in known:
            points.append((float(i), sum(known) / len(known)))
    return points


def _spoken(name: str, lines: Sequence[Line]) -> str:
    parts = [
        f"{line.label}: {line.points[0][1]:.1f} at first, {line.points[-1][1]:.1f} at last" for line in lines
    ]
    return f"Score on {name}, in percent. " + "; ".join(parts) + "."


def confusions(content: RunContent) -> list[dict[str, Any]]:
    """Per pattern of the latest stage with a choice: tables with and without the instruction."""
    choices = content.results["task_choice"] or {}
    if not choices:
        return []
    stage = max(choices, key=int)
    return [
        {
            "name": pattern,
            "stage": content.plan.names[int(stage)],
            "fallbacks": without_choice(found),
            "tables": [
                _confusion(content, f"{words} ({found['accuracy' + suffix]:.1f} % right)",
                           found["confusion" + suffix], int(stage))
                for suffix, words in (("", "all views"), ("_without_instruction", "without the instruction"))
            ],
        }
        for pattern, found in choices[stage].items()
    ]  # fmt: skip


def without_choice(choice: Json) -> list[str]:
    """How many records of each task have no choice, in words."""
    kinds = (("", "in all views"), ("_without_instruction", "without the instruction"))
    what = {
        "fallback": "showed nothing to choose by {} and were answered as the first task",
        "void": "got no choice {} and count as wrong",
    }
    return [
        f"{task}: {count} records {told.format(words)}"
        for key, told in what.items()
        for suffix, words in kinds
        for task, count in choice.get(key + suffix, {}).items()
    ]


def _confusion(content: RunContent, caption: str, counts: list[list[int]], stage: int) -> HeatTable:
    """Counts, coloured by their share of the true task's records; tasks that are not trained are left out."""
    tasks = list(content.plan.seen(stage))
    place, rows = [content.tasks.index(task) for task in tasks], []
    for i, name in zip(place, tasks, strict=True):
        total = sum(counts[i]) or 1
        cells = [
            HeatCell(
                str(counts[i][j]), "", step_of(100 * counts[i][j] / total),
                f"{name} taken for {chosen}: {counts[i][j]} of {total}",
            )
            for j, chosen in zip(place, tasks, strict=True)
        ]  # fmt: skip
        rows.append((name, cells))
    return HeatTable(caption, "true ↓\nchosen →", tasks, rows)


def _score(score: float | None, error: float | None, title: str, untrained: bool = False) -> HeatCell:
    if score is None:
        return HeatCell("–", title=f"{title}: not run")
    note = "" if error is None else f"± {error:.1f}"
    said = f"{title}: {score:.2f}{' ' + note if note else ''}{' (not trained yet)' if untrained else ''}"
    return HeatCell(f"{score:.1f}{'·' if untrained else ''}", note, step_of(score), said)


def _mean(row: Cells) -> HeatCell:
    known = [score for score in row if score is not None]
    if not known or len(known) < len(row):
        return HeatCell("–")
    mean = sum(known) / len(known)
    return HeatCell(f"{mean:.1f}", "", step_of(mean), f"mean of {len(known)} tasks: {mean:.2f}")


def _changes(grid: list[Cells], plan: Plan, last: int) -> list[HeatCell]:
    """Points gained or lost on each task since its own stage, and their mean."""
    changes: Cells = []
    earlier = 0
    for j, task in enumerate(plan.tasks):
        own = plan.own(task)
        if own is None or own >= last:
            changes.append(None)
            continue
        earlier += 1
        then, now = grid[own][j], grid[last][j]
        changes.append(None if then is None or now is None else now - then)
    known = [change for change in changes if change is not None]
    mean = sum(known) / len(known) if known and len(known) == earlier else None
    return [HeatCell("–" if c is None else f"{c:+.1f}") for c in [*changes, mean]]
