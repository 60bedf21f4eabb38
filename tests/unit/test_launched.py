"""What a launcher says in the environment: read in one place, and told where it means nothing."""

from pathlib import Path

import pytest
import torch

from delo_eval.harness.ranks import launched_ranks
from delo_llava import cli, endings
from delo_llava.config import RunConfig
from delo_llava.engines.launched import Launched, device_number, launched, require_group, speaks
from delo_llava.engines.ranks import start_ranks
from delo_llava.errors import DeloError

NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def say(monkeypatch: pytest.MonkeyPatch, **words: str) -> None:
    for name, word in words.items():
        monkeypatch.setenv(name, word)


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched() == Launched(0, 1, 0, 1) and speaks()
    require_group()


def test_both_launchers_words_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="10.1.2.3", MASTER_PORT="29511")
    assert launched() == Launched(5, 8, 1, 8) and not speaks()
    require_group()
    say(monkeypatch, LOCAL_SIZE="4")
    assert launched().local_world == 4
    say(monkeypatch, LOCAL_WORLD_SIZE="2")
    assert launched().local_world == 2


@pytest.mark.parametrize(
    ("name", "word", "allowed"),
    [
        ("WORLD_SIZE", "two", "1 or more"), ("WORLD_SIZE", "", "1 or more"), ("WORLD_SIZE", "0", "1 or more"),
        ("WORLD_SIZE", "-1", "1 or more"), ("WORLD_SIZE", "2.0", "1 or more"),
        ("WORLD_SIZE", "$SLURM_NTASKS", "1 or more"), ("RANK", "first", "0 to 2"), ("RANK", "3", "0 to 2"),
        ("RANK", "²", "0 to 2"), ("LOCAL_RANK", "gpu0", "0 to 2"), ("LOCAL_WORLD_SIZE", "all", "1 to 3"),
        ("LOCAL_SIZE", "0", "1 to 3"), ("MASTER_PORT", "auto", "1 to 65535"),
        ("MASTER_PORT", "70000", "1 to 65535"),
    ],
)  # fmt: skip
def test_words_that_are_no_numbers_are_told(
    name: str, word: str, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, WORLD_SIZE="3", RANK="1")
    say(monkeypatch, **{name: word})
    with pytest.raises(DeloError, match=f"environment variable {name} must be") as caught:
        launched()
    assert (caught.value.given, caught.value.allowed) == (f"{name}={word}", [allowed])
    assert "unset it" in str(caught.value.fix)


@pytest.mark.parametrize("absent", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_several_processes_need_a_place_to_meet(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29555")
    monkeypatch.delenv(absent)
    for join in (require_group, lambda: start_ranks(RunConfig(device="cpu", zero="1"))):
        with pytest.raises(DeloError, match=f"2 processes, but {absent} is not set"):
            join()
    with pytest.raises(DeloError, match=absent), launched_ranks(RunConfig(device="cpu")):
        pass


def test_the_commands_end_with_the_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from delo_llava.runs.job import check_plan

    say(monkeypatch, WORLD_SIZE="two")
    with pytest.raises(SystemExit, match="2"):
        endings.told(lambda: check_plan(RunConfig()))
    with pytest.raises(DeloError, match="WORLD_SIZE"), launched_ranks(RunConfig(device="cpu")):
        pass
    # Whoever does not know its number tells what is wrong: nobody else may.
    say(monkeypatch, WORLD_SIZE="1", RANK="none")
    with pytest.raises(SystemExit, match="2"):
        cli.main_train(["--quant=nf3"])
    told = capsys.readouterr().err
    assert "WORLD_SIZE=two" in told and "did you mean nf4?" in told and "Traceback" not in told


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, WORLD_SIZE="4", LOCAL_RANK="3")
    assert device_number(4) == 3
    with pytest.raises(DeloError, match="no GPU for this process") as caught:
        device_number(2)
    assert caught.value.given == "LOCAL_RANK=3, 2 GPUs seen"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    say(monkeypatch, RANK="3", MASTER_ADDR="127.0.0.1", MASTER_PORT="29555")
    with pytest.raises(DeloError, match="LOCAL_RANK=3, 2 GPUs"):
        start_ranks(RunConfig(zero="1"))
    with pytest.raises(DeloError, match="LOCAL_RANK=3, 2 GPUs"), launched_ranks(RunConfig()):
        pass
