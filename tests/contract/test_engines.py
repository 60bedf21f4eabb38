"""What every method must do on every engine: two ranks under ZeRO 1, 2, 3 learn what one process learns; a
run that is left or killed inside a stage goes on to the same bits."""

import hashlib
import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import tiny_models
import training_support as support
from contract_support import SMALL, Bench
from distributed_support import engine_words, largest_difference, write_split_file

from delo_llava.registry import plugin_names

pytestmark = [pytest.mark.distributed, pytest.mark.long]

METHODS = plugin_names("method")
#: Of `3_split`, `3` is the easier case.
ZEROS = ("1", "2", "3_split")
STEPS = 4  # of a stage
#: Adam moves a weight by up to the learning rate, 1e-2, whatever the size of its gradient: a gradient that is
#: hardly more than rounding moves it too.
BOUND = 5e-4


def words(place: Path, name: str, method: str, zero: str) -> list[str]:
    """A short run of one method: sixteen records in batches of eight, so two steps an epoch."""
    options = [
        f"--{section}.{key}={'null' if value is None else value}"
        for section, given in SMALL.items()
        for key, value in given.items()
    ]
    given = support.words(
        place / "tiny.yaml", tiny_models.session("llava"), place / name, f"--method={method}", *options,
        *engine_words(place, zero), "--train.save_every=1",
    )  # fmt: skip
    return [word for word in given if not word.startswith("--lora.")]


bench = cache(Bench)


@cache
def place() -> Path:
    """Where the runs of this process lie."""
    folder = Path(mkdtemp())
    support.write_sequence(folder)
    write_split_file(folder)
    return folder


def where(method: str) -> dict[str, int]:
    """A step of the last stage that belongs to a method, neither the first nor the last."""
    draw = hashlib.sha256(method.encode()).digest()[0]
    return {"stage": len(bench(method).stages()) - 1, "step": 1 + draw % (STEPS - 2)}


def engines(method: str) -> list[str]:
    """The ZeRO stages that a method does not refuse."""
    refused = bench(method).method.refuses()
    return [zero for zero in ZEROS if f"zero={zero[0]}" not in refused]


def skip_refused(method: str, zero: str) -> None:
    """Say why there is nothing to prove; that it is refused is proven elsewhere."""
    if not bench(method).stages():
        pytest.skip("it trains nothing")
    reason = bench(method).method.refuses().get(f"zero={zero[0]}")
    if reason is not None:
        pytest.skip(reason)


@cache
def together(method: str) -> Path:
    """Under every ZeRO stage on two ranks: a whole run, and one that is left and goes on."""
    jobs: list[dict[str, Any]] = []
    for zero in engines(method):
        whole, parts = (words(place(), f"{method}_{zero}{end}", method, zero) for end in ("", "_left"))
        jobs += [{"words": whole}, {"words": parts, "ask": where(method) | {"rank": 1}}, {"words": parts}]
    assert support.launch(jobs, place(), ranks=2) == [0, 0]
    return place()


@cache
def alone(method: str) -> Path:
    """In one process: a whole run, and one that is killed and goes on."""
    whole, parts = (words(place(), f"{method}_none{end}", method, "none") for end in ("", "_left"))
    killed = support.launch([{"words": whole}, {"words": parts, "kill": where(method)}], place())
    assert killed == [-9], "it was really killed"
    assert support.launch([{"words": parts}], place()) == [0]
    return place()


@pytest.mark.support("ZeRO {zero}")
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_learn_what_one_process_learns(name: str, zero: str) -> None:
    skip_refused(name, zero)
    one, two = alone(name) / f"{name}_none", together(name) / f"{name}_{zero}"
    for mine, theirs in zip(support.metrics(one), support.metrics(two), strict=True):
        assert abs(mine["loss"] - theirs["loss"]) < 1e-4
    assert largest_difference(one, two) < BOUND


@pytest.mark.support("resume")
@pytest.mark.parametrize("zero", ["none", *ZEROS])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_was_left_goes_on_to_the_same_bits(name: str, zero: str) -> None:
    """One process is killed, two ranks are asked to leave; a new process has nothing but the files."""
    skip_refused(name, zero)
    folder = alone(name) if zero == "none" else together(name)
    whole, parts = folder / f"{name}_{zero}", folder / f"{name}_{zero}_left"
    stages = list(json.loads((parts / "run.json").read_text())["stages"].values())
    assert stages[-1]["resumed_at"], "it was really left inside a stage"
    assert support.bits(parts) == support.bits(whole)
    assert not list((parts / "checkpoints").glob("*")), "published stages need no checkpoints"
