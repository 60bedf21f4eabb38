"""The page from its parts: `report.html` of one run."""

import base64
import hashlib
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError, select_autoescape
from markupsafe import Markup
from rich.console import Console

from delo_eval.matrix.general import general_line, general_rows
from delo_eval.report import charts, summary
from delo_eval.report.analysis import error_tables
from delo_eval.report.colour import palette_css
from delo_eval.report.content import RunContent, read_content
from delo_eval.report.flips import forgetting_causes
from delo_eval.report.learning import learning
from delo_eval.report.matrices import confusions, forgetting, matrices, missing_words
from delo_eval.report.routing import PoolUse, routing
from delo_eval.report.samples import samples
from delo_llava.data.omitted import LABELS
from delo_llava.errors import DeloError
from delo_llava.files import write_text_atomic

FILE, FAILED = "report.html", "report.failed.txt"

#: What a damaged file, an odd record or a mistake in a template raises.
FAULTS = (
    DeloError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, TemplateError,
)  # fmt: skip

SECTIONS = (
    ("overview", "Overview"), ("matrix", "Scores"), ("forgetting", "Forgetting"), ("metrics", "Metrics"),
    ("choice", "Task choice"), ("routing", "Routing"), ("general", "General ability"),
    ("learning", "Learning"), ("errors", "Errors"), ("samples", "Samples"), ("run", "What was run"),
)  # fmt: skip


def write_report(run: Path, output: Path | None = None) -> Path:
    """Write `report.html` about a run, as far as it came, beside its results, and return its path.

    Args:
        run: the run's folder.
        output: the folder of another evaluation of it; the run's own by default.

    Raises:
        DeloError: nothing was evaluated, or a file of the run is damaged.
    """
    content = read_content(run, output)
    file = content.folder / FILE
    write_text_atomic(file, render("report.html.j2", report_parts(content)))
    (content.folder / FAILED).unlink(missing_ok=True)
    return file


def try_report(run: Path, output: Path) -> Path | None:
    """`write_report` after a stage, where a fault of the page must not end a training of days.

    Results and predictions are on the disk by then. A fault is told, and recorded in `report.failed.txt`
    until a report succeeds; `delo-eval report` makes the page later.

    Returns:
        the page, or None where it could not be made.
    """
    try:
        return write_report(run, output)
    except FAULTS as error:
        record = output / FAILED
        with suppress(OSError):  # a disk without room for the page may have none for this either
            write_text_atomic(record, traceback.format_exc())
        Console(stderr=True).print(
            f"The report could not be made ({error}); results are complete, see {record}. "
            f"`delo-eval report --run {run}` makes it again.",
            markup=False,
            soft_wrap=True,
        )
        return None


def report_parts(content: RunContent) -> dict[str, Any]:
    """Everything the template shows."""
    done, total = summary.progress(content)
    used, chosen = routing(content), confusions(content)
    # A method without a choice or a router has no such section.
    heads, general = general_rows(content.results)
    optional = (("choice", chosen), ("routing", used), ("general", general))
    lacking = {name for name, found in optional if not found}
    return {
        "name": content.folder.resolve().name,
        "results": content.results,
        "sequence": Path(content.results["task_seq"]).stem,
        "missing": missing_words(content.results["missing"]["spec"]),
        "done": done,
        "total": total,
        "tiles": summary.tiles(content),
        "warnings": summary.warnings(content),
        "stages_about": content.plan.about,
        "stages": [list(row.values()) for row in summary.stages(content)],
        "omitted": summary.omitted(content),
        "omitted_heads": ["stage", "task", "records", *LABELS.values()],
        "zero_shot": bool(content.results["zero_shot"]),
        "errors_known": bool(content.results.get("standard_errors")),
        "matrices": matrices(content),
        "forgetting": forgetting(content),
        "causes": forgetting_causes(content),
        "metrics": summary.metric_rows(content),
        "scorers": summary.scorers(content),
        "confusions": chosen,
        "routing": used,
        "pool_rows": _pool_rows(used.pools) if used else [],
        "general": general,
        "general_heads": heads,
        "general_line": general_line(content.results),
        "learning": learning(content),
        "analysis": error_tables(content),
        "samples": samples(content),
        "facts": summary.facts(content),
        "versions": summary.versions(content),
        "hashes": summary.hashes(content),
        "sections": [section for section in SECTIONS if section[0] not in lacking],
    }


def _pool_rows(pools: Sequence[PoolUse]) -> list[list[str]]:
    """A line per task and modality, with the figures of its A and B pools."""
    pairs: dict[tuple[str, str], list[PoolUse]] = {}
    for pool in pools:
        pairs.setdefault((pool.task, pool.modality), []).append(pool)
    rows = []
    for (task, modality), both in pairs.items():
        figures = [
            [getattr(pool, name) for pool in both] for name in ("entropy", "dead", "fixed", "top", "shift")
        ]
        shown = [" / ".join("–" if value is None else f"{value:.0f}" for value in pair) for pair in figures]
        rows.append([task, modality, f"{both[0].rows:,}", f"{both[0].shown:.0f}", *shown])
    return rows


def render(template: str, parts: dict[str, Any]) -> str:
    """A template of this package filled in; whatever comes from data is escaped."""
    size = {"width": charts.WIDTH, "height": charts.HEIGHT, "left": charts.LEFT, "right": charts.RIGHT,
            "top": charts.TOP, "bottom": charts.BOTTOM}  # fmt: skip
    return _environment().get_template(template).render(page=_page(), size=size, **parts)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("delo_eval.report"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _page() -> dict[str, Any]:
    """Style and script of every page, and the hash by which browsers run this script and no other."""
    folder = resources.files("delo_eval.report") / "templates"
    style = (folder / "style.css").read_text(encoding="utf-8") + palette_css()
    script = "\n" + (folder / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"style": Markup(style), "script": Markup(script), "script_hash": f"sha256-{digest}"}
