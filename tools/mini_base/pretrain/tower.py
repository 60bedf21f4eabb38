"""Stage one, supervised: a tower whose tokens hold, linearly, what each cell and the whole picture show.

Linear heads read the tokens behind a BatchNorm without affine parameters. Its mean and standard deviation
fold exactly into the first linear of the projector (`fold`), so the shipped model is a stock architecture and
the projector starts on whitened features.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from delo_llava.mini.entities import COLOURS, FORMS, GROUPS, NUMBER_NAMES, REGIONS
from tools.mini_base.pretrain.family import TOKENS, Family
from tools.mini_base.pretrain.loop import Plan, Stage, train
from tools.mini_base.pretrain.pictures import Pool
from tools.mini_base.pretrain.talk import LETTERS, Truth, train_emoji

IGNORE = -100
PAIRS = [(c, f) for c in COLOURS for f in FORMS]
POOLED = {"digit": 10, "group": 6, "name": 0, "region": 5, "column": 18, "row": 14, "kind": 12}
"""Softmax heads on the mean token, with their classes (`name`: one a train emoji)."""
CELLS = {"letter": 27, "shape": 25, "dot": 2}
"""Softmax heads on each token; the last class is "nothing" (for `dot`: 0 no, 1 yes)."""
WEIGHTS = {"digit": 2.0, "name": 0.3, "kind": 0.3, "group": 1.5, "column": 0.5, "row": 0.5}


class Tower(nn.Module):
    """The vision model, the BatchNorm over its tokens, and the heads."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family, width = family, family.seen_width
        self.vision = family.new_vision()
        self.norm = nn.BatchNorm1d(width, affine=False, momentum=0.02)
        sizes = POOLED | {"name": len(train_emoji())}
        self.pooled = nn.ModuleDict({k: nn.Linear(width, n) for k, n in sizes.items()})
        self.cells = nn.ModuleDict({k: nn.Linear(width, n) for k, n in CELLS.items()})
        self.marks = nn.Linear(width, len(COLOURS) + len(FORMS) + len(PAIRS))

    def features(self, pixels: NDArray[np.uint8]) -> Tensor:
        """What the projector reads, [B, 16, width], before the BatchNorm."""
        return self.family.see(self.vision, pixels)

    def forward(self, pixels: NDArray[np.uint8]) -> dict[str, Tensor]:
        """Logits by head: [B, classes] for the mean token, [B, 16, classes] for cells, [B, marks]."""
        tokens = self.features(pixels)
        tokens = self.norm(tokens.flatten(0, 1)).view_as(tokens)
        mean = tokens.mean(1)
        found = {k: head(mean) for k, head in self.pooled.items()} | {
            k: head(tokens) for k, head in self.cells.items()
        }
        return found | {"marks": self.marks(mean)}


@dataclass
class Labels:
    """Targets of a pool: class ids by softmax head (IGNORE where it does not apply), multi-labels [N,
    marks] and their mask.
    """

    classes: dict[str, Tensor]
    marks: Tensor
    marks_mask: Tensor


def label(truths: list[Truth]) -> Labels:
    """The targets of many pictures."""
    classes = {k: torch.full((len(truths),), IGNORE) for k in POOLED} | {
        k: torch.full((len(truths), TOKENS), IGNORE) for k in CELLS
    }
    marks = torch.zeros(len(truths), len(COLOURS) + len(FORMS) + len(PAIRS))
    mask = torch.zeros_like(marks)
    for i, truth in enumerate(truths):
        classes["kind"][i] = ["digit", "card", "emoji", "shapes", "land", "dot"].index(truth.kind) * 2 + int(
            truth.hidden
        )
        _LABELLERS[truth.kind](classes, i, truth)
        if truth.kind == "shapes":
            marks[i], mask[i] = _marks(truth)
    return Labels(classes, marks, mask)


def _digit(classes: dict[str, Tensor], i: int, truth: Truth) -> None:
    if not truth.hidden:
        classes["digit"][i] = NUMBER_NAMES.index(truth.text)


def _card(classes: dict[str, Tensor], i: int, truth: Truth) -> None:
    classes["letter"][i] = 26
    if not truth.hidden:
        for j, letter in enumerate(truth.text):
            classes["letter"][i, 4 + j] = LETTERS.index(letter)


def _emoji(classes: dict[str, Tensor], i: int, truth: Truth) -> None:
    if not truth.hidden and truth.entity:
        at = _emoji_index()[truth.entity[1]]
        classes["name"][i], classes["group"][i] = at, list(GROUPS.values()).index(train_emoji()[at].group)


def _emoji_index() -> dict[str, int]:
    return {e.name: i for i, e in enumerate(train_emoji())}


