"""`prefix_small`: one prefix of keys and values for every row, trained through all tasks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from delo_llava.adapters.carrier import Carrier, carrier_of, routing
from delo_llava.adapters.own import TENSORS
from delo_llava.adapters.prompts import PrefixPlan, PrefixShape, attach_prefixes, prefix_shape
from delo_llava.data.collate import Batch
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries
from delo_llava.methods.base import Method, MethodConfig, Past, Prompt, Stage, answer_logits, answer_loss_sum


class Options(MethodConfig):
    """Attributes:
    length: of the prefix.
    """

    length: int = Field(3, ge=1)


class Pool(nn.Module):
    """The prefix of every layer: 2×layers×heads×length×width."""

    def __init__(self, shape: PrefixShape, length: int) -> None:
        super().__init__()
        self.prefix = nn.Parameter(torch.randn(2, shape.layers, shape.heads, length, shape.width) * 0.5)

    def forward(self) -> Tensor:
        """A copy, since ZeRO-3 takes the parameter away again."""
        return self.prefix.clone()


class Prefix(Method):
    """Frozen base, one prefix."""

    Config = Options

    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        base.requires_grad_(False)
        pool = Pool(prefix_shape(base), self.options.length)
        base.add_module("pool", pool)
        if stage.past:
            pool.load_state_dict(load_file(list(stage.past.values())[-1].folder / TENSORS))

        def decide(inputs: RouteInputs, queries: Queries) -> PrefixPlan:
            keys, values = pool()
            rows = len(inputs.input_ids)
            one, two = ({i: t.expand(rows, *t.shape) for i, t in enumerate(part)} for part in (keys, values))
            return PrefixPlan(one, two)

        carrier = Carrier(decide)
        carrier.attach(base, self.backbone.projector_name)
        attach_prefixes(base, carrier)
        return base

    def loss_sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert batch.labels is not None
        with routing(model, RouteInputs.from_batch(batch)):
            return {"answer": answer_loss_sum(answer_logits(model, batch), batch.labels)}

    def tensors(self, model: Any, stage: Stage) -> dict[str, Tensor]:
        state: dict[str, Tensor] = model.get_submodule("pool").state_dict()
        return state

    def save(self, model: Any, stage: Stage, folder: Path) -> None:
        save_file(
            {name: t.detach().cpu() for name, t in self.tensors(model, stage).items()}, folder / TENSORS
        )

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        return self.begin(base, Stage(0, "loaded", past=past)) if past else base

    @contextmanager
    def answering(
        self, model: nn.Module, batch: Batch, tasks: Sequence[str] | None, beams: int = 1
    ) -> Iterator[Prompt]:
        if "carrier" not in model.__dict__:
            yield Prompt.of(batch)
            return
        assert carrier_of(model)
        with routing(model, RouteInputs.from_batch(batch, expand=beams)):
            yield Prompt.of(batch)


METHOD = Prefix
