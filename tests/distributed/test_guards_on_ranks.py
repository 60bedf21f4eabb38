"""What is left out is left out on all ranks together; full memory on one of them ends the launch, and the
same command goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import training_support as support
from safetensors.torch import load_file

from delo_llava.engines.signals import EXIT_CODE

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.long]

SKIP = "--train.on_nonfinite=skip"
POISON = {"poison": "task0/train-3"}
#: Rank 1 has memory for one row only.
SMALL = {"rows": 1, "rank": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    support.write_sequence(folder, tasks=1)
    (folder / "torn").mkdir()
    support.write_sequence(folder / "torn", tasks=1)
    file = folder / "torn/task0_train.json"
    rows = json.loads(file.read_text())
    rows[5]["image"] = "images/torn.png"
    file.write_text(json.dumps(rows))
    (folder / "torn/images/torn.png").write_bytes(b"\x89PNG\r\n")
    return folder


def job(place: Path, name: str, *more: str, data: str = "", **options: Any) -> dict[str, Any]:
    model = tiny_models.session("llava")
    return {"words": support.words(place / data / "tiny.yaml", model, place / name, *more), **options}


@pytest.fixture(scope="module")
def runs(place: Path) -> Path:
    halved = job(place, "halved", "--zero=2", "--train.on_oom=halve", sabotage=SMALL)
    torn = ["--data.on_bad_image=skip", "--data.max_bad_images=1", "--missing.ratio=0", "--train.epochs=4"]
    jobs = [
        *(job(place, f"skip{zero}", f"--zero={zero}", SKIP, sabotage=POISON) for zero in "23"),
        job(
            place,
            "limit",
            "--zero=3",
            SKIP,
            "--train.max_nonfinite=1",
            sabotage=POISON,
            error=f"{place}/limit",
        ),
        job(place, "torn_run", "--zero=2", *torn, data="torn"),
        job(place, "small", "--zero=2", "--train.micro_batch=1"),
        halved,
    ]
    first, second = support.launch(jobs, place, ranks=2)
    assert second == EXIT_CODE and first != 0, "the first rank loses its peer"
    assert support.launch([halved], place, ranks=2) == [0, 0]
    assert support.launch([job(place, "skip", SKIP, sabotage=POISON)], place) == [0]
    return place


def record(run: Path) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((run / "run.json").read_text())["stages"]["task0"]
    return entry


@pytest.mark.parametrize("zero", ["2", "3"])
def test_all_ranks_leave_a_step_out(runs: Path, zero: str) -> None:
    """The rank without the record, too: otherwise the weights would not be those of one process."""
    found, expected = runs / f"skip{zero}", runs / "skip"
    skipped = record(found)["skipped_steps"]
    assert [entry["step"] for entry in skipped] == [e["step"] for e in record(expected)["skipped_steps"]]
    assert len(skipped) == 2 and all("train-3" in entry["records"] for entry in skipped)
    assert [e["skipped"] for e in support.metrics(found) if "skipped" in e] == [e["records"] for e in skipped]
    file = "adapters/task0/adapter_model.safetensors"
    weights, same = load_file(found / file), load_file(expected / file)
    assert max(float((weights[name] - tensor).abs().max()) for name, tensor in same.items()) < 1e-4


def test_all_ranks_stop_at_the_limit(runs: Path) -> None:
    told = {(runs / f"limit{rank}").read_text() for rank in (0, 1)}
    assert len(told) == 1 and "2 steps of this stage, too many" in told.pop()


def test_a_record_left_out_by_several_ranks_counts_once(runs: Path) -> None:
    assert list(record(runs / "torn_run")["bad_images"]) == ["task0/train-5"]


def test_the_same_command_goes_on_with_half_the_micro_batch(runs: Path) -> None:
    assert record(runs / "halved")["micro_batch"] == 1
    assert support.bits(runs / "halved") == support.bits(runs / "small")
