"""Low-rank pairs beside frozen linears, which a method mixes: y = W₀x + s·Σ_a B_a (c_a ∘ A_a x).

The coefficients c are what methods differ in: none (a sum of adapters), a mask or weights for each row,
decided once for a forward, or a router's output for each token. The update is never
materialised, and a mask costs one product of the narrow tensor. A and B are modules of their own, which is
what ZeRO-3 gathers and releases.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from delo_llava.adapters.carrier import Decide
from delo_llava.adapters.register import register_tuner
from delo_llava.adapters.tuner import CarriedLayer, CarriedTuner, LinearsConfig
from delo_llava.errors import DeloError
from delo_llava.features.inputs import RouteInputs
from delo_llava.features.queries import Queries


class LowRankType(str, Enum):  # noqa: UP042 (PEFT shows what follows the point of `str(key)`)
    """PEFT's key of this tuner."""

    DELO_LOWRANK = "DELO_LOWRANK"


@dataclass
class LowRankConfig(LinearsConfig):
    """One adapter: a pair of matrices for every linear.

    Attributes:
        r: rank, over all experts that it is read as.
        alpha: the update is scaled by alpha / r.
        dropout: on the adapter's input, while training.
        outputs: of a linear router beside every pair (d_in → outputs, without bias); 0: none.
        heads: further maps beside every pair, linear and without bias: name -> (inputs, outputs), where the
            inputs are a number or those (`in`) or the outputs (`out`) of the linear that is adapted; with a
            third word `distance`, the squared distances from so many points; with `quotient` (one output), a
            row of numbers over the inputs, element by element.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    outputs: int = 0
    heads: dict[str, list[int | str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LowRankType.DELO_LOWRANK
        if self.r < 1:
            raise DeloError("A rank must be at least 1", given=self.r, fix="set rank to a positive number")


class Distance(nn.Linear):
    """Squared distances of …×d from the k rows of the weight, …×k."""

    def forward(self, input: Tensor) -> Tensor:
        """The sums of squared differences."""
        return (input.unsqueeze(-2) - self.weight).square().sum(-1)


class Quotient(nn.Linear):
    """The weight's one row over the inputs, …×d."""

    def forward(self, input: Tensor) -> Tensor:
        """Element by element."""
        return self.weight[0] / input


class LowRankLayer(CarriedLayer):
    """A frozen linear with one pair (and perhaps a router and further maps) per adapter."""

    adapter_layer_names = ("lowrank_A", "lowrank_B", "lowrank_R", "lowrank_H")
    other_param_names = ("scale",)

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.name = ""  # of the linear within the frozen model, set after injection
        self.scale: dict[str, float] = {}
        self.dropout: nn.Module = nn.Identity()
        self.lowrank_A, self.lowrank_B, self.lowrank_R = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.lowrank_H = nn.ModuleDict()

    def update_layer(self, name: str, config: LowRankConfig) -> None:
        """Add the pair of adapter `name`: A Kaiming-uniform (a = √5) as LoRA's, B = 0, fp32, drawn on the CPU
        so that a seed fixes them.
        """
        self.scale[name] = config.alpha / config.r
        if config.dropout:
            self.dropout = nn.Dropout(config.dropout)
        a = nn.Linear(self.in_features, config.r, bias=False, device="cpu")
        b = nn.Linear(config.r, self.out_features, bias=False, device="cpu")
        nn.init.kaiming_uniform_(a.weight, a=5**0.5)
        nn.init.zeros_(b.weight)
        self.lowrank_A[name], self.lowrank_B[name] = a, b
        if config.outputs:
            self.lowrank_R[name] = nn.Linear(self.in_features, config.outputs, bias=False, device="cpu")
        if config.heads:
            made = {head: self._head(*map(str, form)) for head, form in config.heads.items()}
            self.lowrank_H[name] = nn.ModuleDict(made)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters)

    def _head(self, inputs: str, outputs: str, kind: str = "linear") -> nn.Linear:
        widths = {"in": self.in_features, "out": self.out_features}
        made = {"linear": nn.Linear, "distance": Distance, "quotient": Quotient}[kind]
        return made(widths[inputs] if inputs in widths else int(inputs), int(outputs), False, device="cpu")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output plus what the method's mixer adds."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if not self.acts or self.carrier.suspended:
            return y
        mix: Mixer = self.carrier.mix or summed
        return y + mix(self, x).to(y.dtype)

    @property
    def beside(self) -> tuple[str, str]:
        """A plain sum can be folded, but by our own command: in float64, over 4 bit too, rounded once."""
        if self.carrier.mix not in (None, summed):
            return super().beside
        return (
            "they are folded in float64 and rounded once, which PEFT's merging does not do",
            "delo-llava export --run RUN --stage last --out FOLDER",
        )

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """The weights of A, r×d_in, and of B, d_out×r; whole outside of engines only."""
        a: Any = self.lowrank_A[name]
        b: Any = self.lowrank_B[name]
        return a.weight, b.weight

    def down(self, name: str, x: Tensor) -> Tensor:
        """A x, …×r, in fp32."""
        a: nn.Linear = self.lowrank_A[name]  # type: ignore[assignment]
        u: Tensor = a(self.dropout(x.to(torch.float32)))
        return u

    def up(self, name: str, u: Tensor) -> Tensor:
        """s·B u, …×d_out, in fp32."""
        y: Tensor = self.lowrank_B[name](u)
        return y * self.scale[name]

    def scores(self, name: str, x: Tensor) -> Tensor:
        """The router's outputs for every token, in fp32."""
        found: Tensor = self.lowrank_R[name](x.to(torch.float32))
        return found

    def head(self, name: str, head: str, x: Tensor) -> Tensor:
        """What one of the further maps of an adapter makes of `x`, in fp32."""
        maps: Any = self.lowrank_H[name]
        found: Tensor = maps[head](x.to(torch.float32))
        return found


