"""What a change must not change: short runs of the whole pipeline give the numbers in golden.json."""

from pathlib import Path

import pytest

from golden import golden

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["delo-none-missing70", pytest.param("lora-none-complete", marks=pytest.mark.long)]
)
def test_one_process_gives_the_golden_numbers(name: str, tmp_path: Path) -> None:
    assert not golden.check(golden.run_all(golden.ROOT, tmp_path, [name]))


@pytest.mark.distributed
def test_two_ranks_give_the_golden_numbers(tmp_path: Path) -> None:
    assert not golden.check(golden.run_all(golden.ROOT, tmp_path, ["delo-2-missing70"]))


def test_a_difference_is_found() -> None:
    known = {name: run for name, run in golden.known_runs().items() if name == "delo-none-missing70"}
    run = known["delo-none-missing70"]
    cell = next(iter(run["answers"]))
    moved = {
        **run,
        "losses": [[loss + 0.5, norm] for loss, norm in run["losses"]],
        "adapters": dict.fromkeys(run["adapters"], "0"),
        "answers": {**{c: ["?"] * len(a) for c, a in run["answers"].items()}, cell: run["answers"][cell]},
    }
    for exact in (True, False):
        assert not golden.differences(known, known, exact)
    other = {"delo-none-missing70": moved}
    assert len(golden.differences(known, other, exact=True)) == len(run["losses"]) + len(run["adapters"])
    told = golden.differences(known, other, exact=False)
    assert len(told) == len(run["losses"]) + 1 and "answers are equal" in told[-1]
