"""Whether two complete runs are the same: everything that a run leaves, but for times and the like."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

import training_support as support  # noqa: E402

#: What may differ, by file: seconds and times; where launches went on; the counts of which experts answered
#: and which answers were ready (those of a killed evaluation count twice, or not at all), and so the report,
#: which shows them. All else is compared.
OPEN = {
    "results.json": ("seconds",),
    "run.json": ("train_seconds", "resumed_at", "stopped"),
    "metrics": ("time", "seconds", "samples_per_second"),
    "names only": (
        "routing",
        "answers",
        "report.html",
        "plots",
        "complete.json",
        "hashes.json",
        "config.yaml",
    ),
}


def differences(whole: Path, run: Path) -> list[str]:
    """What differs between two complete runs, one line each; see `OPEN` for what is not compared."""
    mine, theirs = tree(run), tree(whole)
    found = [f"{path}: left over" for path in sorted(mine - theirs)]
    found += [f"{path}: missing" for path in sorted(theirs - mine)]
    for path in sorted(mine & theirs):
        if (run / path).is_dir() or {*Path(path).parts} & {*OPEN["names only"]}:
            continue
        if path in ("results.json", "run.json"):
            found += unequal(closed(whole / path, path), closed(run / path, path), path)
        elif path == "logs/metrics.jsonl":
            curves = [[without(line, "metrics") for line in support.metrics(each)] for each in (whole, run)]
            found += unequal(*curves, path)
        elif digest(whole / path) != digest(run / path):
            found.append(f"{path}: other bytes")
    return found


def tree(run: Path) -> set[str]:
    """Every path of a run's folder."""
    return {path.relative_to(run).as_posix() for path in run.rglob("*")}


def closed(file: Path, name: str) -> Any:
    """The content of a JSON file that must be the same."""
    return without(json.loads(file.read_text()), name)


def without(value: Any, name: str) -> Any:
    """A JSON value without the keys that may differ in the file `name`."""
    if isinstance(value, dict):
        return {key: without(inner, name) for key, inner in value.items() if key not in OPEN[name]}
    return [without(inner, name) for inner in value] if isinstance(value, list) else value


def unequal(wanted: Any, given: Any, where: str) -> list[str]:
    """Each place where two JSON values differ."""
    if isinstance(wanted, dict) and isinstance(given, dict):
        keys = sorted(wanted.keys() | given.keys())
        return [line for key in keys for line in unequal(wanted.get(key), given.get(key), f"{where}.{key}")]
    if isinstance(wanted, list) and isinstance(given, list) and len(wanted) == len(given):
        pairs = enumerate(zip(wanted, given, strict=True))
        return [line for i, (a, b) in pairs for line in unequal(a, b, f"{where}[{i}]")]
    return [] if wanted == given else [f"{where}: {str(wanted)[:80]} became {str(given)[:80]}"]


def digest(file: Path) -> str:
    """The sha256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
