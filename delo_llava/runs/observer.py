"""What happens beside the steps of a stage: metrics, progress, checkpoints, records that were left out."""

import time
from dataclasses import asdict

from delo_llava.config import RunConfig
from delo_llava.engines.ranks import Ranks
from delo_llava.methods.base import Stage
from delo_llava.runs.step_state import StepCheckpoints
from delo_llava.runs.store import RunStore
from delo_llava.training.fit import Running
from delo_llava.training.guards import judge_bad_images
from delo_llava.training.logging import MetricsLog, RunProgress
from delo_llava.training.loop import StepReport


class StageObserver:
    """Writes down one stage's steps; every rank has one, and the first one's writes.

    Args:
        running: the stage as training begins it.
        began: `time.monotonic()` when this launch began the stage.
    """

    def __init__(
        self,
        config: RunConfig,
        store: RunStore,
        ranks: Ranks,
        stage: Stage,
        checkpoints: StepCheckpoints,
        progress: RunProgress,
        running: Running,
        began: float,
    ) -> None:
        self.config, self.store, self.ranks, self.stage = config, store, ranks, stage
        self.checkpoints, self.progress, self.running = checkpoints, progress, running
        self.ledger = running.ledger
        self._began, self._before = began, running.ledger.seconds
        self._log: MetricsLog | None = None
        if ranks.first:
            train = config.train
            self._log = MetricsLog(store.metrics, stage.index, running.start, train.tensorboard)

    def close(self) -> None:
        """No step comes any more."""
        if self._log is not None:
            self._log.close()

    def step(self, report: StepReport) -> None:
        """Show it, log it, and look at the records whose images could not be read."""
        self.progress.step(report.seconds, report.loss)
        if report.step % self.config.train.log_every == 0 or report.step == self.running.steps - 1:
            self._write(asdict(report))
        self._count_bad_images()

    def skipped(self, step: int, record_ids: list[str]) -> None:
        """Say which records' step was left out, in the metrics and in run.json."""
        self._write({"step": step, "skipped": record_ids, "loss": None, "grad_norm": None})
        self.progress.say(f"step {step} left out: loss or gradient is not finite ({', '.join(record_ids)})")
        self.ranks.run_first(
            lambda: self.store.update_stage(self.stage.name, skipped_steps=self.ledger.skipped)
        )
        self._count_bad_images()

    def save(self, step: int) -> None:
        """A checkpoint that goes on with `step`; the metrics up to there are on the disk before it."""
        self.ledger.seconds = self.seconds()
        if self._log is not None:
            self._log.flush()
        self.checkpoints.save(step, self.running.engine, self.ledger)

    def seconds(self) -> float:
        """Seconds spent in this stage, earlier launches included."""
        return self._before + time.monotonic() - self._began

    def _write(self, entry: dict[str, object]) -> None:
        if self._log is None:
            return
        step = entry["step"]
        assert isinstance(step, int)
        epoch = (step + 1) * self.config.train.global_batch / self.running.examples
        known = {"stage": self.stage.index, "task": self.stage.name, "epoch": epoch, "time": time.time()}
        self._log.write({**known, **entry})

    def _count_bad_images(self) -> None:
        """Raises DeloError on every rank when there are too many."""
        if not self.running.collator.skip_bad_images:
            return
        self.ledger.bad_images |= dict(
            self.running.collator.bad_images
        )  # a copy: the collator's thread adds to it
        # A record comes to another rank in another epoch, and counts once.
        judge_bad_images(self.ranks.union(self.ledger.bad_images), self.config.data.max_bad_images)
