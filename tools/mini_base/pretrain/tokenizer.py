"""The sentencepiece tokenizer of mini-llava: lower-case words as BPE pieces, capital words letter by letter.

A word in capitals has no merges, so a card that reads MANGO is five pieces, in the picture's context as in
the answer: unseen words can be read and copied. Bytes are the fallback for everything else; the newline is
one byte piece.
"""

import io
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import LlamaTokenizer

proto: Any = sentencepiece_model_pb2
"""Generated at import, so type checkers cannot see its messages."""
MARK = "\u2581"
CAPITALS = tuple(chr(c) for c in range(ord("A"), ord("Z") + 1))
ROLES = ("USER:", "ASSISTANT:", "Context:")
OPENERS = (
    "which", "what", "who", "where", "when", "how", "is", "are", "does", "do", "can", "has", "was",
    "were", "name", "read", "tell", "say", "give", "pick", "choose", "look", "find", "write", "spell",
    "answer", "in", "on", "of", "the", "this", "that", "see", "please", "state", "to", "here", "decide",
    "true", "yes", "judge", "identify", "classify", "describe", "count", "fill", "complete",
)  # fmt: skip
"""Words that open a line: a new line is a piece of its own, so they also need pieces without the mark of a
preceding space.
"""


def train(corpus: Iterable[str], size: int, folder: Path) -> None:
    """Write `tokenizer.model` into `folder`: a BPE of about `size` pieces learned on lower-case lines."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain(corpus, [f".{w}" for w in OPENERS] * 100),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        character_coverage=1.0,
        required_chars="".join(CAPITALS) + "0123456789.,?!:'-",
        user_defined_symbols=list(ROLES),
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    model = proto.ModelProto()
    model.ParseFromString(buffer.getvalue())
    _add(model, [MARK + c for c in CAPITALS], proto.ModelProto.SentencePiece.NORMAL)
    _add(model, ["<pad>", "<image>"], proto.ModelProto.SentencePiece.CONTROL)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def _add(model: Any, pieces: list[str], kind: int) -> None:
    """Append pieces, each with a score below all learned ones (the order of merges)."""
    lowest = min(p.score for p in model.pieces)
    for i, piece in enumerate(pieces):
        model.pieces.append(proto.ModelProto.SentencePiece(piece=piece, score=lowest - 1 - i, type=kind))


def load(folder: Path) -> LlamaTokenizer:
    """The stock tokenizer over the trained model: begins with BOS, pads on the right with `<pad>`."""
    tokenizer: LlamaTokenizer = LlamaTokenizer.from_pretrained(
        folder,
        add_bos_token=True,
        pad_token="<pad>",
        additional_special_tokens=["<image>", *ROLES],
        padding_side="right",
    )
    return tokenizer
