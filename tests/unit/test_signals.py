"""Signals set a flag, from before torch is loaded; a second interrupt kills; leaving is exit code 75."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from delo_llava.cli import told
from delo_llava.engines import signals
from delo_llava.engines.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in signals.WATCHED}
    yield
    signals.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.WATCHED)
def test_a_signal_is_noticed_at_the_next_boundary(number: signal.Signals) -> None:
    signals.install()
    ALONE.leave_if_asked("nothing")
    assert not ALONE.leave_soon()
    os.kill(os.getpid(), number)
    assert signals.requested() == number.name and ALONE.leave_soon()
    with pytest.raises(signals.Preempted, match=f"asked to leave by {number.name} while testing") as left:
        ALONE.leave_if_asked("testing")
    assert left.value.code == 75


def test_a_command_that_left_ends_with_75(capsys: pytest.CaptureFixture[str]) -> None:
    signals.install()
    os.kill(os.getpid(), signal.SIGTERM)

    def command() -> int:
        signals.leave_if_requested("testing")
        return 0

    assert told(command) == 75
    assert "the same command goes on" in capsys.readouterr().err
    signals.clear()
    assert told(command) == 0


CHILD = """
import os, signal, sys, time
from delo_llava.engines import signals
signals.install()
assert "torch" not in sys.modules, "handlers must stand before the slow imports"
for word in sys.argv[1:]:
    os.kill(os.getpid(), getattr(signal, word))
print("alive", signals.requested())
"""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["SIGINT"], 0, "alive SIGINT"),
        (["SIGTERM", "SIGTERM", "SIGINT"], 0, "alive SIGTERM"),
        (["SIGINT", "SIGINT"], -signal.SIGINT, ""),
    ],
)
def test_only_a_second_interrupt_kills(words: list[str], code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (code, said)
    assert "leaving soon" in done.stderr
