"""Stage two, text only: a small language model learns to copy, look up, find an option's letter, compare,
and recall facts.

Copying circuits appear suddenly and late when only answers are trained on, so the first tenth of the steps
repeats random token strings (the second half is predictable from the first alone); then come the text talks
of the mixture, several turns each, and at every second step drills: random pairs to recall from either side,
which teaches look-up; selection, which teaches option letters; membership, which teaches to compare.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tools.mini_base.pretrain import mixture, talk
from tools.mini_base.pretrain.family import Family, Tongue
from tools.mini_base.pretrain.loop import Plan, Stage, train

PROMPT_WEIGHT = 0.2
"""Weight of a prompt token's loss where an answer token's is one."""


@dataclass
class Batch:
    """Right-padded token ids [B, L] and loss weights [B, L] (weight of predicting that token; zero for
    padding).
    """

    ids: Tensor
    weights: Tensor


def encode(
    tongue: Tongue, texts: list[str], spans: list[list[tuple[int, int]]], prompt_weight: float
) -> Batch:
    """Tokenise whole prompts at once; tokens that begin inside an answer's span weigh one, other text
    `prompt_weight`.
    """
    batch = tongue.tokenizer(texts, return_offsets_mapping=True)
    length = max(len(ids) for ids in batch["input_ids"])
    ids = torch.full((len(texts), length), int(tongue.tokenizer.pad_token_id))
    weights = torch.zeros(len(texts), length)
    for row, (tokens, offsets) in enumerate(zip(batch["input_ids"], batch["offset_mapping"], strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        starts = np.array([a for a, _ in offsets])
        answer = np.zeros(len(tokens), dtype=bool)
        for begin, end in spans[row]:
            answer |= (starts >= begin) & (starts < end)
        weights[row, : len(tokens)] = torch.from_numpy(
            np.where(answer, 1.0, prompt_weight).astype(np.float32)
        )
    return Batch(ids, weights)


def text_batch(
    tongue: Tongue, seed: int, step: int, size: int, prompt_weight: float = PROMPT_WEIGHT
) -> Batch:
    """The text rows of one step: a pure function of (seed, step)."""
    rng = np.random.default_rng([seed, 2, step])
    rendered = [tongue.render(mixture.text_talk(rng), picture=False) for _ in range(size)]
    return encode(tongue, [r[0] for r in rendered], [r[1] for r in rendered], prompt_weight)


def repeats(tongue: Tongue, seed: int, step: int, size: int) -> Batch:
    """Random strings said twice, [B, opening + 2n + gap]: only the second saying is trained on."""
    rng = np.random.default_rng([seed, 3, step])
    length = int(rng.integers(6, 20))
    string = torch.from_numpy(rng.integers(*tongue.plain, size=(size, length)))
    gap = torch.from_numpy(rng.integers(*tongue.plain, size=(size, int(rng.integers(0, 6)))))
    opening = torch.tensor(tongue.opening, dtype=torch.long).expand(size, -1)
    ids = torch.cat([opening, string, gap, string], dim=1)
    weights = torch.zeros(ids.shape)
    weights[:, -length + 1 :] = 1.0
    return Batch(ids, weights)


def _asked(rows: list[list[int]], places: NDArray[np.int64]) -> Batch:
    """Equally long rows of ids of which the places (from the end) of the answers are trained on."""
    weights = torch.zeros(len(rows), len(rows[0]))
    weights[:, len(rows[0]) - 1 - places] = 1.0
    return Batch(torch.tensor(np.array(rows)), weights)


def recall(tongue: Tongue, seed: int, step: int, size: int) -> Batch:
    """Pairs of a key and a value, then each again in another order, key or value first, to be completed.

    Keys are option letters two thirds of the time; values come from a few small families (numbers, colours,
    things …), so that "find the letter of this value" is learned quickly, from many answers a row.
    """
    rng = np.random.default_rng([seed, 7, step])
    count, lettered = int(rng.integers(2, 6)), bool(rng.random() < 0.67)
    values = tongue.words(w for family in talk.FAMILIES for w in family)
    keys = tongue.words(talk.LETTERS[:count] if lettered else [*talk.PEOPLE, *talk.FIELDS])
    mark = tongue.pieces(["." if lettered else (":", " is", " has")[int(rng.integers(3))]])
    link, say = _link(tongue, rng)
    newline, ids = tongue.pieces(["\n"]), []
    for _ in range(size):
        named = keys if lettered else rng.choice(keys, count, replace=False)
        told = rng.choice(values, count, replace=False)
        row = [
            *tongue.opening,
            *(t for k, v in zip(named, told, strict=True) for t in (k, *mark, v)),
            *newline,
        ]
        for i in rng.permutation(count):
            known, wanted = (told[i], named[i]) if rng.random() < 0.65 else (named[i], told[i])
            row += [known, *link, say(wanted)]
        ids.append(row)
    return _asked(ids, np.arange(count) * (len(link) + 2))


def _link(tongue: Tongue, rng: np.random.Generator, first: int = 0) -> tuple[list[int], Callable[[int], int]]:
    """What stands before this step's answers, and how an answer's piece is said there."""
    link, begins = tongue.links[int(rng.integers(first, len(tongue.links)))]
    return link, (lambda piece: tongue.begun(int(piece))) if begins else int


def membership(tongue: Tongue, seed: int, step: int, size: int) -> Batch:
    """One to four words, then six questions whether a word is among them: yes or no, evenly.

    The words that are not there come from the families of those that are.
    """
    rng = np.random.default_rng([seed, 8, step])
    families = [tongue.words(family) for family in talk.FAMILIES]
    count, (link, say) = int(rng.integers(1, 5)), _link(tongue, rng)
    newline, (yes, no) = tongue.pieces(["\n"]), tongue.pieces([" yes", " no"])
    ids = []
    for _ in range(size):
        drawn = [families[int(i)] for i in rng.permutation(len(families))[:count]]
        told = [int(rng.choice(family)) for family in drawn]
        row = [*tongue.opening, *told, *newline]
        for _ in range(6):
            about = int(rng.integers(count))
            asked = told[about] if rng.random() < 0.5 else int(rng.choice(drawn[about]))
            row += [asked, *link, say(yes if asked == told[about] else no)]
        ids.append(row)
    return _asked(ids, np.arange(6) * (len(link) + 2))


def selection(tongue: Tongue, seed: int, step: int, size: int) -> Batch:
    """A word, then three lists of lettered options that hold it: its letter is wanted after each list."""
    rng = np.random.default_rng([seed, 11, step])
    count, families = int(rng.integers(2, 5)), [tongue.words(f) for f in talk.FAMILIES]
    letters, dot = tongue.words(talk.LETTERS[:count]), tongue.pieces(["."])
    (link, say), newline = _link(tongue, rng, first=2), tongue.pieces(["\n"])
    ids = []
    for _ in range(size):
        family = families[int(rng.choice([0, 0, 1, 3, 4, 5]))]
        told = rng.choice(family)
        row = [*tongue.opening, told, *newline]
        for _ in range(3):
            others = rng.choice(family[family != told], count - 1, replace=False)
            shown = rng.permutation([told, *others])
            row += [t for letter, word in zip(letters, shown, strict=True) for t in (letter, *dot, word)]
            row += [*link, say(letters[int(np.flatnonzero(shown == told)[0])])]
        ids.append(row)
    return _asked(ids, np.arange(3) * (3 * count + len(link) + 1))


def drill(tongue: Tongue, seed: int, step: int, size: int) -> Batch:
    """The drill of a step: recall, selection or membership, two, two and one of five."""
    return (recall, selection, membership, recall, selection)[step // 2 % 5](tongue, seed, step, size)


def weighted_loss(model: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropy of the next token; logits are computed only where the weight is positive.

    Args:
        hidden: last hidden states [B, L, D]; ids, weights: [B, L].
    """
    chosen = weights[:, 1:] > 0
    logits = model.lm_head(hidden[:, :-1][chosen])
    loss = nn.functional.cross_entropy(logits, ids[:, 1:][chosen], reduction="none")
    kept = weights[:, 1:][chosen]
    return (loss * kept).sum() / kept.sum()


