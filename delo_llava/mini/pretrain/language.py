"""Stage two, text only: a small Llama learns to copy, look up, find an option's letter, compare, and recall
facts.

Copying circuits appear suddenly and late when only answers are trained on, so the first tenth of the steps
repeats random token strings (the second half is predictable from the first alone); then come the text talks
of the mixture, several turns each, and at every second step drills: random pairs to recall from either side,
which teaches look-up; selection, which teaches option letters; membership, which teaches to compare.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, LlavaForConditionalGeneration

from delo_llava.mini.pretrain import mixture, talk
from delo_llava.mini.pretrain.loop import Plan, Stage, train

WIDTH = 128
PROMPT_WEIGHT = 0.2
"""Weight of a prompt token's loss where an answer token's is one."""

LINKS: tuple[list[str], ...] = ([], [], ["\u2581", "ASSISTANT:"], ["?", "\u2581", "ASSISTANT:"])
"""What stands between a question and its answer in pairs to recall."""


@dataclass
class Batch:
    """Right-padded token ids [B, L] and loss weights [B, L] (weight of predicting that token; zero for
    padding).
    """

    ids: Tensor
    weights: Tensor


def config(vocabulary: int) -> LlamaConfig:
    """128 wide, 4 layers, 4 heads, tied embeddings; all widths are multiples of 64 for 4-bit blocks."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=vocabulary - 2,
    )


def encode(
    tokenizer: LlamaTokenizer, texts: list[str], spans: list[list[tuple[int, int]]], prompt_weight: float
) -> Batch:
    """Tokenise whole prompts at once; tokens that begin inside an answer's span weigh one, other text
    `prompt_weight`.
    """
    batch = tokenizer(texts, return_offsets_mapping=True)
    length = max(len(ids) for ids in batch["input_ids"])
    ids = torch.full((len(texts), length), int(tokenizer.pad_token_id))
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
    tokenizer: LlamaTokenizer, seed: int, step: int, size: int, prompt_weight: float = PROMPT_WEIGHT
) -> Batch:
    """The text rows of one step: a pure function of (seed, step)."""
    rng = np.random.default_rng([seed, 2, step])
    rendered = [talk.render_prompt(mixture.text_talk(rng), picture=False) for _ in range(size)]
    return encode(tokenizer, [r[0] for r in rendered], [r[1] for r in rendered], prompt_weight)


def repeats(vocabulary: int, seed: int, step: int, size: int) -> Batch:
    """Random strings said twice, [B, 1 + 2n]: only the second saying is trained on."""
    rng = np.random.default_rng([seed, 3, step])
    length = int(rng.integers(6, 20))
    string = torch.from_numpy(rng.integers(259, vocabulary - 2, size=(size, length)))
    gap = torch.from_numpy(rng.integers(259, vocabulary - 2, size=(size, int(rng.integers(0, 6)))))
    ids = torch.cat([torch.ones(size, 1, dtype=torch.long), string, gap, string], dim=1)
    weights = torch.zeros(ids.shape)
    weights[:, -length + 1 :] = 1.0
    return Batch(ids, weights)


def recall(tokenizer: LlamaTokenizer, seed: int, step: int, size: int) -> Batch:
    """Pairs of a key and a value, then each again in another order, key or value first, to be completed.

    Keys are option letters two thirds of the time; values come from a few small families (numbers, colours,
    things …), so that "find the letter of this value" is learned quickly, from many answers a row.
    """
    rng = np.random.default_rng([seed, 7, step])
    count, lettered = int(rng.integers(2, 6)), bool(rng.random() < 0.67)
    values = _words(tokenizer, [w for family in talk.FAMILIES for w in family])
    keys = _words(tokenizer, list(talk.LETTERS[:count]) if lettered else [*talk.PEOPLE, *talk.FIELDS])
    mark = pieces(tokenizer, ["." if lettered else (":", "\u2581is", "\u2581has")[int(rng.integers(3))]])
    link = pieces(tokenizer, LINKS[int(rng.integers(len(LINKS)))])
    newline, ids = pieces(tokenizer, ["<0x0A>"]), []
    for _ in range(size):
        named = keys if lettered else rng.choice(keys, count, replace=False)
        told = rng.choice(values, count, replace=False)
        row = [1, *(t for k, v in zip(named, told, strict=True) for t in (k, *mark, v)), *newline]
        for i in rng.permutation(count):
            known, wanted = (told[i], named[i]) if rng.random() < 0.65 else (named[i], told[i])
            row += [known, *link, wanted]
        ids.append(row)
    weights = torch.zeros(size, len(ids[0]))
    weights[:, len(ids[0]) - 1 - np.arange(count) * (len(link) + 2)] = 1.0
    return Batch(torch.tensor(np.array(ids)), weights)


