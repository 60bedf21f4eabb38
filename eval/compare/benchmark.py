"""The page of a benchmark: one table of all rows, then per setting costs, intervals and a picture."""

import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from delo_eval.compare.assemble import compare
from delo_eval.compare.comparison import BoardRow, Comparison, Value
from delo_eval.compare.leaderboard import markdown, markdown_table, value_text
from delo_eval.compare.runs import settings_of, spread
from delo_eval.compare.seeds import summarise_seeds
from delo_eval.matrix.general import adapters_of
from delo_eval.matrix.plan import Plan
from delo_eval.matrix.plots import DPI, Point, points
from delo_eval.matrix.results import FILE, FLOORS, WORDED, json_text, judged_mode, read_results
from delo_eval.tables import Sheet
from delo_llava.cluster.benchmark import NEUTRAL, SETTINGS, TRIALS, WORDING, Benchmark, Entry, Planned
from delo_llava.data.recipe import read_recipe
from delo_llava.files import read_json, write_text_atomic
from delo_llava.runs.store import RunStore

#: Head of the column with the time of answering.
DECODING_HEAD = "decoding ÷ base"
#: Head of the column of runs that were trained with one wording for all tasks.
NEUTRAL_HEAD = "trained with one wording"
#: Training is compared with this method's, where it was run.
YARDSTICK = "lora"


def chosen_factor(plan: Benchmark, entry: Entry) -> float:
    """The factor of the learning rate with the best validation score on the first task, noted in
    `rates/<label>.json`; of equal ones the nearest to the method's own rate. A trial without a score loses.
    """
    scores = {factor: _validated(plan.trial(entry, factor)) for factor in plan.factors}
    known = {factor: score for factor, score in scores.items() if score is not None}

    def rates(factor: float) -> float:
        return plan.rates(entry, factor)["lr"]

    best = min(known, key=lambda f: (-known[f], abs(math.log(f)), f), default=1.0)
    noted = {
        "method": entry.label,
        "setting": plan.settings[0],
        "seed": plan.seeds[0],
        "tried": [{"factor": f, "rate": rates(f), "validation": s} for f, s in scores.items()],
        "factor": best,
        "rate": rates(best),
    }
    write_text_atomic(_note(plan, entry), json_text(noted))
    return best


def write_page(plan: Benchmark, page: Path, note: str = "") -> str:
    """Write the page and its pictures, of what is finished; returns what to say of it.

    Args:
        note: a sentence for readers, below the head.

    Raises:
        DeloError: seeds of one row were not made alike.
    """
    table = summarise_seeds(plan.output, plan.settings, [entry.label for entry in plan.entries])
    found = {setting: _comparison(plan, setting) for setting in plan.settings}
    parts = [_head(plan), note and f"{note}\n", _rates(plan), f"## All rows\n\n{table}\n"]
    for setting, comparison in found.items():
        if comparison is not None:
            parts.append(_section(plan, setting, comparison, page))
    if absent := list(_absent(plan)):
        parts.append("## Not finished\n\n" + "\n".join(f"- {name}" for name in absent) + "\n")
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(page, "\n".join(part for part in parts if part))
    return f"{table}\npage: {page}\n"


def lacks_wording(run: Planned) -> bool:
    """Whether the run's method chooses the task, and was not asked yet in one wording for all."""
    results = read_results(run.folder)
    asked = (run.folder / WORDED / FILE).is_file()
    return results is not None and results["task_choice_accuracy"] is not None and not asked


def lacks_general(run: Planned, stage: str) -> bool:
    """Whether tasks kept aside are still to be asked of a finished run's `zero-shot` or `last` stage.

    A method that needs the true task is asked before any training only.
    """
    results = read_results(run.folder)
    if results is None or (stage == "last" and "matched" not in results["modes"]):
        return False
    known = results.get("general") or {}
    return known.get("base" if stage == "zero-shot" else "last") is None


