"""Instruction following (SMoLoRA's MIF): whether an output has the format that its instruction asks for.

It says nothing of right or wrong and stands beside any scorer. The instruction's last line chooses the rule:

| asked for | native: obeyed by | official (SMoLoRA) |
|---|---|---|
| the option's letter | one letter, bare or as "(B)" or "B." | one letter A–Z, any case |
| a word or phrase | up to five words on a line, no sentence; the answer | up to two words; the answer |
| a sentence | one of five words or more, with its end mark | > 4 words or part of an answer, period |
| a bounding box | four numbers in brackets and nothing else | – |
| yes or no | "yes" or "no" | – |
"""

import re
from functools import lru_cache

from delo_eval.scorers._text import exactly, words
from delo_eval.scorers.base import Reference, Scorer, strings_of
from delo_llava.errors import DeloError

#: Format -> how its instruction reads. Where several are found the last one counts, but a box always does:
#: its instructions go on with a description.
FORMATS = {
    "box": r"\b(bounding box|box coordinates?)\b",
    "letter": r"\bletter\b",
    "yes_no": r"\byes\b['\" ]*(or|/)['\" ]*\bno\b",
    "sentence": r"\b(a|one|single|full|complete|concise|simple|informative)\b[\w ,-]*\bsentence\b",
    "phrase": r"\bwords?\b[\w ,-]*\bphrase\b|\bphrase\b[\w ,-]*\bword\b|\b(single|one) word\b",
}
_FORMATS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in FORMATS.items()}
PHRASE_WORDS = 5

_LETTER = re.compile(r"\(?[A-Za-z]\)?\.?")
_BOX = re.compile(r"[\[(]\s*-?\d*\.?\d+(?:\s*,\s*-?\d*\.?\d+){3}\s*[\])]\.?")
_INNER_END = re.compile(r"[.!?]\s+\S")


@lru_cache(maxsize=1 << 16)
def format_of(instruction: str) -> str | None:
    """The format an instruction asks for in its last line, None where it asks for none that is known."""
    line = instruction.strip().rpartition("\n")[2]
    ends = {
        name: max((m.end() for m in pattern.finditer(line)), default=0) for name, pattern in _FORMATS.items()
    }
    asked = "box" if ends["box"] else max(ends, key=ends.__getitem__)
    return asked if ends[asked] else None


def obeys(prediction: str, reference: Reference) -> bool | None:
    """Whether the output has the format asked for; None where none is known."""
    text = prediction.strip()
    match format_of(reference.instruction):
        case "letter":
            return _LETTER.fullmatch(text) is not None
        case "box":
            return _BOX.fullmatch(text) is not None
        case "yes_no":
            return text.lower().rstrip(".") in ("yes", "no")
        case "sentence":
            one = text.endswith((".", "!", "?")) and not _INNER_END.search(text)
            return one and len(text.split()) >= 5
        case "phrase":
            short = bool(words(text)) and len(text.split()) <= PHRASE_WORDS and "\n" not in text
            return bool(exactly(text, reference)) or (short and not _INNER_END.search(text))
    return None


def official_obeys(prediction: str, reference: Reference) -> bool | None:
    """SMoLoRA's three scripts, eval_{scienceqa,vqa,caption}_instruction.py; None for other formats.

    Without a list of captions the caption script walks through the *characters* of the answer.
    """
    text = prediction.strip()
    match format_of(reference.instruction):
        case "letter":
            return len(text.upper()) == 1 and "A" <= text.upper() <= "Z"
        case "phrase":
            return len(text.split()) <= 2 or text.lower() == reference.answer.lower()
        case "sentence":
            listed = {"captions", "answers"} & reference.extra.keys()
            answers = strings_of(reference, "captions", "answers") if listed else list(reference.answer)
            part = any(text.lower() in answer.lower() for answer in answers)
            return text.endswith(".") and (len(text.split()) > 4 or part)
    return None


def _known(obeyed: bool | None, reference: Reference) -> float:
    if obeyed is None:
        raise DeloError(
            f"Question {reference.id} asks for no format that is known.",
            given=reference.instruction[-80:],
            allowed=FORMATS,
            fix="score it with another scorer",
        )
    return float(obeyed)


SCORER = Scorer(
    "mif.v2",
    "the output has the format its instruction asks for",
    lambda prediction, reference: _known(obeys(prediction, reference), reference),
    compat=Scorer(
        "mif.smolora.v1",
        "a letter; at most two words; a final period after more than four words",
        lambda prediction, reference: _known(official_obeys(prediction, reference), reference),
    ),
)