def thin(batch: Batch, generator: torch.Generator) -> Batch:
    """Keep each prompt token's loss with probability `PROMPT_WEIGHT` at full weight: the same gradient on
    average, fewer logits.
    """
    kept = torch.rand(batch.weights.shape, generator=generator) < batch.weights
    return Batch(batch.ids, kept.float())


@torch.no_grad()
def skills(model: Any, tongue: Tongue, seed: int, rows: int = 400) -> dict[str, float]:
    """Share of rows of each text skill whose first answer is right token for token (teacher forced), on
    rows no step uses.
    """
    rng = np.random.default_rng([seed, 9])
    talks = [mixture.text_talk(rng) for _ in range(rows)]
    talks = [talk.Talk(t.skill, t.turns[:1], t.context, t.entity) for t in talks]
    rendered = [tongue.render(t, picture=False) for t in talks]
    batch = encode(tongue, [r[0] for r in rendered], [r[1] for r in rendered], 0.0)
    guesses = model.lm_head(model.model(input_ids=batch.ids).last_hidden_state[:, :-1]).argmax(-1)
    wrong = ((guesses != batch.ids[:, 1:]) & (batch.weights[:, 1:] > 0)).any(1)
    return by_skill([t.skill for t in talks], (~wrong).tolist())


def by_skill(names: list[str], right: list[bool]) -> dict[str, float]:
    """Mean of `right` for each name."""
    return {
        n: float(np.mean([r for m, r in zip(names, right, strict=True) if m == n]))
        for n in sorted(set(names))
    }


def run(
    stage: Stage, family: Family, tongue: Tongue, plan: Plan, seed: int, start: Path | None = None
) -> Any:
    """Train (or go on with) the text-only stage as planned.

    Args:
        start: folder of mini-llava, when the layers begin as its language model's instead of at random.
    """
    torch.manual_seed(seed)
    model = family.new_language(tongue)
    if start:
        family.start_from_llava(model, tongue, start)

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        if stage.progress < 0.1 and not start:
            batch = repeats(tongue, seed, step, 48)
        elif step % 2 == 0:
            batch = drill(tongue, seed, step, 48)
        else:
            batch = thin(text_batch(tongue, seed, step, 40), generator)
        hidden = model.model(input_ids=batch.ids).last_hidden_state
        return weighted_loss(model, hidden, batch.ids, batch.weights)

    train(stage, model, loss, lambda: skills(model, tongue, seed), plan)
    return model
