"""What methods share that decide per sample how low-rank adapters act: where they sit, whose frozen features
decide, and the context in which a forward is decided."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from delo_llava.adapters.carrier import find_carrier, frozen_queries, routing
from delo_llava.adapters.lowrank import LowRankConfig
from delo_llava.backbones.base import adapted_linears
from delo_llava.data.collate import Batch
from delo_llava.features.task_keys import TaskKeyMemory
from delo_llava.methods._encoded import EncodedMethod
from delo_llava.methods._linears import Linears, narrowed, placed
from delo_llava.methods._lowrank import LowRankMethod, LowRankOptions
from delo_llava.methods._size import stage_parameters
from delo_llava.methods.base import Passes, Prompt, Reduce, answer_logits, answer_loss_sum
from delo_llava.schema import UserPath


class RoutedOptions(LowRankOptions):
    """Options of every method that routes low-rank adapters per sample.

    Attributes:
        linears: which linears of the language layers have adapters: `all`, those of `attention`, its `qkv`,
            or those of the `mlp`.
        projector: whether the projector's linears have adapters, too.
        encoder: a folder with a CLIP whose features of image and text decide, as in papers that ask for one;
            left out, the base's own frozen features do.
    """

    linears: Linears = "all"
    projector: bool = True
    encoder: UserPath | None = None


class RoutedMethod(EncodedMethod, LowRankMethod):
    """The common ground: every forward is decided from frozen queries, of the base or of an encoder."""

    Config = RoutedOptions

    def config(self, base: nn.Module) -> LowRankConfig:
        """The adapter's configuration for the linears that the options name; a matched rank is matched over
        these.
        """
        found, options = super().config(base), self.options
        linears = self.placed(base)
        found.target_modules = narrowed(self.backbone.language_pattern, options.linears)
        found.projector_modules = self.backbone.projector_pattern if options.projector else None
        if options.rank == "match":
            wanted = stage_parameters(options.like, base, self.backbone, self.run)
            rank = (wanted - self.besides(base)) / sum(map(sum, linears.values()))
            found.r = max(1, round(rank / self.multiple)) * self.multiple
            found.alpha = options.alpha_over_rank * found.r
        return found

    def placed(self, base: nn.Module) -> dict[str, tuple[int, int]]:
        """Name -> (in, out) of the linears that have adapters."""
        adapted, options = adapted_linears(base, self.backbone), self.options
        return placed(adapted, self.backbone, options.linears, options.projector)

    def besides(self, base: nn.Module) -> int:
        """Trainable parameters besides the pairs, whatever their rank."""
        return self.outputs * sum(width for width, _ in self.placed(base).values())

    def anchor(
        self, memory: TaskKeyMemory, task: str, model: nn.Module, passes: Passes, reduce: Reduce
    ) -> None:
        """Make a task's anchors, the means of its samples' queries: one pass over its examples, towers
        only.
        """
        for batch in passes.all():
            queries = frozen_queries(model, self.inputs(batch), batch.inputs)
            memory.observe(task, queries, batch.presence)
        memory.settle(task, reduce)

    def loss_sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert batch.labels is not None
        with routing(model, self.inputs(batch)):
            return {"answer": answer_loss_sum(answer_logits(model, batch), batch.labels)}

    @contextmanager
    def answering(
        self, model: nn.Module, batch: Batch, tasks: Sequence[str] | None, beams: int = 1
    ) -> Iterator[Prompt]:
        if find_carrier(model) is None:  # the bare base of the zero-shot row
            yield Prompt.of(batch)
            return
        with routing(model, self.inputs(batch, expand=beams)):
            yield Prompt.of(batch)
