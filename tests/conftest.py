"""How the tests are run: long files first, and what is long by a flag.

    pytest -n 2 --dist loadfile    what a newcomer runs (launch/test.sh)
    … --part 3/8                   the same, and an eighth of the long tests (CI: another one each day)
    … --long                       everything
    … --note_durations             write tests/durations.json, which the order is made from
    tests/contract --long --note_support    write docs/support.md

Two workers take whole files, so that what a file's fixtures made is made once; a long file that begins last
leaves one worker idle, so files begin in the order of their seconds.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import support_table

DURATIONS = Path(__file__).parent / "durations.json"
BEGAN = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long, too")
    parser.addoption(
        "--part", metavar="K/N", help="run the K-th of N parts of the tests marked long, K from 1"
    )
    parser.addoption("--note_durations", action="store_true", help=f"write {DURATIONS.name}")
    parser.addoption("--note_support", action="store_true", help="write the table of what works with what")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = [item for item in items if item.get_closest_marker("long") is None or _is_due(config, item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    known = json.loads(DURATIONS.read_text()) if DURATIONS.is_file() else {}
    order = sorted(range(len(chosen)), key=lambda i: (-known.get(_file(chosen[i]), 0.0), _file(chosen[i]), i))
    items[:] = [chosen[i] for i in order]


def _is_due(config: pytest.Config, item: pytest.Item) -> bool:
    """Whether a long test is run this time."""
    part = config.getoption("--part")
    if config.getoption("--long") or part is None:
        return bool(config.getoption("--long"))
    try:
        number, parts = map(int, part.split("/"))
    except ValueError as error:
        raise pytest.UsageError("--part is written K/N, such as 3/8") from error
    if not 1 <= number <= parts:
        raise pytest.UsageError("--part K/N: K lies between 1 and N")
    # All of a method's tests come together, and so do all of a function's: they share what was trained.
    called = getattr(item, "callspec", None)
    key = called.params.get("name") if called is not None else None
    digest = hashlib.sha256(str(key or item.nodeid.partition("[")[0]).encode()).hexdigest()
    return int(digest, 16) % parts == number - 1


def _file(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def _cpu() -> float:
    """CPU seconds of this process and of those it has waited for, which other work on the machine hardly
    changes.
    """
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.stash[BEGAN] = _cpu()
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    if call.when == "setup":
        item.user_properties += [("support", cell) for cell in support_table.cells_of(item)]
    if call.when == "teardown":
        item.user_properties.append(("cpu", _cpu() - item.stash[BEGAN]))


class Durations:
    """Adds up the CPU seconds of each file."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self.seconds[report.nodeid.partition("::")[0]] += dict(report.user_properties)["cpu"]

    def pytest_sessionfinish(self) -> None:
        known = json.loads(DURATIONS.read_text()) if DURATIONS.is_file() else {}
        found = known | {name: round(seconds, 1) for name, seconds in self.seconds.items()}
        DURATIONS.write_text(json.dumps(dict(sorted(found.items())), indent=0) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    if config.getoption("--note_durations"):
        config.pluginmanager.register(Durations())
    if config.getoption("--note_support"):
        config.pluginmanager.register(support_table.Recorder())
