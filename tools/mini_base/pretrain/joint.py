"""Stage three: the projector and the language model learn to talk about pictures, contexts and both; the
tower is frozen.

The tower's tokens are computed once and kept. A picture that hides its content (or a row whose picture is
left out) comes with a context that tells; a picture that shows comes with a telling, a neutral or no
context. So neither source can be ignored.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.mini_base.pretrain import follow, language, mixture, tower
from tools.mini_base.pretrain.family import Family, Tongue
from tools.mini_base.pretrain.language import PROMPT_WEIGHT, Batch, by_skill, encode, weighted_loss
from tools.mini_base.pretrain.loop import Plan, Stage, train
from tools.mini_base.pretrain.pictures import Pool
from tools.mini_base.pretrain.talk import Talk, Truth

Rows = list[tuple[Talk, int | None]]
"""Talks with the index of their picture in the pool, or None."""
PICTURE_ROWS, TEXT_ROWS = 28, 12
DRILL_EVERY = 2
"""Every so many steps, the text stage's drills instead of talks."""
ABSENT = 0.3
"""Share of hidden pictures that are left out of the prompt altogether."""


def assemble(family: Family, seen: tower.Tower, said: Any, tongue: Tongue, seed: int) -> Any:
    """Join tower and language model; the projector takes the BatchNorm in and starts with the embeddings'
    scale.
    """
    torch.manual_seed(seed)
    model = family.join(seen.vision, said, tongue)
    first, act, second = family.projector(model)
    with torch.no_grad():
        for linear in (first, second):
            torch.nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            linear.bias.zero_()
        reached = second(act(first(torch.randn(512, first.in_features)))).std()
        second.weight.mul_(said.model.embed_tokens.weight.std() / reached)
    tower.fold(seen.norm, first)
    return model


@torch.no_grad()
def remember(seen: tower.Tower, pool: Pool) -> Tensor:
    """The tower's tokens of all pictures, [N, 16, width]."""
    return torch.cat([seen.features(pool.pixels[i : i + 256]) for i in range(0, len(pool.truths), 256)])


def rows(talks: Rows, tongue: Tongue, prompt_weight: float) -> tuple[Batch, list[int]]:
    """Encode talks with or without a picture. Returns the batch and the pictures' indices in row order."""
    rendered = [tongue.render(talk, picture is not None) for talk, picture in talks]
    batch = encode(tongue, [r[0] for r in rendered], [r[1] for r in rendered], prompt_weight)
    batch.weights[batch.ids == tongue.image_id] = 0.0
    return batch, [p for _, p in talks if p is not None]


def hidden_states(family: Family, model: Any, batch: Batch, tokens: Tensor) -> Tensor:
    """Last hidden states [B, L, D] of prompts whose image ids are replaced by the projected tokens
    [pictures, 16, width].
    """
    first, act, second = family.projector(model)
    images = batch.ids == model.config.image_token_id
    embedded = model.get_input_embeddings()(batch.ids)
    projected = second(act(first(tokens))).flatten(0, 1)
    embedded = embedded.masked_scatter(images.unsqueeze(-1).expand_as(embedded), projected)
    hidden: Tensor = model.model.language_model(
        inputs_embeds=embedded, position_ids=family.positions(images)
    ).last_hidden_state
    return hidden


def draw_rows(pool: Pool, rng: np.random.Generator) -> Rows:
    """The talks of one step, each with its picture's index or None."""
    found: Rows = []
    for index in rng.integers(len(pool.truths), size=PICTURE_ROWS):
        truth = pool.truths[int(index)]
        talk = mixture.picture_talk(rng, truth)
        found.append((talk, None if truth.hidden and rng.random() < ABSENT else int(index)))
    return found + [(mixture.text_talk(rng), None) for _ in range(TEXT_ROWS)]


@torch.no_grad()
def skills(
    family: Family, model: Any, tongue: Tongue, pool: Pool, memory: Tensor, seed: int
) -> dict[str, float]:
    """Share of right first answers (teacher forced) on held-out drawings, by kind, kind of answer and
    source that carries it.
    """
    rng = np.random.default_rng([seed, 10])
    talks = [(mixture.picture_talk(rng, truth), i) for i, truth in enumerate(pool.truths)]
    right, names = [], []
    for begin in range(0, len(talks), 250):
        truths = pool.truths[begin : begin + 250]
        part: Rows = [(Talk(t.skill, t.turns[:1], t.context), i) for t, i in talks[begin : begin + 250]]
        batch, indices = rows(part, tongue, 0.0)
        guesses = model.lm_head(hidden_states(family, model, batch, memory[indices])[:, :-1]).argmax(-1)
        right += (~((guesses != batch.ids[:, 1:]) & (batch.weights[:, 1:] > 0)).any(1)).tolist()
        names += [_name(talk, truth) for (talk, _), truth in zip(part, truths, strict=True)]
    return by_skill(names, right) | language_skills(family, model, tongue, seed)


def _name(talk: Talk, truth: Truth) -> str:
    answer = talk.turns[0][1]
    kind = "letter" if len(answer) == 1 else "yesno" if answer in ("yes", "no") else "answer"
    return f"{talk.skill} {kind}, {'read' if truth.hidden or truth.colourless or truth.formless else 'seen'}"


def language_skills(family: Family, model: Any, tongue: Tongue, seed: int) -> dict[str, float]:
    """The text-only skills, measured on the joint model."""
    plain = family.new_language(tongue)
    plain.model, plain.lm_head = model.model.language_model, model.lm_head
    return {f"text {k}": v for k, v in language.skills(plain, tongue, seed, 300).items()}


def run(
    stage: Stage,
    family: Family,
    seen: tower.Tower,
    said: Any,
    tongue: Tongue,
    pools: tuple[Pool, Pool],
    plan: Plan,
    seed: int,
    start: Path | None = None,
) -> Any:
    """Train (or go on with) the joint stage as planned; the returned model is complete.

    Args:
        start: folder of mini-llava, when the projector begins by aiming at its image tokens.
    """
    model = assemble(family, seen, said, tongue, seed)
    memory, checked = (
        (torch.empty(0), torch.empty(0))
        if stage.finished
        else (remember(seen, pools[0]), remember(seen, pools[1]))
    )
    if start and not stage.begun:
        wanted = follow.image_tokens(start, pools[0].pixels[: follow.PICTURES])
        left = follow.aim(family.projector(model), memory[: follow.PICTURES], wanted, seed)
        stage.log(projector_variance_left=round(left, 4))

    def loss(step: int) -> Tensor:
        if step % DRILL_EVERY == 0:
            pairs = language.drill(tongue, seed + 1, step, 56)
            return weighted_loss(
                model,
                model.model.language_model(input_ids=pairs.ids).last_hidden_state,
                pairs.ids,
                pairs.weights,
            )
        batch, indices = rows(
            draw_rows(pools[0], np.random.default_rng([seed, 6, step])), tongue, PROMPT_WEIGHT / 2
        )
        batch = language.thin(batch, torch.Generator().manual_seed(step))
        hidden = hidden_states(family, model, batch, memory[indices])
        return weighted_loss(model, hidden, batch.ids, batch.weights)

    train(stage, model, loss, lambda: skills(family, model, tongue, pools[1], checked, seed), plan)
    model.eval()
    return model
