"""Steps and records that a run leaves out, and full memory: what is told, what is trained all the same."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import training_support as support
from safetensors.torch import load_file

from delo_llava.cli import resolve
from delo_llava.cluster.advice import planned_bytes
from delo_llava.errors import DeloError
from delo_llava.runs.job import make_job
from delo_llava.runs.sequence import run_sequence
from delo_llava.training import fit
from delo_llava.training.guards import OutOfMemory

pytestmark = pytest.mark.slow

DELO = ["--method=delo", "--delo.pool_size=4", "--delo.rank=2", "--delo.latent=8", "--delo.align=0.1"]
#: In both epochs of the stage one step holds it.
POISON = "task0/train-3"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guards")
    support.write_sequence(folder, tasks=1)
    return folder


def train(place: Path, name: str, *more: str) -> Path:
    words = support.words(place / "tiny.yaml", tiny_models.session("llava"), place / name, *more)
    run_sequence(make_job(resolve(words)), None, planned_bytes)
    return place / name


def record(run: Path) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((run / "run.json").read_text())["stages"]["task0"]
    return entry


@pytest.fixture
def poisoned() -> Iterator[None]:
    undo = support.sabotage(poison=POISON)
    yield
    undo()


@pytest.fixture
def one_row() -> Iterator[None]:
    """Only one row at a time fits into memory."""
    undo = support.sabotage(rows=1)
    yield
    undo()


# ---- losses that are not finite ----
@pytest.mark.usefixtures("poisoned")
def test_a_step_is_left_out_and_named(place: Path) -> None:
    run = train(place, "skipped", "--train.on_nonfinite=skip")
    logged = support.metrics(run)
    assert [entry["step"] for entry in logged] == [0, 1, 2, 3]
    left_out = [entry for entry in logged if "skipped" in entry]
    assert len(left_out) == 2 and all("train-3" in entry["skipped"] for entry in left_out)
    assert all(len(entry["skipped"]) == 2 for entry in left_out), "only its micro-batch is at fault"
    noted = [{"step": entry["step"], "records": entry["skipped"]} for entry in left_out]
    assert record(run)["skipped_steps"] == noted


@pytest.mark.usefixtures("poisoned")
def test_a_step_that_was_left_out_counts_in_no_statistic(place: Path) -> None:
    run = train(place, "uncounted", *DELO, "--train.on_nonfinite=skip", "--missing.ratio=0")
    logged = support.metrics(run)
    made = [entry for entry in logged if "skipped" not in entry]
    assert len(logged) == 4 and len(made) == 2
    count = load_file(run / "adapters/task0/task_keys.safetensors")["count"]
    assert count.tolist() == 3 * [8.0 * len(made)], "whole batches, the sound micro-batches of others not"


@pytest.mark.usefixtures("poisoned")
def test_too_many_of_them_stop_the_run(place: Path) -> None:
    with pytest.raises(DeloError, match="2 steps of this stage, too many"):
        train(place, "limit", "--train.on_nonfinite=skip", "--train.max_nonfinite=1")
    assert len(record(place / "limit")["skipped_steps"]) == 2
    assert not (place / "limit/adapters/task0").exists()


@pytest.mark.usefixtures("poisoned")
def test_by_default_the_first_one_stops_it(place: Path) -> None:
    with pytest.raises(
        DeloError, match=r"not finite at step \d(.|\n)*train-3(.|\n)*--train.on_nonfinite=skip"
    ):
        train(place, "stopped")


# ---- memory ----
@pytest.mark.usefixtures("one_row")
def test_full_memory_tells_what_was_used_and_what_helps(place: Path) -> None:
    with pytest.raises(
        OutOfMemory,
        match=r"used .* GiB of .* GiB; planned .* GiB for data.max_length=2048; train.micro_batch=2",
    ) as told:
        train(place, "memory")
    assert "--train.micro_batch=1" in str(told.value) and "--train.on_oom=halve" in str(told.value)


@pytest.mark.usefixtures("one_row")
def test_half_the_micro_batch_gives_what_it_gives_from_the_start(place: Path) -> None:
    halved = train(place, "halved", "--train.on_oom=halve")
    small = train(place, "small", "--train.micro_batch=1")
    assert record(halved)["micro_batch"] == 1 and "micro_batch" not in record(small)
    assert support.bits(halved) == support.bits(small)


@pytest.mark.usefixtures("one_row")
def test_a_single_row_that_does_not_fit_ends_the_run(place: Path) -> None:
    undo = support.sabotage(rows=0)
    try:
        with pytest.raises(OutOfMemory, match="train.micro_batch=1"):
            train(place, "hopeless", "--train.on_oom=halve")
    finally:
        undo()


# ---- images ----
@pytest.fixture(scope="module")
def torn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sequences: `bad` of 12 records, one of them with a torn image, and `good` without that one."""
    folder = tmp_path_factory.mktemp("torn")
    for name in ("bad", "good"):
        support.write_sequence(folder / name, tasks=1, records=12)
    file = folder / "bad/task0_train.json"
    rows = json.loads(file.read_text())
    rows[5]["image"] = "images/torn.png"
    file.write_text(json.dumps(rows))
    (folder / "bad/images/torn.png").write_bytes((folder / "bad/images/red.png").read_bytes()[:60])
    (folder / "good/task0_train.json").write_text(json.dumps(rows[:5] + rows[6:]))
    return folder


