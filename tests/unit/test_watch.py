"""The live page of a run: what it says at every point of a run, and that only this machine is answered."""

import argparse
import json
import threading
import urllib.error
import urllib.request
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import report_support as support

from delo_eval.report.live import duration, live_page
from delo_llava.cli import main
from delo_llava.commands import watch
from delo_llava.errors import DeloError
from delo_llava.runs.store import RunStore

NOW = 1_000_000.0


@pytest.fixture()
def run(tmp_path: Path) -> Path:
    """Four steps of a stage and two of the next, a second a step; two stages of one epoch of four steps."""
    run = support.hostile_run(tmp_path / "run")
    record(
        run, plan=[{"name": name, "tasks": [name]} for name in ("plain", "later")], tasks=["plain", "later"]
    )
    (run / "results.json").unlink()
    steps(run, [("plain", i, (i + 1) / 4) for i in range(4)] + [("later", i, (i + 1) / 4) for i in range(2)])
    return run


def record(run: Path, **entries: Any) -> None:
    store = RunStore(run)
    store.run.write_text(json.dumps(store.read_run() | entries))


def steps(run: Path, done: list[tuple[str, int, float]]) -> None:
    """Log (task, step, epoch), the last one just before `NOW`."""
    lines = [
        {"stage": int(task == "later"), "task": task, "step": step, "epoch": epoch, "loss": 2.0,
         "grad_norm": 1.0, "time": NOW - len(done) + i,
         "lr": {"language": 0.5}, "seconds": 0.25}
        for i, (task, step, epoch) in enumerate(done)
    ]  # fmt: skip
    RunStore(run).metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_it_shows_how_far_a_run_is_and_how_long_it_takes(run: Path) -> None:
    page = live_page(run, 7, NOW)
    # 6 of 8 steps in 5 seconds between the first and the last: a third of that is left.
    assert "training 2. later" in page and 'value="75"' in page and "about 2 s left" in page
    assert 'http-equiv="refresh" content="7"' in page
    assert "step of later" in page and ">0.25<" in page
    assert "No stage was evaluated yet" in page


def test_it_says_when_nothing_happens_and_why_a_run_was_left(run: Path) -> None:
    assert "no step for 5 min: it evaluates, or it does not run" in live_page(run, 5, NOW + 301)
    record(run, stopped={"reason": "SIGTERM", "where": "training, before step 6", "time": NOW})
    page = live_page(run, 5, NOW)
    assert "left by SIGTERM while training, before step 6; the same command goes on" in page


def test_before_the_first_step_and_after_the_last(run: Path) -> None:
    RunStore(run).metrics.write_text("")
    assert "starting: no step was logged yet" in live_page(run, 5, NOW)
    RunStore(run).complete.write_text("{}")
    page = live_page(run, 5, NOW)
    assert "<strong>finished</strong>" in page and 'http-equiv="refresh"' not in page


def test_what_was_evaluated_is_drawn_and_texts_stay_texts(tmp_path: Path) -> None:
    page = live_page(support.hostile_run(tmp_path / "run"), 5)
    assert "Each task from its own stage on" in page
    assert support.SCRIPT not in page and support.EVENT not in page


def test_a_folder_without_a_run_is_refused_before_anything_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DeloError, match="no run in this folder"):
        live_page(tmp_path, 5)
    with pytest.raises(SystemExit) as ended:
        main(["watch", str(tmp_path)])
    assert ended.value.code == 2 and "no run in this folder" in capsys.readouterr().err


def test_a_port_that_cannot_be_had_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), watch._Handler) as other, pytest.raises(SystemExit):
        main(["watch", str(run), "--port", str(other.server_port)])
    assert "--port 0" in capsys.readouterr().err


def test_only_this_machine_is_answered_and_only_with_the_page(run: Path) -> None:
    options = argparse.Namespace(run=run, every=5)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(watch._Handler, options)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        with urllib.request.urlopen(place + "/") as answer:
            assert answer.status == 200 and "<h2>Now</h2>" in answer.read().decode()
        asked = {"/": "evil.example:80", "/../etc/passwd": None}
        codes = []
        for path, host in asked.items():
            request = urllib.request.Request(place + path, headers={"Host": host} if host else {})
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request)
            codes.append(refused.value.code)
        RunStore(run).run.write_text("{")  # as if it were being written
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(place + "/")
        server.shutdown()
    assert [*codes, refused.value.code] == [403, 404, 503]


@pytest.mark.parametrize(("seconds", "text"), [(20.4, "20 s"), (61, "1 min"), (3 * 3600 + 300, "3 h 05 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
