"""Put runs side by side, or refuse to: the work behind `delo-llava compare`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from delo_eval.compare.comparison import BoardRow, Comparison
from delo_eval.compare.paired import pair
from delo_eval.compare.protocol import Difference, Protocol, differences
from delo_eval.compare.published import published_rows
from delo_eval.compare.runs import labels, load_runs, row_of, row_protocol, seed_groups
from delo_eval.matrix.results import floor_rows
from delo_eval.matrix.uncertainty import RESAMPLES
from delo_eval.published.base import load_table
from delo_llava.errors import DeloError

#: Fewest resamples whose 95 % interval says anything.
FEWEST = 100


def compare(
    folders: Sequence[Path],
    *,
    force: bool = False,
    published: Sequence[str] = (),
    resamples: int = RESAMPLES,
) -> Comparison:
    """Compare finished or equally far runs.

    Args:
        folders: run folders (or evaluation folders) with a results.json; predictions are read where they are.
            Marks and contrasts refer to the first.
        force: show rows that differ in metric, scorer, start weights, data, split, limit or missing pattern.
        published: names of published tables whose rows are added.
        resamples: of the paired bootstrap.

    Raises:
        DeloError: no results in a folder, too few resamples, or rows that differ (unless forced).
    """
    if resamples < FEWEST:
        raise DeloError("Too few resamples for an interval.", given=resamples, allowed=[f"{FEWEST} or more"])
    groups = seed_groups(load_runs(folders))
    names = labels(groups)
    by_name = dict(zip(names, groups, strict=True))
    rows = [row_of(group, name) for name, group in by_name.items()]
    protocols = {name: row_protocol(group) for name, group in by_name.items()}
    reference, first = names[0], groups[0][0]
    for name in published:
        for row, found in published_rows(load_table(name), first.results, protocols[reference]):
            rows.append(row)
            protocols[row.name] = found
    apart = differences(protocols)
    if apart and not force:
        raise refusal(apart)
    tasks = first.tasks
    return Comparison(
        tasks=tasks,
        rows=tuple(_ranked([_marked(row, apart, protocols, reference) for row in rows])),
        reference=reference,
        paired=tuple(
            pair((reference, groups[0]), (name, group), tasks, resamples)
            for name, group in by_name.items()
            if name != reference
        ),
        differences=tuple(apart),
        forced=bool(apart),
        stages={name: group[0].stages for name, group in by_name.items()},
        metric_ids=first.results["metric_ids"],
        scorer_ids=first.results["scorer_ids"],
        floors={
            label: {
                task: score
                for task, score in zip(first.results["tasks"], row, strict=True)
                if task in tasks and score is not None
            }
            for label, row in floor_rows(first.results)
        },
        notes=_notes(rows, tasks, len(first.results["tasks"])),
    )


def refusal(apart: Sequence[Difference]) -> DeloError:
    """The error that names every difference."""
    lines = "".join(f"\n  - {difference}" for difference in apart)
    return DeloError(
        f"These rows were not made and judged alike, so their numbers do not compare:{lines}",
        fix="evaluate them alike, or --force to show them with every difference marked",
    )


def _marked(
    row: BoardRow, apart: Sequence[Difference], protocols: Mapping[str, Protocol], reference: str
) -> BoardRow:
    """The row with the numbers of the differences in which it stands apart from the reference."""
    own, first = protocols[row.name], protocols[reference]
    marks = (i for i, d in enumerate(apart, start=1) if own.get(d.field) != first.get(d.field))
    return replace(row, marks=tuple(marks))


def _ranked(rows: Sequence[BoardRow]) -> list[BoardRow]:
    """Best AP first; rows without one last."""
    return sorted(rows, key=lambda row: -row.metrics["ap"].mean if "ap" in row.metrics else float("inf"))


def _notes(rows: Sequence[BoardRow], tasks: Sequence[str], total: int) -> tuple[str, ...]:
    """What holds for the whole table."""
    notes = []
    if len(tasks) < total:
        notes.append(f"Numbers stand on {len(tasks)} of {total} tasks: {', '.join(tasks)}.")
    if any(row.mode == "oracle" and row.published is None for row in rows):
        notes.append("Rows of mode `oracle` were told the true task of every record.")
    counts = {len(row.seeds) for row in rows if row.published is None}
    if len(counts) > 1:
        notes.append("Rows have different numbers of seeds.")
    if any(row.published for row in rows):
        notes.append(
            "Published rows are as printed by their source; data and scorers were matched by name only."
        )
    return tuple(notes)
