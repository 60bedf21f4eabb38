"""What a launch tells of its progress: the place in the whole sequence, whatever earlier launches did."""

import io

import pytest
from rich.console import Console

from delo_llava.training import logging
from delo_llava.training.logging import RunProgress


def test_a_later_launch_counts_on_where_the_earlier_ones_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "QUIET", -1.0)
    progress = RunProgress(steps=200, cells=0, before=100, shown=True)
    told = io.StringIO()
    progress.console = Console(file=told, width=200)
    progress.describe("3. beasts")
    progress.resumed(11)
    progress.step(1.0, 0.5)
    assert "3. beasts: step 112/300 of the sequence, loss 0.5000" in told.getvalue()
    assert progress.eta.seconds() == pytest.approx(188.0)