def one_batch(size: int, micro: int, *more: str) -> list[str]:
    """All records in one step."""
    batch = [f"--train.global_batch={size}", f"--train.micro_batch={micro}"]
    return [*batch, "--train.max_steps=1", "--missing.ratio=0", "--train.warmup=0", *more]


@pytest.mark.parametrize("method", [["--method=lora"], DELO], ids=["lora", "delo"])
@pytest.mark.parametrize("micro", [1, 12], ids=["alone", "among_others"])
def test_a_record_left_out_is_as_if_it_were_not_there(torn: Path, method: list[str], micro: int) -> None:
    name = f"{method[0][-4:]}{micro}"
    found = train(torn / "bad", name, *one_batch(12, micro, *method, "--data.on_bad_image=skip"))
    expected = train(torn / "good", name, *one_batch(11, 11 if micro > 1 else 1, *method))
    bad = record(found)["bad_images"]
    assert list(bad) == ["task0/train-5"] and "torn.png" not in record(expected)["bad_images"]
    (one,), (other,) = support.metrics(found), support.metrics(expected)
    assert one["answer_tokens"] == other["answer_tokens"]
    assert one["terms"] == pytest.approx(other["terms"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    for file in sorted((expected / "adapters/task0").glob("task_keys.safetensors")):
        keys, same = load_file(found / "adapters/task0" / file.name), load_file(file)
        assert all((keys[key] - value).abs().max() < 1e-4 for key, value in same.items())


def test_a_torn_image_is_an_error_unless_records_may_be_left_out(torn: Path) -> None:
    with pytest.raises(DeloError, match=r"train-5(.|\n)*torn.png(.|\n)*--data.on_bad_image=skip"):
        train(torn / "bad", "error", *one_batch(12, 12))
    with pytest.raises(DeloError, match=r"1 records have images(.|\n)*task0/train-5"):
        train(torn / "bad", "cap", *one_batch(12, 12), "--data.on_bad_image=skip", "--data.max_bad_images=0")


# ---- what must not change ----
def test_a_frozen_weight_that_moves_stops_the_stage(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meddling(engine: Any, module: Any, *rest: Any, **more: Any) -> None:
        frozen = next(p for p in module.model.parameters() if not p.requires_grad)
        frozen.data.view(-1)[0] += 1

    monkeypatch.setattr(fit, "run_steps", meddling)
    with pytest.raises(DeloError, match="Frozen weights changed"):
        train(place, "meddled")
    assert not (place / "meddled/adapters/task0").exists()


def test_an_earlier_adapter_that_changes_stops_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    support.write_sequence(tmp_path, tasks=2)
    steps = fit.run_steps

    def meddling(*args: Any, **more: Any) -> Any:
        earlier = tmp_path / "run/adapters/task0/adapter_config.json"
        if earlier.exists():
            earlier.write_text(earlier.read_text() + " ")
        return steps(*args, **more)

    monkeypatch.setattr(fit, "run_steps", meddling)
    with pytest.raises(DeloError, match="task0/adapter_config.json: its bytes differ"):
        train(tmp_path, "run")
