"""A fault of one rank is told on all of them, once, with rank and record; a rank that is waited for is
named."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import training_support as support

from delo_llava.engines.watchdog import EXIT_CODE
from delo_llava.errors import DeloError

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    support.write_sequence(folder, tasks=1)
    torn = folder / "torn"
    torn.mkdir()
    support.write_sequence(torn, tasks=1)
    (torn / "images" / "half.png").write_bytes((torn / "images" / "red.png").read_bytes()[:60])
    file = torn / "task0_train.json"
    rows = json.loads(file.read_text())
    rows[5]["image"] = "images/half.png"
    file.write_text(json.dumps(rows))
    return folder


def job(place: Path, name: str, *more: str, data: str = "", **options: Any) -> dict[str, Any]:
    words = support.words(place / data / "tiny.yaml", tiny_models.session("llava"), place / name, *more)
    return {"words": words, "error": f"{place}/{name}", **options}


def told(place: Path, name: str) -> list[str]:
    return [path.read_text() for rank in (0, 1) if (path := place / f"{name}{rank}").is_file()]


@pytest.mark.parametrize("zero", [pytest.param("2", marks=pytest.mark.long), "3"])
def test_a_picture_that_cannot_be_read_is_told_on_all_ranks(place: Path, zero: str) -> None:
    """It is there, so it is found when it is shown."""
    name = f"torn{zero}"
    one = job(place, name, f"--zero={zero}", "--missing.ratio=0", data="torn")
    assert support.launch([one], place, ranks=2) == [0, 0]
    first, second = told(place, name)
    assert all("The image of record 'train-5'" in text for text in (first, second))
    assert sum("rank " in text for text in (first, second)) == 1, "the other rank says whose fault it is"


@pytest.mark.parametrize("zero", [pytest.param("2", marks=pytest.mark.long), "3"])
def test_an_exception_of_one_rank_is_told_by_the_others(place: Path, zero: str) -> None:
    name = f"broken{zero}"
    one = job(place, name, f"--zero={zero}", sabotage={"fail": "task0/train-3"})
    codes = support.launch([one], place, ranks=2, timeout=120)
    assert sorted(codes) == [0, 1], (
        "the rank that fails ends with its exception, the other with what it was told"
    )
    (text,) = told(place, name)
    assert (
        "failed while training step" in text and "train-3" in text and "ValueError: something broke" in text
    )
    assert "the same command goes on" in text


def test_a_rank_that_does_not_come_is_named(place: Path) -> None:
    """Both ranks end, and say where each of them stands."""
    one = job(place, "stuck", "--zero=2", "--train.patience=6", sabotage={"hang": "task0/train-3"})
    script = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); import training_support as support\n"
        "from pathlib import Path\n"
        "print(support.launch(json.loads(sys.argv[2]), Path(sys.argv[3]), ranks=2, timeout=120))"
    )
    words = [sys.executable, "-c", script, str(Path(support.__file__).parent), json.dumps([one]), str(place)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=180, check=False)
    assert not done.returncode, done.stderr
    assert done.stdout.strip().endswith(f"[{EXIT_CODE}, {EXIT_CODE}]")
    assert "has waited for" in done.stderr
    assert "training step" in done.stderr and "train-3" in done.stderr, "the rank that hangs, and on what"
    assert "not done" in done.stderr and "all_reduce" in done.stderr, "the collective that the other waits in"


def test_an_error_of_all_ranks_is_marked() -> None:
    from torch import device

    from delo_llava.engines.ranks import Ranks

    def fails() -> None:
        raise DeloError("no")

    for action in (Ranks(0, 1, device("cpu")).run_each, Ranks(0, 1, device("cpu")).agree):
        with pytest.raises(DeloError) as caught:
            action(fails) if action.__name__ == "run_each" else action(DeloError("no"))  # type: ignore[arg-type]
        assert caught.value.everywhere
