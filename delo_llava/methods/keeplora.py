"""`keeplora`: LoRA within the directions that neither the base's weights nor earlier tasks need.

Source: KeepLoRA (ICLR 2026, arXiv 2601.19659), the variant for multimodal language models; specification:
newer methods, section 5. For every adapted linear W (d_out×d_in), with U orthonormal on its input side:
at first U = the right singular vectors of W that hold less than `energy` of its squared singular values;
before a task A = the leading right singular vectors of Ḡ(I − UUᵀ), Ḡ the mean gradient ∂L/∂W over some
samples, frozen, and B = 0; B alone is trained; afterwards U grows by the leading right singular vectors of
what U does not explain of the gradient at the model as it then is, until `explained` of its square is. So
ΔW·U = sBA·U = 0 after any optimiser.

needs_task: no; encoders: none; mergeable: yes (here the pairs stay beside W, so that 4-bit bases stay as they
are); per task: a pair, and the appended directions, at most 2r·d_in fp32 values per linear.
Simplified: Ḡ (as large as W) is never formed. Two random sketches of it, 2r and 4r wide, are added up in one
pass and give its range and then its singular vectors (Tropp et al. 2017, algorithm 7); that is exact up to
rank 2r of Ḡ, and at most 2r directions are appended in a task. The projector is adapted and protected like
the other linears; the released code trains it whole and unprotected.
Where earlier tasks left fewer directions of a linear than the rank, the pair has as many and the rest of A is
zero, which `limited_rank.json` of the stage says.
Not reproduced: singular vectors from a random projection without oversampling.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from delo_llava.adapters.lowrank import LowRankConfig, LowRankLayer
from delo_llava.backbones._quant import dense_weight
from delo_llava.backbones.base import adapted_linears
from delo_llava.errors import DeloError
from delo_llava.files import write_json_atomic
from delo_llava.methods._lowrank import LowRankMethod, LowRankOptions, lowrank_config
from delo_llava.methods._size import stage_parameters
from delo_llava.methods.base import Capabilities, Passes, Past, Reduce, Stage
from delo_llava.strict import read_tensors

FILE = "keeplora.safetensors"
#: Linear -> rank of a task's pair where earlier tasks left fewer directions than the options ask for.
LIMITED = "limited_rank.json"
#: Singular values below this share of the largest are rounding.
SEEN = 1e-6


class KeepLoraOptions(LowRankOptions):
    """Options of KeepLoRA.

    Attributes:
        rank: a number, or `match`: the rank whose trainable parameters, those of B alone, come nearest to
            what the method `like` trains in a stage.
        energy: of the base's weights that is protected: share of their squared singular values.
        explained: of the squared gradient after a task that the protected directions are made to hold.
        samples: of a task whose gradients are averaged, before and after it (the paper: a fifth of the data).
    """

    alpha_over_rank: float = Field(0.25, gt=0)
    energy: float = Field(0.6, ge=0, lt=1)
    explained: float = Field(0.99, gt=0, lt=1)
    samples: int = Field(512, ge=1)


class Directions(NamedTuple):
    """Orthonormal input directions of a mean gradient outside a subspace, most important first.

    Attributes:
        columns: d_in×n, float64.
        energy: n, squared singular values.
        inside: squared norm of the gradient within the subspace.
    """

    columns: Tensor
    energy: Tensor
    inside: Tensor


class GradientSketch:
    """Σ xδᵀ of one linear (d_in×d_out, the transposed gradient of its weight) in two random projections.

    Everything is linear in the gradient, so sums over samples and ranks are those of the whole; float64, so
    that their order hardly matters.

    Args:
        width: directions that it can tell apart; `seed`: of the projections, equal on every rank.
    """

    def __init__(self, inputs: int, outputs: int, width: int, seed: int, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(seed)
        width = min(width, inputs, outputs)

        def gaussian(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=draw, dtype=torch.float64).to(device)

        self.right, self.left = gaussian(outputs, width), gaussian(2 * width, inputs)
        self.range, self.core = gaussian(inputs, width) * 0, gaussian(2 * width, outputs) * 0

    def add(self, x: Tensor, delta: Tensor) -> None:
        """Inputs …×d_in and gradients of the outputs …×d_out, of the same tokens."""
        rows, gradients = x.flatten(0, -2).double(), delta.flatten(0, -2).double()
        self.range += rows.T @ (gradients @ self.right)
        self.core += (rows @ self.left.T).T @ gradients

    def reduced(self, reduce: Reduce, count: float) -> Self:
        """The mean over the samples of all ranks."""
        self.range, self.core = reduce(self.range) / count, reduce(self.core) / count
        return self

    def outside(self, basis: Tensor) -> Directions:
        """The directions of the gradient outside the span of `basis` (d_in×k, orthonormal)."""
        basis = basis.to(self.range)
        found = torch.linalg.qr(self.range).Q
        core = torch.linalg.pinv(self.left @ found) @ self.core  # the gradient is found·core
        inner = basis.T @ found
        rest, turn = torch.linalg.qr(found - basis @ inner)
        left, values, _ = torch.linalg.svd(turn @ core, full_matrices=False)
        seen = int((values > SEEN * torch.linalg.matrix_norm(core)).sum())
        return Directions(rest @ left[:, :seen], values[:seen] ** 2, ((inner @ core) ** 2).sum())


class KeepLora(LowRankMethod):
    """One pair per task beside the earlier ones, whose A is chosen before the task and stays."""

    capabilities = Capabilities(mergeable=True)
    Config = KeepLoraOptions

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._name, self._seed = "", 0
        self._weights: dict[str, Tensor] = {}  # directions of the base's weights: the same in every stage
        self._earlier: dict[str, Tensor] = {}
        self._appended: dict[str, Tensor] = {}
        self._chosen: dict[str, Tensor] = {}

    def config(self, base: nn.Module) -> LowRankConfig:
        """B alone is trained, so a matched rank counts its width only."""
        options = self.options
        if options.rank == "match":
            outputs = sum(out for _, out in adapted_linears(base, self.backbone).values())
            wanted = stage_parameters(options.like, base, self.backbone, self.run)
            options = options.model_copy(update={"rank": max(1, round(wanted / outputs))})
        return lowrank_config(options, base, self.backbone, self.run, self.multiple, self.outputs)

    def begin(self, base: nn.Module, stage: Stage) -> nn.Module:
        model = self.beside(base, stage.past, stage.name)
        self._name, self._seed, self._appended, self._chosen = stage.name, stage.seed, {}, {}
        parts = [
            read_tensors(past.folder / FILE, "The directions of a stage") for past in stage.past.values()
        ]
        names = sorted({name for part in parts for name in part})
        self._earlier = {name: torch.cat([p[name] for p in parts if name in p], 1) for name in names}
        for layer in _layers(model):
            layer.lowrank_A[stage.name].requires_grad_(False)
        return model  # type: ignore[no-any-return]

    def prepare(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        """Choose every A."""
        sketches = self._gradients(model, passes, reduce)
        for number, layer in enumerate(_layers(model)):
            rank, basis = self._rank(layer), self._basis(layer)
            some = min(rank, layer.in_features - basis.shape[1]) if layer.name in self._earlier else rank
            found = sketches[layer.name].outside(basis).columns[:, :some]
            seed = self._seed + len(sketches) + number
            whole = completed(found, basis.to(found), some, seed, layer.name)
            # Where earlier tasks left no more, the other rows of A stay zero and learn nothing.
            whole = functional.pad(whole, (0, rank - some))
            self._chosen[layer.name] = whole.T.float().contiguous().cpu()
        self._place(model)

    def finish(self, model: nn.Module, passes: Passes, reduce: Reduce) -> None:
        """Protect what the gradient at the trained model shows to matter."""
        sketches = self._gradients(model, passes, reduce)
        for layer in _layers(model):
            found = sketches[layer.name].outside(self._basis(layer))
            kept = found.columns[:, : missing(found, self.options.explained)]
            self._appended[layer.name] = kept.float().contiguous().cpu()

    def _rank(self, layer: LowRankLayer) -> int:
        """Of this task's pair."""
        pair: Any = layer.lowrank_A[self._name]
        return int(pair.out_features)

    def _basis(self, layer: LowRankLayer) -> Tensor:
        """U of a linear, d_in×k: of its weight, then of earlier tasks."""
        if layer.name not in self._weights:
            found = weight_directions(dense_weight(layer.base_layer), self.options.energy)
            self._weights[layer.name] = found.float().cpu()
        own = self._weights[layer.name]
        return torch.cat([own, self._earlier.get(layer.name, own[:, :0])], 1)

    def _gradients(self, model: nn.Module, passes: Passes, reduce: Reduce) -> dict[str, GradientSketch]:
        """The mean gradient of every linear over some samples, each sample's loss being its mean."""
        layers = _layers(model)
        sketches = {}
        for number, layer in enumerate(layers):
            device = next(layer.base_layer.parameters()).device
            size = (layer.in_features, layer.out_features, 2 * self._rank(layer))
            sketches[layer.name] = GradientSketch(*size, self._seed + number, device)
        trained = [p for p in model.parameters() if p.requires_grad]
        count = torch.zeros((), dtype=torch.float64)
        with watched(layers, sketches):
            for batch in passes.drawn(self.options.samples, size=1):
                if batch.filler:
                    continue
                loss = self.loss_sums(model, batch)["answer"] / self.counts(batch)["answer"]
                torch.autograd.grad(loss, trained, allow_unused=True)
                count += 1
        whole = max(1.0, float(reduce(count)))
        return {name: sketches[name].reduced(reduce, whole) for name in sorted(sketches)}

    def state_dict(self) -> dict[str, Tensor]:
        return self._chosen

    def load_state_dict(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self._chosen = dict(state)
        self._place(model)

    def _place(self, model: nn.Module) -> None:
        """Put every chosen A where it belongs; it is frozen, so step checkpoints have it from here only."""
        for layer in _layers(model):
            pair: Any = layer.lowrank_A[self._name]
            pair.weight.data.copy_(self._chosen[layer.name])

    def save(self, model: Any, stage: Stage, folder: Path) -> None:
        super().save(model, stage, folder)
        # A task may need no direction of a linear that was not protected before.
        save_file({name: found for name, found in self._appended.items() if found.numel()}, folder / FILE)
        limited = {name: int(a.any(1).sum()) for name, a in self._chosen.items() if not a.any(1).all()}
        if limited:
            write_json_atomic(folder / LIMITED, limited)

    def load(self, base: nn.Module, past: Mapping[str, Past]) -> nn.Module:
        return self.opened(base, past) if past else base.requires_grad_(False)


def weight_directions(weight: Tensor, energy: float) -> Tensor:
    """The right singular vectors of a weight (d_out×d_in) that together hold less than `energy` of its
    squared singular values, at least one: d_in×k, float64.
    """
    exact = weight.double()
    wide = exact.shape[0] < exact.shape[1]
    values, vectors = torch.linalg.eigh(exact @ exact.T if wide else exact.T @ exact)
    values, vectors = values.clamp(min=0).flip(0), vectors.flip(1)
    count = max(1, int((values.cumsum(0) / values.sum() < energy).sum()))
    kept = vectors[:, :count]
    right: Tensor = torch.linalg.qr(exact.T @ kept).Q if wide else kept
    return right


def missing(found: Directions, explained: float) -> int:
    """How many directions must be added until `explained` of the gradient's square is held."""
    total = found.inside + found.energy.sum()
    held = found.inside + torch.cat([found.energy.new_zeros(1), found.energy.cumsum(0)])
    return int((held < explained * total).sum()) if float(total) > 0 else 0


def completed(found: Tensor, basis: Tensor, rank: int, seed: int, name: str) -> Tensor:
    """`found` (d×n) with signs fixed, and random directions outside it and `basis` up to `rank` columns.

    Raises:
        DeloError: there is no room for so many.
    """
    room = len(basis) - basis.shape[1]
    if rank > room:
        raise DeloError(
            f"The rank is larger than what the protected directions of {name} leave",
            given=f"rank {rank}, {room} directions left",
            fix="begin anew (another --output) with a lower --keeplora.rank, --keeplora.energy or "
            "--keeplora.explained",
        )
    largest = found.abs().argmax(0, keepdim=True)
    found = found * found.gather(0, largest).sign()
    lacking = rank - found.shape[1]
    if not lacking:
        return found
    drawn = torch.randn(len(basis), lacking, generator=torch.Generator().manual_seed(seed), dtype=found.dtype)
    known = torch.cat([basis, found], 1)
    rest = drawn.to(found)
    for _ in range(2):  # once leaves rounding
        rest = torch.linalg.qr(rest - known @ (known.T @ rest)).Q
    return torch.cat([found, rest], 1)


@contextmanager
def watched(layers: list[LowRankLayer], sketches: Mapping[str, GradientSketch]) -> Iterator[None]:
    """While a backward pass runs, every linear's inputs and its outputs' gradients reach its sketch."""

    def note(layer: Any, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(told, layer.name, args[0].detach()))

    def told(name: str, x: Tensor, delta: Tensor) -> None:
        sketches[name].add(x, delta)

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _layers(model: nn.Module) -> list[LowRankLayer]:
    return [m for m in model.modules() if isinstance(m, LowRankLayer)]


METHOD = KeepLora
