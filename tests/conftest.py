"""How the tests are run: the longest first, and what is long by a flag.

    bash launch/test.sh            what a newcomer runs
    … --part 3/8                   the same, and an eighth of the long tests (CI: another one each day)
    … --long                       everything
    … --note_durations             write tests/durations.json, which the order is made from
    pytest tests/contract --long --note_support    write docs/support.md

Two workers take whole groups – a file, or one method's part of a file of the contract – so that what its
tests share is made once. A long group that begins last leaves one worker idle, so the longest begin first.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support_table
from xdist.scheduler import LoadScopeScheduling

from delo_llava.registry import plugin_names

DURATIONS = Path(__file__).parent / "durations.json"
METHODS = frozenset(plugin_names("method"))
BEGAN = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long, too")
    parser.addoption(
        "--part", metavar="K/N", help="run the K-th of N parts of the tests marked long, K from 1"
    )
    parser.addoption("--note_durations", action="store_true", help=f"write {DURATIONS.name}")
    parser.addoption("--note_support", action="store_true", help="write the table of what works with what")


class GroupScheduling(LoadScopeScheduling):
    """Deals out whole groups, in the order of the collection."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling:
    return GroupScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = [item for item in items if item.get_closest_marker("long") is None or _is_due(config, item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    known = json.loads(DURATIONS.read_text()) if DURATIONS.is_file() else {}
    groups = {item: group_of(item.nodeid) for item in chosen}
    items[:] = sorted(chosen, key=lambda item: (-known.get(groups[item], 0.0), groups[item]))


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
    key = method_of(item.nodeid) or item.nodeid.partition("[")[0]
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % parts == number - 1


def method_of(nodeid: str) -> str | None:
    """The method that a test of the contract is about, from its parameters."""
    file, _, parameters = nodeid.rstrip("]").partition("[")
    if "tests/contract/" not in file:
        return None
    return next((part for part in parameters.split("-") if part in METHODS), None)


def group_of(nodeid: str) -> str:
    """What one worker takes whole."""
    return ":".join([nodeid.partition("::")[0], *filter(None, [method_of(nodeid)])])


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
    """Adds up the CPU seconds of each group."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self.seconds[group_of(report.nodeid)] += dict(report.user_properties)["cpu"]

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