#: What a layer adds to its base's output, from its input.
Mixer = Callable[[LowRankLayer, Tensor], Tensor]


def summed(layer: LowRankLayer, x: Tensor) -> Tensor:
    """Σ over the active adapters."""
    return sum_of(layer, layer.active_adapters, x)


def sum_of(layer: LowRankLayer, names: Sequence[str], x: Tensor) -> Tensor:
    """Σ over some adapters, in their order; at least one."""
    total = layer.up(names[0], layer.down(names[0], x))
    for name in names[1:]:
        total = total + layer.up(name, layer.down(name, x))
    return total


@dataclass(frozen=True)
class RowPlan:
    """Coefficients for the rows of a forward.

    Attributes:
        values: by a name that the mixer knows (an adapter's, a layer's), R×k.
        inputs: what is known of the batch, for the projector, whose rows are images.
        extra: what layers decide themselves and keep for a `generate`, by their names.
    """

    values: Mapping[str, Tensor]
    inputs: RouteInputs
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of rows, beams included."""
        return len(next(iter(self.values.values())))

    def index_select(self, rows: Tensor) -> "RowPlan":
        """The coefficients of some rows in a new order."""
        taken = {name: value.index_select(0, rows) for name, value in self.values.items()}
        return RowPlan(taken, self.inputs, self.extra)

    def at(self, layer: LowRankLayer, name: str, x: Tensor) -> Tensor:
        """Coefficients shaped to multiply a tensor of the layer's tokens: E×1×k for E entries of tokens, or k
        for each packed token. Entries are rows, or in the projector units (tiles) of images.
        """
        return self.spread(layer, self.of(layer, self.values[name]), x)

    def of(self, layer: LowRankLayer, value: Tensor) -> Tensor:
        """A value of the rows (R×k) for what a layer has as rows: in the projector, these are images."""
        return value.index_select(0, self.inputs.image_rows) if layer.projector else value

    def spread(self, layer: LowRankLayer, value: Tensor, x: Tensor) -> Tensor:
        """A value of a layer's own rows (n×k) shaped to multiply a tensor of its tokens, see `at`."""
        entries = x.shape[0]
        if layer.projector:
            units = torch.tensor(self.inputs.image_lengths(entries), device=value.device)
            value = value.repeat_interleave(units, dim=0)
        elif x.dim() == 2:
            value = value.repeat_interleave(entries // len(value), dim=0)
        return value.unsqueeze(1) if x.dim() == 3 else value


class LowRankModel(CarriedTuner):
    """Low-rank adapters around a frozen vision-language model.

    Attributes:
        decider: what decides the rows' coefficients; None: nothing is decided, every forward is alike.
    """

    prefix = "lowrank_"
    tuner_layer_cls = LowRankLayer
    decider: Decide | None = None

    def decide(self, inputs: RouteInputs, queries: Queries) -> Any:
        """What the method's decider says; it is asked only where there is one."""
        assert self.decider is not None
        return self.decider(inputs, queries)

    def _enabled(self) -> bool:
        return self.decider is not None and super()._enabled()

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add a pair to every target linear."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for name, module in self.model.named_modules():
            if isinstance(module, LowRankLayer):
                module.name = name


register_tuner(LowRankType.DELO_LOWRANK, LowRankConfig, LowRankModel)


def lowrank(model: nn.Module) -> LowRankModel:
    """The tuner inside a PEFT model, however an engine wraps it.

    Raises:
        DeloError: the model has no low-rank adapters of this kind.
    """
    found = next((m for m in model.modules() if isinstance(m, LowRankModel)), None)
    if found is None:
        raise DeloError(
            "This model has no low-rank adapters", given=type(model).__name__, fix="inject them first"
        )
    return found


def inject(
    base: nn.Module, config: LowRankConfig, name: str, mix: Mixer | None = None, decider: Decide | None = None
) -> Any:
    """The base with one adapter, and how a method mixes it."""
    return mixed(get_peft_model(base, config, adapter_name=name), mix, decider)


def mixed(model: Any, mix: Mixer | None, decider: Decide | None = None) -> Any:
    """`model` with another mixer; a decider makes every forward want `routing`."""
    tuner = lowrank(model)
    tuner.carrier.mix, tuner.decider = mix, decider
    return model


def accumulate(model: Any, names: Sequence[str], into: str) -> None:
    """Put adapters together into one that adds what they add together: its rank is the sum of theirs.

    Rows of A and columns of B are put side by side as they are (B is rescaled only where an adapter's alpha/r
    differs from the first one's), so a linear costs two products however many adapters there were.
    """
    configs = [model.peft_config[name] for name in names]
    rank, scale = sum(config.r for config in configs), configs[0].alpha / configs[0].r
    with torch.random.fork_rng(devices=[]):  # weights are drawn, and written over
        model.add_adapter(into, replace(configs[0], r=rank, alpha=scale * rank))
    tuner = lowrank(model)
    with torch.no_grad():
        for layer in sum(tuner.layers(), start=list[LowRankLayer]()):
            pairs = [layer.pair(name) for name in names]
            scales = [layer.scale[name] / layer.scale[names[0]] for name in names]
            a, b = layer.pair(into)
            a.copy_(torch.cat([pair[0] for pair in pairs]))
            b.copy_(torch.cat([f * pair[1] for f, pair in zip(scales, pairs, strict=True)], dim=1))
    tuner.set_adapter([into], inference_mode=True)
    for name in names:
        model.delete_adapter(name)
