"""Stage three: the projector and the language model learn to talk about pictures, contexts and both; the
tower is frozen.

The tower's tokens are computed once and kept. A picture that hides its content (or a row whose picture is
left out) comes with a context that tells; a picture that shows comes with a telling, a neutral or no
context. So neither source can be ignored.
"""

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaTokenizer, LlavaConfig, LlavaForConditionalGeneration

from delo_llava.mini.pretrain import language, mixture, tower
from delo_llava.mini.pretrain.language import PROMPT_WEIGHT, Batch, by_skill, encode, weighted_loss
from delo_llava.mini.pretrain.loop import Plan, Stage, train
from delo_llava.mini.pretrain.pictures import Pool
from delo_llava.mini.pretrain.talk import Talk, Truth, render_prompt

Rows = list[tuple[Talk, int | None]]
"""Talks with the index of their picture in the pool, or None."""
PICTURE_ROWS, TEXT_ROWS = 28, 12
DRILL_EVERY = 2
"""Every so many steps, the text stage's drills instead of talks."""
ABSENT = 0.3
"""Share of hidden pictures that are left out of the prompt altogether."""


def config(vocabulary: int, image_token: int) -> LlavaConfig:
    """The stock LLaVA configuration: last layer's patch tokens, no class token, GELU projector."""
    return LlavaConfig(
        vision_config=tower.config(),
        text_config=language.config(vocabulary),
        image_token_index=image_token,
        image_seq_length=tower.TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )


def assemble(
    seen: tower.Tower, said: LlamaForCausalLM, tokenizer: LlamaTokenizer, seed: int
) -> LlavaForConditionalGeneration:
    """Join tower and language model; the projector takes the BatchNorm in and starts with the embeddings'
    scale.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config(len(tokenizer), language.pieces(tokenizer, ["<image>"])[0]))
    model.model.vision_tower.load_state_dict(seen.vision.state_dict())
    model.model.language_model.load_state_dict(said.model.state_dict())
    model.tie_weights()
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        torch.nn.init.normal_(projector.linear_1.weight, std=tower.WIDTH**-0.5)
        torch.nn.init.normal_(projector.linear_2.weight, std=tower.WIDTH**-0.5)
        projector.linear_1.bias.zero_()
        projector.linear_2.bias.zero_()
        reached = projector(torch.randn(512, tower.WIDTH)).std()
        projector.linear_2.weight.mul_(said.model.embed_tokens.weight.std() / reached)
    tower.fold(seen.norm, projector.linear_1)
    model.model.vision_tower.requires_grad_(False)
    model.config.use_cache = False
    return model


@torch.no_grad()
def remember(seen: tower.Tower, pool: Pool) -> Tensor:
    """The tower's tokens of all pictures, [N, 16, 128]."""
    return torch.cat([seen.features(pool.pixels[i : i + 256]) for i in range(0, len(pool.truths), 256)])


def rows(talks: Rows, tokenizer: LlamaTokenizer, prompt_weight: float) -> tuple[Batch, list[int]]:
    """Encode talks with or without a picture; `<image>` becomes 16 ids. Returns the batch and the pictures'
    indices in row order.
    """
    rendered = [render_prompt(talk, picture is not None) for talk, picture in talks]
    texts, spans, shift = [], [], len("<image>") * (tower.TOKENS - 1)
    for text, answers in rendered:
        pictured = "<image>" in text
        texts.append(text.replace("<image>", "<image>" * tower.TOKENS))
        spans.append([(a + shift * pictured, b + shift * pictured) for a, b in answers])
    batch = encode(tokenizer, texts, spans, prompt_weight)
    batch.weights[batch.ids == language.pieces(tokenizer, ["<image>"])[0]] = 0.0
    return batch, [p for _, p in talks if p is not None]


def hidden_states(model: LlavaForConditionalGeneration, batch: Batch, tokens: Tensor) -> Tensor:
    """Last hidden states [B, L, D] of prompts whose image ids are replaced by the projected tokens
    [pictures, 16, 128].
    """
    embedded = model.get_input_embeddings()(batch.ids)
    projected = model.model.multi_modal_projector(tokens).flatten(0, 1)
    at = (batch.ids == model.config.image_token_index).unsqueeze(-1).expand_as(embedded)
    embedded = embedded.masked_scatter(at, projected)
    hidden: Tensor = model.model.language_model(inputs_embeds=embedded).last_hidden_state
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
    model: LlavaForConditionalGeneration, tokenizer: LlamaTokenizer, pool: Pool, memory: Tensor, seed: int
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
        batch, indices = rows(part, tokenizer, 0.0)
        guesses = model.lm_head(hidden_states(model, batch, memory[indices])[:, :-1]).argmax(-1)
        right += (~((guesses != batch.ids[:, 1:]) & (batch.weights[:, 1:] > 0)).any(1)).tolist()
        names += [_name(talk, truth) for (talk, _), truth in zip(part, truths, strict=True)]
    return by_skill(names, right) | language_skills(model, tokenizer, seed)


def _name(talk: Talk, truth: Truth) -> str:
    answer = talk.turns[0][1]
    kind = "letter" if len(answer) == 1 else "yesno" if answer in ("yes", "no") else "answer"
    return f"{talk.skill} {kind}, {'read' if truth.hidden or truth.colourless or truth.formless else 'seen'}"


def language_skills(
    model: LlavaForConditionalGeneration, tokenizer: LlamaTokenizer, seed: int
) -> dict[str, float]:
    """The text-only skills, measured on the joint model."""
    plain = LlamaForCausalLM(language.config(len(tokenizer)))
    plain.model, plain.lm_head = model.model.language_model, model.lm_head
    return {f"text {k}": v for k, v in language.skills(plain, tokenizer, seed, 300).items()}


def run(
    stage: Stage,
    seen: tower.Tower,
    said: LlamaForCausalLM,
    tokenizer: LlamaTokenizer,
    pools: tuple[Pool, Pool],
    plan: Plan,
    seed: int,
) -> LlavaForConditionalGeneration:
    """Train (or go on with) the joint stage as planned; the returned model is complete."""
    model = assemble(seen, said, tokenizer, seed)
    memory, checked = (
        (torch.empty(0), torch.empty(0))
        if stage.finished
        else (remember(seen, pools[0]), remember(seen, pools[1]))
    )

    def loss(step: int) -> Tensor:
        if step % DRILL_EVERY == 0:
            pairs = language.drill(tokenizer, seed + 1, step, 56)
            return weighted_loss(
                model,
                model.model.language_model(input_ids=pairs.ids).last_hidden_state,
                pairs.ids,
                pairs.weights,
            )
        batch, indices = rows(
            draw_rows(pools[0], np.random.default_rng([seed, 6, step])), tokenizer, PROMPT_WEIGHT / 2
        )
        batch = language.thin(batch, torch.Generator().manual_seed(step))
        return weighted_loss(model, hidden_states(model, batch, memory[indices]), batch.ids, batch.weights)

    train(stage, model, loss, lambda: skills(model, tokenizer, pools[1], checked, seed), plan)
    model.eval()
    return model