def _shapes(classes: dict[str, Tensor], i: int, truth: Truth) -> None:
    if truth.text:
        classes["shape"][i] = 24
        for cell, item in zip(truth.text.split(), truth.items, strict=True):
            classes["shape"][i, int(cell)] = PAIRS.index(item)


def _place(classes: dict[str, Tensor], i: int, truth: Truth) -> None:
    classes["dot"][i] = 0
    if truth.hidden:
        return
    latitude, longitude = truth.place
    x, y = (longitude + 180) / 360, (80 - latitude) / 140
    classes["column"][i], classes["row"][i] = min(17, max(0, int(x * 18))), min(13, max(0, int(y * 14)))
    classes["dot"][i, min(3, max(0, int(y * 4))) * 4 + min(3, max(0, int(x * 4)))] = 1
    if truth.kind == "land":
        classes["region"][i] = REGIONS.index(truth.text)


_LABELLERS = {
    "digit": _digit,
    "card": _card,
    "emoji": _emoji,
    "shapes": _shapes,
    "land": _place,
    "dot": _place,
}


def _marks(truth: Truth) -> tuple[Tensor, Tensor]:
    """Multi-labels of a picture of shapes (colours, forms, pairs) and which of them count: what is hidden
    is absent.
    """
    colours, forms, pairs = torch.zeros(len(COLOURS)), torch.zeros(len(FORMS)), torch.zeros(len(PAIRS))
    for colour, form in truth.items:
        if not truth.hidden:
            colours[list(COLOURS).index(colour)] = 0.0 if truth.colourless else 1.0
            forms[FORMS.index(form)] = 0.0 if truth.formless else 1.0
            pairs[PAIRS.index((colour, form))] = 0.0 if truth.colourless or truth.formless else 1.0
    whole = torch.cat([colours, forms, pairs])
    return whole, torch.ones_like(whole)


def tower_loss(found: dict[str, Tensor], labels: Labels, rows: NDArray[np.int64]) -> Tensor:
    """Sum of all heads' losses on the given rows of the pool; a head without a target adds nothing."""
    total = torch.zeros(())
    for name, targets in labels.classes.items():
        wanted = targets[rows].flatten()
        if bool((wanted != IGNORE).any()):
            loss = nn.functional.cross_entropy(
                found[name].flatten(0, -2), wanted, ignore_index=IGNORE, label_smoothing=0.02
            )
            total = total + WEIGHTS.get(name, 1.0) * loss
    mask = labels.marks_mask[rows]
    each = nn.functional.binary_cross_entropy_with_logits(
        found["marks"], labels.marks[rows], reduction="none"
    )
    return total + 10.0 * (each * mask).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def accuracy(model: Tower, pool: Pool, labels: Labels) -> dict[str, float]:
    """Share of right classes by head (cells that hold nothing left out), and of shape pictures whose marks
    are all right.
    """
    found = model(pool.pixels)
    shares = {}
    for name, targets in labels.classes.items():
        kept = targets != IGNORE
        if name in ("letter", "shape", "dot"):
            kept &= targets != (0 if name == "dot" else CELLS[name] - 1)
        shares[name] = float((found[name].argmax(-1) == targets)[kept].float().mean())
    single = labels.marks_mask[:, 0] > 0
    shares["marks"] = float(((found["marks"] > 0).float() == labels.marks)[single].all(1).float().mean())
    return shares


def blend(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Grain on each picture: uint8 in, uint8 out."""
    grain = rng.integers(-6, 7, pixels.shape, dtype=np.int16)
    grained: NDArray[np.uint8] = np.clip(pixels.astype(np.int16) + grain, 0, 255).astype(np.uint8)
    return grained


def run(
    stage: Stage, family: Family, pool: Pool, held_out: Pool, plan: Plan, seed: int, size: int = 64
) -> Tower:
    """Train (or go on with) the tower as planned."""
    torch.manual_seed(seed)
    model, labels, checked = Tower(family), label(pool.truths), label(held_out.truths)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 5, step])
        rows = rng.integers(len(pool.truths), size=size)
        return tower_loss(model(blend(pool.pixels[rows], rng)), labels, rows)

    train(stage, model, loss, lambda: accuracy(model, held_out, checked), plan)
    return model.eval()


def fold(norm: nn.BatchNorm1d, linear: nn.Linear) -> None:
    """Fold the BatchNorm into the linear that reads its output, in place: W' = W / sigma, b' = b - W' mu."""
    kept = {name: buffer.double() for name, buffer in norm.named_buffers()}
    with torch.no_grad():
        weight = linear.weight.double() * (kept["running_var"] + norm.eps).rsqrt()
        linear.bias.copy_((linear.bias.double() - weight @ kept["running_mean"]).float())
        linear.weight.copy_(weight.float())