def lacks_decoding(plan: Benchmark, entry: Entry) -> bool:
    """Whether the time of answering is still to be measured of a method that trains something.

    It is measured once for a method, and anew when none of its runs has the adapters that were measured.
    """
    found = []
    for run in (run for run in plan.runs(entry, 1.0) if run.finished):
        stages = Plan.read(read_results(run.folder) or {"tasks": [], "plan": []})
        if stages.stages:
            found.append(adapters_of(RunStore(run.folder), stages, stages.last))
    known = _decoding(plan).get(entry.label)
    return bool(found) and (known is None or known["adapters"] not in found)


def _decoding(plan: Benchmark) -> dict[str, dict[str, Any]]:
    """Label of a method -> what was measured of its answering."""
    files = {entry.label: plan.decoding_file(entry) for entry in plan.entries}
    told = "run the benchmark again"
    return {label: read_json(f, "A time of answering", told) for label, f in files.items() if f.is_file()}


def _note(plan: Benchmark, entry: Entry) -> Path:
    return plan.output / TRIALS / f"{entry.label}.json"


def _validated(trial: Planned) -> float | None:
    results = read_results(trial.folder)
    if results is None or not trial.finished:
        return None
    score: float | None = results["metrics"][judged_mode(results)]["ap"]
    return score


def _finished(plan: Benchmark, setting: str) -> list[Path]:
    """Folders of finished runs, in the order of the methods asked for."""
    runs = (plan.run(entry, setting, seed, 1.0) for entry in plan.entries for seed in plan.seeds)
    return [run.folder for run in runs if run.finished]


def _absent(plan: Benchmark) -> Iterator[str]:
    for setting in plan.settings:
        for entry in plan.entries:
            lacking = [s for s in plan.seeds if not plan.run(entry, setting, s, 1.0).finished]
            if lacking:
                yield f"{setting}, {entry.label}: seeds {', '.join(map(str, lacking))}"


def _comparison(plan: Benchmark, setting: str) -> Comparison | None:
    """The setting's runs side by side, differences marked; None before anything is finished."""
    folders = _finished(plan, setting)
    return compare(folders, force=True) if folders else None


def _head(plan: Benchmark) -> str:
    words = f"; every run with `{' '.join(plan.words)}`" if plan.words else ""
    return (
        f"# {read_recipe(plan.task_seq).name}: methods compared\n\n"
        "Written by `delo-llava benchmark`; not edited by hand. All rows have the same base, data, missing "
        f"records, batches and steps{words}. Seeds: {', '.join(map(str, plan.seeds))}. Settings: "
        + "; ".join(f"`{name}`: `{' '.join(SETTINGS[name])}`" for name in plan.settings)
        + ".\n"
    )


def _rates(plan: Benchmark) -> str:
    """How each method came to its learning rate."""
    notes = {entry.label: _note(plan, entry) for entry in plan.entries}
    known = {label: read_json(file, "Rates", "run the benchmark again") for label, file in notes.items()
             if file.is_file()}  # fmt: skip
    if not known:
        return ""
    factors = list(dict.fromkeys(tried["factor"] for note in known.values() for tried in note["tried"]))
    rows = []
    for label, note in known.items():
        scores = {tried["factor"]: tried["validation"] for tried in note["tried"]}
        cells = ("–" if scores.get(f) is None else f"{scores[f]:.1f}" for f in factors)
        rows.append((label, f"{note['rate']:g}", f"×{note['factor']:g}", *cells))
    heads = ("method", "rate", "factor", *(f"val ×{f:g}" for f in factors))
    about = (
        "Chosen for each method by the first task's validation records, from factors of its own rate; "
        "of equal scores the nearest to it.\n"
    )
    return f"## Learning rates\n\n{about}\n{markdown_table(Sheet('', heads, rows))}\n"


