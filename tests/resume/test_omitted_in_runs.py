"""What training leaves out is in run.json and on the terminal, once for each record, however often a run was
left."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import training_support as support

pytestmark = [pytest.mark.slow, pytest.mark.long]

DELO = ["--method=delo", "--delo.pool_size=4", "--delo.rank=2", "--delo.latent=8", "--delo.align=0.1"]
#: Two records have long questions, before which contexts go; one has a torn image.
WANTED = {"task0": {"contexts_cut": 2, "instructions_cut": 2, "records_skipped": 1}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("omitted")
    support.write_sequence(folder, tasks=1)
    file = folder / "task0_train.json"
    rows = json.loads(file.read_text())
    rows[1]["context"] = rows[1]["context"] + " and so on" * 200
    for row in (rows[1], rows[2]):
        row["conversations"][0]["value"] += " of all" * 100
    rows[3]["image"] = "images/torn.png"
    file.write_text(json.dumps(rows))
    (folder / "images/torn.png").write_bytes((folder / "images/red.png").read_bytes()[:60])
    return folder


def job(place: Path, name: str, *more: str, **options: Any) -> dict[str, Any]:
    words = support.words(
        place / "tiny.yaml", tiny_models.session("llava"), place / name, "--data.max_length=96",
        "--missing.ratio=0", "--data.on_bad_image=skip", *more,
    )  # fmt: skip
    return {"words": words, **options}


def stage(run: Path) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((run / "run.json").read_text())["stages"]["task0"]
    return entry


def test_counts_survive_leaving_and_count_no_record_twice(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two epochs, left after each of them began; another method makes passes over its examples besides."""
    jobs = [job(place, "whole")]
    jobs += [job(place, "left", ask={"stage": 0, "step": step, "rank": 0}) for step in (0, 2)]
    jobs += [job(place, "left"), job(place, "delo", *DELO)]
    assert support.launch(jobs, place) == [0]
    assert stage(place / "left")["resumed_at"] == [1, 3]
    for name in ("whole", "left", "delo"):
        assert stage(place / name)["omitted"] == WANTED
    told = "task0, train: contexts cut to data.max_length: 2; instructions cut to data.max_length: 2; "
    assert capfd.readouterr().err.count(told) == 3


@pytest.mark.distributed
def test_two_ranks_count_together(place: Path) -> None:
    more = ["--zero=2", "--train.save_every=1"]
    ask = {"stage": 0, "step": 1, "rank": 1}
    jobs = [job(place, "ranks", *more, ask=ask), job(place, "ranks", *more)]
    assert support.launch(jobs, place, ranks=2) == [0, 0]
    assert stage(place / "ranks")["omitted"] == WANTED
