"""`mora`: low-rank updates of a weight's directions, whose columns keep lengths of their own.

Source: MoRA for missing modalities (ICLR 2026, arXiv 2511.06225); specification: newer_methods, section 6. Of
its two parts the one that is a modality's own, in every adapted linear:

    W' = (W + s·B A) · diag(m_j / ‖W + s·B A‖_j),   ‖·‖_j: length of column j (over the outputs)

with m trained from ‖W‖_j, so that W' = W at first.

needs_task: no. encoders: none. mergeable: yes. Bytes per task: nothing is added to the one adapter, which has
4·(r·(d_in + d_out) + d_in) bytes for a linear. Not a continual method, but a baseline for missing modalities.

simplified: the paper's other part, S = A(BᵀB)Aᵀ of a pair that the towers of a CLIP share by layer, needs
square weights and a second tower that is adapted; here the tower is frozen, so the own part is alone. The
length is a constant of a step, as in DoRA: no gradient goes through it. It costs a second product with the
frozen weight in every forward, and one with A for every weight in a step.
Not reproduced: both parts starting at the whole weight's length, so that training begins at twice the weight
(T1); weight decay on the lengths (T4). As in the paper, presence is not read (T2): a gap is only what the
prompt shows of it.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from delo_llava.adapters.lowrank import LowRankConfig, LowRankLayer, mixed
from delo_llava.backbones._quant import dense_weight
from delo_llava.backbones.base import adapted_linears
from delo_llava.config import TrainConfig
from delo_llava.methods._lowrank import ADAPTER, LowRankMethod, lowrank_config
from delo_llava.methods.base import Capabilities, Clock, Past, Stage, Trained

#: The map beside every pair that holds the columns' lengths.
MAGNITUDE = "magnitude"
#: Entries of a weight that are made at once.
ENTRIES = 1 << 22


class Mora(LowRankMethod):
    """One adapter through all tasks: directions by a pair, lengths by themselves."""

    capabilities = Capabilities(mergeable=True)
    #: Of every adapted linear, by its name: ‖W + s·B A‖ by columns, d_in, as A and B stand.
    _norms: dict[str, Tensor]
    #: A and B of those linears whose norm must be made anew when they are used next.
    _changed: dict[str, tuple[Tensor, Tensor]]
    _paths: dict[str, str]

    def config(self, base: nn.Module) -> LowRankConfig:
        """A matched rank counts the lengths."""
        lengths = sum(width for width, _ in adapted_linears(base, self.backbone).values())
        found = lowrank_config(self.options, base, self.backbone, self.run, 1, 0, besides=lengths)
        found.heads = {MAGNITUDE: ["in", 1, "quotient"]}
        return found

    # ---- a stage
    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        if stage.past:
            return self._ready(self.continued(base, stage.past))
        model = self._ready(self.fresh(base, ADAPTER))
        for layer in _layers(model).values():
            heads: Any = layer.lowrank_H[ADAPTER]
            with torch.no_grad():
                heads[MAGNITUDE].weight.copy_(self._norms[layer.name].unsqueeze(0))
        return model

    def _ready(self, model: nn.Module) -> nn.Module:
        """The model with every linear's norm as its pair stands; later ones are made when a step changed it.

        That is in a forward, before the base layer's output is used: where an engine keeps weights in pieces,
        they are whole there and nowhere else.
        """
        layers = _layers(model)
        self._paths, self._changed = {path: layer.name for path, layer in layers.items()}, {}
        self._norms = {layer.name: self._norm(layer, *layer.pair(ADAPTER)) for layer in layers.values()}
        for layer in layers.values():
            layer.base_layer.register_forward_hook(partial(self._renewed, layer))
        return mixed(model, self.mix)  # type: ignore[no-any-return]

    def _norm(self, layer: LowRankLayer, a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            return column_norms(dense_weight(layer.base_layer), a, b, layer.scale[ADAPTER])

    def _renewed(self, layer: LowRankLayer, *_: Any) -> None:
        changed = self._changed.pop(layer.name, None)
        if changed is not None:
            self._norms[layer.name] = self._norm(layer, *changed)

    def groups(self, model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
        """Lengths are not decayed."""
        found = []
        lengths = {id(p) for name, p in model.named_parameters() if f".{MAGNITUDE}." in name}
        for group in super().groups(model, train):
            pairs = [p for p in group["params"] if id(p) not in lengths]
            rest = [p for p in group["params"] if id(p) in lengths]
            found += [group | {"params": pairs}, group | {"params": rest, "weight_decay": 0.0}]
        return found

    def after_step(self, trained: Trained, before: Mapping[str, Tensor], clock: Clock) -> None:
        values = trained.values()
        for path, name in self._paths.items():
            a, b = (values[f"{path}.lowrank_{side}.{ADAPTER}.weight"] for side in "AB")
            self._changed[name] = a, b

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """The trained parameters are those of the checkpoint here; norms follow from them."""
        self._changed = {layer.name: _pair(layer) for layer in _layers(model).values()}

    # ---- answers
    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        if not past:
            return base.requires_grad_(False)
        return self._ready(self.opened(base, past, only_last=True))

    def mix(self, layer: LowRankLayer, x: Tensor) -> Tensor:
        """(W' − W) x = W(c − 1)x + s·B A c x, where c_j = m_j / ‖W + s·B A‖_j."""
        scale = layer.head(ADAPTER, MAGNITUDE, self._norms[layer.name].to(x.device))
        stretched: Tensor = layer.base_layer((x * (scale - 1)).to(x.dtype))
        bias: Tensor | None = getattr(layer.base_layer, "bias", None)
        if bias is not None:
            stretched = stretched - bias
        return stretched + layer.up(ADAPTER, layer.down(ADAPTER, x * scale))

    def updates(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for layer in _layers(model).values():
            with torch.no_grad():
                a, b = (t.double() for t in layer.pair(ADAPTER))
                weight, norms = dense_weight(layer.base_layer).double(), self._norms[layer.name]
                scale = layer.head(ADAPTER, MAGNITUDE, norms).double()
                yield layer.name, weight * (scale - 1) + layer.scale[ADAPTER] * (b @ a) * scale


def column_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W + s·B A‖ by columns, d_in, fp32, of W d_out×d_in; a column of zeros has a length that is not zero.

    W + s·B A is never whole: it is made a few rows at a time.
    """
    a, b = a.to(weight.device), b.to(weight.device)
    step = max(1, ENTRIES // weight.shape[1])
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        total = total + torch.addmm(weight[rows].float(), b[rows], a, alpha=scale).square().sum(0)
    lengths: Tensor = total.sqrt().float().clamp(min=torch.finfo(torch.float32).tiny)
    return lengths


def _layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """The adapted linears by their paths among the model's modules."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LowRankLayer)}


def _pair(layer: LowRankLayer) -> tuple[Tensor, Tensor]:
    """Copies of A and B, whole before an engine begins."""
    a, b = layer.pair(ADAPTER)
    return a.detach().clone(), b.detach().clone()


METHOD = Mora