def _section(plan: Benchmark, setting: str, comparison: Comparison, page: Path) -> str:
    picture = page.with_name(f"{page.stem}-{setting}.png")
    _draw(comparison, picture)
    parts = [f"## {setting}\n", f"![AP and forgetting of every method]({picture.name})\n"]
    if unbeaten := list(_unbeaten(comparison)):
        parts.append(f"No method beats the most frequent answer on: {', '.join(unbeaten)}.\n")
    if choices := _choices(comparison, plan.output / setting, NEUTRAL.get(setting)):
        told = f"One wording: every instruction was replaced by “{WORDING}”, after the last stage."
        if NEUTRAL_HEAD in choices.heads:
            told += f" {NEUTRAL_HEAD}: runs of their own (`{NEUTRAL[setting]}`), with the instruction."
        parts.append(f"### Task chosen right, %\n\n{markdown_table(choices)}\n\n{told}\n")
    if general := _general(comparison):
        told = "Tasks that no stage trains, with nothing missing; the task is chosen as in real use."
        parts.append(f"### General ability, %\n\n{markdown_table(general)}\n\n{told}\n")
    times = _decoding(plan)
    parts.append("### Costs\n\n" + markdown_table(_costs(comparison, times)))
    if times:
        parts.append(f"\n{_worth(times)}")
    parts.append(
        "\nTraining times are of separate runs, one after the other; `benchmarks/step_time.py` measures side "
        "by side. Files: adapters of all stages, statistics included.\n"
    )
    parts.append(markdown(comparison).replace("\n## ", "\n### ").replace("## ", "### ", 1))
    return "\n".join(parts)


def _unbeaten(comparison: Comparison) -> Iterator[str]:
    """Tasks on which no row is above the most frequent answer."""
    label = next(label for label, key in FLOORS.items() if key == "majority")
    majority = comparison.floors.get(label, {})
    for task in comparison.tasks:
        scores = [row.scores[task].mean for row in comparison.rows if task in row.scores]
        if task in majority and scores and max(scores) <= majority[task]:
            yield task


def _choices(comparison: Comparison, folder: Path, neutral: str | None) -> Sheet | None:
    """How often methods chose the right task by what; None where none chooses.

    Args:
        folder: of the setting's runs.
        neutral: the setting of the same runs trained with one wording; a column where there are any.
    """
    rows: list[tuple[str, ...]] = []
    trained: list[Value | None] = []
    for row in comparison.rows:
        keys = ("task_choice_accuracy", "task_choice_accuracy_without_instruction")
        if keys[0] in row.extras:
            worded = (read_results(folder / WORDED) for folder in row.folders)
            found = [r[keys[0]] for r in worded if r is not None and r["task_choice_accuracy"] is not None]
            one = spread(found) if len(found) == len(row.folders) else None
            rows.append((row.name, *(value_text(row.extras.get(key)) for key in keys), value_text(one)))
            trained.append(_neutral_choice(row, folder.with_name(neutral) if neutral else None))
    heads: tuple[str, ...] = ("method", "with the instruction", "without it", "one wording")
    if any(found is not None for found in trained):
        heads = (*heads, NEUTRAL_HEAD)
        rows = [(*row, value_text(found)) for row, found in zip(rows, trained, strict=True)]
    return Sheet("Task choice", heads, rows) if rows else None


def _neutral_choice(row: BoardRow, folder: Path | None) -> Value | None:
    """How often the same seeds chose right where training and test had one wording; None unless all did."""
    runs = [folder / own.name for own in row.folders] if folder else []
    finished = (read_results(run) for run in runs if (run / "complete.json").is_file())
    found = [r["task_choice_accuracy"] for r in finished if r is not None]
    return spread(found) if found and len(found) == len(runs) and None not in found else None


