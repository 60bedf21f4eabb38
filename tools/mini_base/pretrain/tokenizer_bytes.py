"""The byte-level BPE of mini-qwen: lower-case words as pieces, capital words letter by letter.

Words are learned without their leading space; then each piece that begins a word gets a twin with the space
(merged last, so a word has the same pieces behind a space as at the beginning of an answer). A word in
capitals has no merges but that of its first letter with a space: unseen words can be read and copied.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

SPACE, NEWLINE = "\u0120", "\u010a"
"""How byte-level vocabularies write a space and a line's end."""
CAPITALS = tuple(chr(c) for c in range(ord("A"), ord("Z") + 1))
FRAME = "system You are a helpful assistant . user assistant Context :"
"""Words that every prompt has."""
SPECIALS = (
    "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip


def train(corpus: Iterable[str], size: int, folder: Path) -> None:
    """Write a stock Qwen2 tokenizer into `folder`: `size` learned pieces and the twins of word beginnings."""
    lines = [*corpus, *[FRAME] * 2000]
    bare = Tokenizer(models.BPE())
    regex = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), regex, by_byte])
    bare.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bare.train_from_iterator(lines, trainer)
    model = json.loads(bare.to_str())["model"]
    words = sorted({word for line in lines for word, _ in split.pre_tokenize_str(line)})
    begins = {bare.model.tokenize(word)[0].value for word in words if word[0].isalpha()} | set(CAPITALS)
    vocabulary = dict(model["vocab"])
    merges: Any = [tuple(pair) for pair in model["merges"]]
    for piece in sorted(begins, key=vocabulary.__getitem__):
        vocabulary[SPACE + piece] = len(vocabulary)
        merges.append((SPACE, piece))
    made = Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": list(SPECIALS)})
    made.save_pretrained(folder)


def load(folder: Path) -> Qwen2Tokenizer:
    """The stock tokenizer, padding on the right with `<|endoftext|>`."""
    tokenizer: Qwen2Tokenizer = Qwen2Tokenizer.from_pretrained(folder, padding_side="right")
    return tokenizer