def membership(tokenizer: LlamaTokenizer, seed: int, step: int, size: int) -> Batch:
    """One to four words, then six questions whether a word is among them: yes or no, evenly.

    The words that are not there come from the families of those that are.
    """
    rng = np.random.default_rng([seed, 8, step])
    families = [_words(tokenizer, list(family)) for family in talk.FAMILIES]
    count, link = int(rng.integers(1, 5)), pieces(tokenizer, LINKS[int(rng.integers(len(LINKS)))])
    newline, (yes, no) = pieces(tokenizer, ["<0x0A>"]), pieces(tokenizer, ["\u2581yes", "\u2581no"])
    ids = []
    for _ in range(size):
        drawn = [families[int(i)] for i in rng.permutation(len(families))[:count]]
        told = [int(rng.choice(family)) for family in drawn]
        row = [1, *told, *newline]
        for _ in range(6):
            about = int(rng.integers(count))
            asked = told[about] if rng.random() < 0.5 else int(rng.choice(drawn[about]))
            row += [asked, *link, yes if asked == told[about] else no]
        ids.append(row)
    weights = torch.zeros(size, len(ids[0]))
    weights[:, len(ids[0]) - 1 - np.arange(6) * (len(link) + 2)] = 1.0
    return Batch(torch.tensor(ids), weights)


def selection(tokenizer: LlamaTokenizer, seed: int, step: int, size: int) -> Batch:
    """A word, then three lists of lettered options that hold it: its letter is wanted after each list."""
    rng = np.random.default_rng([seed, 11, step])
    count, families = int(rng.integers(2, 5)), [_words(tokenizer, list(f)) for f in talk.FAMILIES]
    letters, dot = _words(tokenizer, list(talk.LETTERS[:count])), pieces(tokenizer, ["."])
    link, newline = pieces(tokenizer, LINKS[int(rng.integers(2, len(LINKS)))]), pieces(tokenizer, ["<0x0A>"])
    ids = []
    for _ in range(size):
        family = families[int(rng.choice([0, 0, 1, 3, 4, 5]))]
        told = rng.choice(family)
        row = [1, told, *newline]
        for _ in range(3):
            others = rng.choice(family[family != told], count - 1, replace=False)
            shown = rng.permutation([told, *others])
            row += [t for letter, word in zip(letters, shown, strict=True) for t in (letter, *dot, word)]
            row += [*link, letters[int(np.flatnonzero(shown == told)[0])]]
        ids.append(row)
    weights = torch.zeros(size, len(ids[0]))
    weights[:, len(ids[0]) - 1 - np.arange(3) * (3 * count + len(link) + 1)] = 1.0
    return Batch(torch.tensor(np.array(ids)), weights)


def drill(tokenizer: LlamaTokenizer, seed: int, step: int, size: int) -> Batch:
    """The drill of a step: recall, selection or membership, two, two and one of five."""
    return (recall, selection, membership, recall, selection)[step // 2 % 5](tokenizer, seed, step, size)


def pieces(tokenizer: LlamaTokenizer, texts: list[str]) -> list[int]:
    """Ids of pieces given as they stand in the vocabulary."""
    return [int(tokenizer.get_vocab()[text]) for text in texts]


def _words(tokenizer: LlamaTokenizer, words: list[str]) -> np.ndarray:
    """Ids of those words that are one piece after a space."""
    known = tokenizer.get_vocab()
    return np.array([known[f"\u2581{word}"] for word in words if f"\u2581{word}" in known])


def weighted_loss(
    model: LlamaForCausalLM | LlavaForConditionalGeneration, hidden: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
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
def skills(
    model: LlamaForCausalLM, tokenizer: LlamaTokenizer, seed: int, rows: int = 400
) -> dict[str, float]:
    """Share of rows of each text skill whose first answer is right token for token (teacher forced), on
    rows no step uses.
    """
    rng = np.random.default_rng([seed, 9])
    talks = [mixture.text_talk(rng) for _ in range(rows)]
    talks = [talk.Talk(t.skill, t.turns[:1], t.context, t.entity) for t in talks]
    rendered = [talk.render_prompt(t, picture=False) for t in talks]
    batch = encode(tokenizer, [r[0] for r in rendered], [r[1] for r in rendered], 0.0)
    guesses = model.lm_head(model.model(input_ids=batch.ids).last_hidden_state[:, :-1]).argmax(-1)
    wrong = ((guesses != batch.ids[:, 1:]) & (batch.weights[:, 1:] > 0)).any(1)
    return by_skill([t.skill for t in talks], (~wrong).tolist())


def by_skill(names: list[str], right: list[bool]) -> dict[str, float]:
    """Mean of `right` for each name."""
    return {
        n: float(np.mean([r for m, r in zip(names, right, strict=True) if m == n]))
        for n in sorted(set(names))
    }


def run(stage: Stage, tokenizer: LlamaTokenizer, plan: Plan, seed: int) -> LlamaForCausalLM:
    """Train (or go on with) the text-only stage as planned."""
    torch.manual_seed(seed)
    vocabulary = len(tokenizer)
    model = LlamaForCausalLM(config(vocabulary))
    model.config.use_cache = False

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        if stage.progress < 0.1:
            batch = repeats(vocabulary, seed, step, 48)
        elif step % 2 == 0:
            batch = drill(tokenizer, seed, step, 48)
        else:
            batch = thin(text_batch(tokenizer, seed, step, 40), generator)
        hidden = model.model(input_ids=batch.ids).last_hidden_state
        return weighted_loss(model, hidden, batch.ids, batch.weights)

    train(stage, model, loss, lambda: skills(model, tokenizer, seed), plan)
    return model