def _general(comparison: Comparison) -> Sheet | None:
    """What tasks kept aside score with the base and after the last stage; None where they were not asked."""
    rows = []
    for row in comparison.rows:
        runs = [r for folder in row.folders if (r := read_results(folder)) and r.get("general")]
        if len(runs) < len(row.folders):
            continue
        found = []
        for key in ("base", "last", "change"):
            values = [r["general"][key] for r in runs if r["general"][key] is not None]
            found.append(spread(values) if len(values) == len(runs) else None)
        rows.append((row.name, *map(value_text, found)))
    heads = ("method", "base", "after the last stage", "change, points")
    return Sheet("General ability", heads, rows) if rows else None


def _worth(times: Mapping[str, Mapping[str, Any]]) -> str:
    """How the times of answering were measured, and what they are worth."""
    controls = [found["control"] for found in times.values()]
    low, high = min(c["low"] for c in controls), max(c["high"] for c in controls)
    return (
        f"{DECODING_HEAD}: time of answering with the last stage ÷ the bare base's, task choice included, "
        "every answer with all its tokens: median (quartiles) of pairs taken in turn in one process, of one "
        f"run of each method. The base against itself, measured alike, lay between {low:.2f} and {high:.2f} "
        "(quartiles): smaller differences say nothing."
    )


def _decoded(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    ratio = found["ratio"]
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _costs(comparison: Comparison, decoding: Mapping[str, Mapping[str, Any]]) -> Sheet:
    """Trained parameters, files and training time of each row, the time also as a share of LoRA's; where it
    was measured the time of answering.
    """
    times = {row.name: _train_seconds(row) for row in comparison.rows}
    base = next((times[row.name] for row in comparison.rows if row.method == YARDSTICK), None)
    rows: list[tuple[str, ...]] = []
    for row in comparison.rows:
        seconds = times[row.name]
        ratio = f"{seconds / base:.2f}" if base and seconds else "–"
        size = statistics.fmean(_bytes(folder) for folder in row.folders) / max(1, len(comparison.tasks))
        rows.append(
            (
                row.name,
                value_text(row.extras.get("parameters_per_task")),
                _learning_rate(row),
                f"{size / 1e6:.2f}",
                f"{seconds:.0f}" if seconds else "–",
                ratio,
            )
        )
    sizes = ("trained parameters a task", "learning rate", "files a task, MB")
    heads = ["method", *sizes, "training, s", f"÷ {YARDSTICK}"]
    if decoding:
        heads.append(DECODING_HEAD)
        labels = [row.folders[0].name.rpartition("-s")[0] for row in comparison.rows]  # <label>-s<seed>
        rows = [(*row, _decoded(decoding.get(name))) for row, name in zip(rows, labels, strict=True)]
    return Sheet("Costs", heads, rows)


def _learning_rate(row: BoardRow) -> str:
    """The rate that the row's runs had, and a projector's own; all that there are, should they differ."""
    stored = [settings_of(folder) for folder in row.folders]
    keys = {"train.lr": "", "train.projector_lr": "projector "}
    found = (f"{about}{s[key]:g}" for key, about in keys.items() for s in stored if s.get(key) is not None)
    return ", ".join(dict.fromkeys(found)) or "–"


def _train_seconds(row: BoardRow) -> float:
    """Median over seeds of the seconds that all stages trained."""
    found = (read_results(folder) for folder in row.folders)
    return float(statistics.median(sum(r["seconds"]["train"]) for r in found if r is not None))


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / "adapters").rglob("*") if file.is_file())


def _draw(comparison: Comparison, picture: Path) -> None:
    """AP over forgetting, a point with its deviation over seeds for every row that has both."""
    both = {
        row.name: (row.metrics["forgetting"], row.metrics["ap"])
        for row in comparison.rows
        if {"ap", "forgetting"} <= row.metrics.keys()
    }
    places: dict[str, Point] = {name: ((x.mean, x.std), (y.mean, y.std)) for name, (x, y) in both.items()}
    picture.parent.mkdir(parents=True, exist_ok=True)
    points(places, "forgetting (points)", "AP (%)").savefig(picture, dpi=DPI)
