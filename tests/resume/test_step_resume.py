"""Asked to leave inside a stage, then the same command: every method and engine ends in the same bits;
another number of ranks goes on to the same numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import training_support as support
from distributed_support import engine_words, write_split_file
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.long]

DELO = ["--delo.pool_size=4", "--delo.rank=2", "--delo.latent=8", "--delo.align=0.1"]
METHODS: dict[str, list[str]] = {
    "delo": [*DELO, "--quant=nf4"],
    "lora": ["--lora.dropout=0.1"],  # random numbers in every step
    "individual": ["--individual.rank=2"],
}
ZEROS = ("1", "2", "2_offload", "3", "3_split")
#: Every method under every stage; the tasks and steps are few, since each run starts two engines.
PAIRS = [(method, zero) for method in METHODS for zero in ZEROS]
#: Where the run is left: in the first stage by the second rank.
BREAKS = ({"stage": 0, "step": 1, "rank": 1},)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    support.write_sequence(folder, tasks=1)
    write_split_file(folder)
    return folder


def job(place: Path, name: str, method: str, zero: str, **more: Any) -> dict[str, Any]:
    words = support.words(
        place / "tiny.yaml", tiny_models.session("llava"), place / name, f"--method={method}",
        *METHODS[method], *engine_words(place, zero), "--train.epochs=1.5",
    )  # fmt: skip
    return {"words": words, **more}


def broken(place: Path, method: str, zero: str, breaks: Any = BREAKS) -> list[dict[str, Any]]:
    """A whole run, and another that is left at each of `breaks`."""
    name = f"{method}_{zero}"
    parts = [job(place, f"{name}_broken", method, zero, ask=ask) for ask in breaks]
    return [job(place, name, method, zero), *parts, job(place, f"{name}_broken", method, zero)]


@pytest.fixture(scope="module")
def together(place: Path) -> Path:
    """Every method under every ZeRO file, on two ranks, in one process group."""
    jobs = [part for method, zero in PAIRS for part in broken(place, method, zero)]
    assert support.launch(jobs, place, ranks=2) == [0, 0]
    return place


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    """Every method in one process."""
    breaks = [{**at, "rank": 0} for at in BREAKS]
    jobs = [part for method in METHODS for part in broken(place, method, "none", breaks)]
    assert support.launch(jobs, place) == [0]
    return place


def assert_equal_runs(place: Path, name: str) -> None:
    whole, parts = place / name, place / f"{name}_broken"
    record = json.loads((parts / "run.json").read_text())["stages"]
    assert [stage["resumed_at"] for stage in record.values()] == [[2]], "it was really left inside a stage"
    assert support.bits(parts) == support.bits(whole)
    assert [curve(e) for e in support.metrics(parts)] == [curve(e) for e in support.metrics(whole)]
    assert not list((parts / "checkpoints").glob("*")), "published stages need no checkpoints"


@pytest.mark.parametrize(("method", "zero"), PAIRS)
def test_two_ranks_go_on_to_the_same_bits(together: Path, method: str, zero: str) -> None:
    assert_equal_runs(together, f"{method}_{zero}")


@pytest.mark.parametrize("method", METHODS)
def test_one_process_goes_on_to_the_same_bits(alone: Path, method: str) -> None:
    assert_equal_runs(alone, f"{method}_none")


def curve(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["stage"], entry["step"], entry["loss"], entry["grad_norm"], entry["lr"]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_goes_on_to_the_same_numbers(
    place: Path, together: Path, before: int, after: int
) -> None:
    """DeLo under ZeRO-2, left by `before` ranks and finished by `after`: equal to two ranks' run to 1e-5."""
    name = f"delo_{before}to{after}"
    ask = {"stage": 0, "step": 1, "rank": 0}
    assert support.launch([job(place, name, "delo", "2", ask=ask)], place, ranks=before) == [0] * before
    assert list((place / name / "checkpoints" / "task0").glob("step-*")), "left inside the stage"
    assert support.launch([job(place, name, "delo", "2")], place, ranks=after) == [0] * after
    mine, theirs = (
        load_file(place / run / "adapters" / "task0" / "adapter_model.safetensors")
        for run in (name, "delo_2")
    )
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert float((tensor - theirs[key]).abs().max()) <= 1e-5 * max(1.0, float(theirs[key].abs().max()))
    keys, others = (
        load_file(place / run / "adapters" / "task0" / "task_keys.safetensors") for run in (name, "delo_2")
    )
    assert all(bool(((keys[k] - others[k]).abs() <= 1e-5 * (1 + others[k].abs())).all()) for k in keys)
