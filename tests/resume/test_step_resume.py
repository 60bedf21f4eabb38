"""Asked to leave inside a stage, then the same command: every method and engine ends in the same bits;
another number of ranks goes on to the same numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import training_support as support
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

DELO = ["--delo.pool_size=4", "--delo.rank=2", "--delo.latent=8", "--delo.align=0.1"]
METHODS: dict[str, list[str]] = {
    "delo": [*DELO, "--quant=nf4"],
    "lora": ["--lora.dropout=0.1"],  # random numbers in every step
    "individual": ["--individual.rank=2"],
}
#: On two ranks: each method in a file that shards, delo in all of them.
TOGETHER = (
    ("delo", "1"), ("delo", "2_offload"), ("delo", "3"), ("delo", "2"), ("lora", "2"), ("individual", "2"),
    ("lora", "3"), ("lora", "sharded"),
)  # fmt: skip
#: Written on two ranks, gone on with one, and the other way round.
CHANGES = {"fewer": (2, 1), "more": (1, 2)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    support.write_sequence(folder, tasks=1)
    # Tiny parameters are kept whole on every rank unless the file says that none is small.
    sharded = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (folder / "sharded.json").write_text(json.dumps({"zero_optimization": sharded}))
    return folder


def job(place: Path, name: str, method: str, zero: str, *words: str, **more: Any) -> dict[str, Any]:
    file = [f"--ds_config={place / 'sharded.json'}"] if zero == "sharded" else []
    line = support.words(
        place / "tiny.yaml", tiny_models.session("llava"), place / name, f"--method={method}",
        *METHODS[method], f"--zero={3 if file else zero}", *file, "--train.epochs=1.5", *words,
    )  # fmt: skip
    return {"words": line, **more}


def broken(place: Path, method: str, zero: str, rank: int) -> list[dict[str, Any]]:
    """A whole run, and another that `rank` is asked to leave after the second of three steps."""
    name, ask = f"{method}_{zero}", {"stage": 0, "step": 1, "rank": rank}
    left = job(place, f"{name}_broken", method, zero, ask=ask)
    return [job(place, name, method, zero), left, {"words": left["words"]}]


def change(place: Path, name: str, **more: Any) -> dict[str, Any]:
    return job(place, name, "lora", "2", "--lora.dropout=0", "--train.epochs=2", **more)


@pytest.fixture(scope="module")
def runs(place: Path) -> Path:
    """In one process, then on two ranks in one group, then what one rank goes on with."""
    ask = {"stage": 0, "step": 1}
    alone = [part for method in METHODS for part in broken(place, method, "none", 0)]
    assert support.launch([*alone, change(place, "more", ask=ask)], place) == [0]
    jobs = [part for method, zero in TOGETHER for part in broken(place, method, zero, 1)]
    changes = [change(place, "unchanged"), change(place, "more"), change(place, "fewer", ask=ask)]
    assert support.launch([*jobs, *changes], place, ranks=2) == [0, 0]
    assert support.launch([change(place, "fewer")], place) == [0]
    return place


def assert_equal_runs(place: Path, name: str) -> None:
    whole, parts = place / name, place / f"{name}_broken"
    record = json.loads((parts / "run.json").read_text())["stages"]["task0"]
    assert record["resumed_at"] == [2], "it was really left inside the stage"
    assert support.bits(parts) == support.bits(whole)
    assert [curve(e) for e in support.metrics(parts)] == [curve(e) for e in support.metrics(whole)]
    assert not list((parts / "checkpoints").glob("*")), "published stages need no checkpoints"


@pytest.mark.parametrize(("method", "zero"), TOGETHER)
def test_two_ranks_go_on_to_the_same_bits(runs: Path, method: str, zero: str) -> None:
    assert_equal_runs(runs, f"{method}_{zero}")


@pytest.mark.parametrize("method", METHODS)
def test_one_process_goes_on_to_the_same_bits(runs: Path, method: str) -> None:
    assert_equal_runs(runs, f"{method}_none")


def test_partitioned_parameters_are_published_whole(runs: Path) -> None:
    """Under a file that shards every parameter the adapter is the one of unsharded parameters."""
    found, expected = adapter(runs / "lora_sharded"), adapter(runs / "lora_3")
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
    assert distance(found, expected) < 1e-4


@pytest.mark.parametrize("name", CHANGES)
def test_another_number_of_ranks_goes_on_to_the_same_numbers(runs: Path, name: str) -> None:
    record = json.loads((runs / name / "run.json").read_text())["stages"]["task0"]
    assert (record["resumed_at"], record["world"]) == ([2], CHANGES[name][1])
    assert distance(adapter(runs / name), adapter(runs / "unchanged")) < 1e-5
    assert [e["step"] for e in support.metrics(runs / name)] == [0, 1, 2, 3]


def adapter(run: Path) -> dict[str, Any]:
    return load_file(run / "adapters/task0/adapter_model.safetensors")


def distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference, relative to the largest weight."""
    assert found.keys() == expected.keys()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    return max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items()) / largest


def curve(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["stage"], entry["step"], entry["loss"], entry["grad_norm"], entry["lr"]
