"""ScienceQA: the chosen option's letter against the right one.

The official rule (CoIN's eval_science_qa.py, inherited from LLaVA) takes the first one-letter word of a free
answer, so that "It is a good idea, B" chooses A.
"""

import re

from delo_eval.scorers._text import phrase
from delo_eval.scorers.base import Reference, Scorer
from delo_llava.errors import DeloError

OFFICIAL_LETTERS = "ABCDE"

WHOLE = re.compile(r"\(?([A-Za-z])\)?[.:]?")
_LEADING = re.compile(r"\(?([A-Za-z])(?:\)|[.:](?=\s))")
#: A small letter is announced only where nothing but marks follow: "the answer is a dog" chooses none.
_ANNOUNCED = re.compile(
    r"(?i:\b(?:answer|option|choice)(?:\s+is|:)?\s+(?:option\s+)?)\(?([A-Z]\b|[a-z](?=\)|[.,;:!]?\s*\Z))"
)
_CAPITAL = re.compile(r"\b([A-Z])\b")
_ARTICLE = re.compile(r"(?:^|[.!?]\s+)A (?!is\b|or\b|and\b)(?=[a-z])")
_ONE_LETTER_WORD = re.compile(r"\b(\w)\b")


def right_letter(reference: Reference) -> str:
    """The reference's letter; the answer may be a letter or, as in problems.json, an index.

    Raises:
        DeloError: it is neither.
    """
    answer = reference.answer.strip()
    if answer.isascii() and answer.isdigit() and int(answer) < 26:
        return chr(ord("A") + int(answer))
    if len(answer) == 1 and answer.isascii() and answer.isalpha():
        return answer.upper()
    raise DeloError(
        f"Question {reference.id}: a multiple-choice answer must be a letter or an index.", given=answer
    )


def chosen(prediction: str, reference: Reference) -> str | None:
    """The letter that a free answer chooses, None where it chooses none or several.

    In this order: the whole answer is a letter; it starts with one, as in "B. iron", "b. iron" or "(B)
    iron"; it says "answer is B"; it is the text of exactly one choice; one option's letter stands alone
    in it as a capital, where the article at the start of a sentence does not count.
    """
    text, choices = prediction.strip(), reference.extra.get("choices") or []
    letters = [chr(ord("A") + i) for i in range(len(choices) or len(OFFICIAL_LETTERS))]
    if whole := WHOLE.fullmatch(text):
        return whole[1].upper()
    for pattern in (_LEADING.match, _ANNOUNCED.search):
        if (found := pattern(text)) and found[1].upper() in letters:
            return found[1].upper()
    same = [i for i, choice in enumerate(choices) if phrase(str(choice)) == phrase(text)]
    if len(same) == 1:
        return chr(ord("A") + same[0])
    alone = {letter for letter in _CAPITAL.findall(_ARTICLE.sub("", text)) if letter in letters}
    return alone.pop() if len(alone) == 1 else None


def official_choice(prediction: str) -> str:
    """The letter the official script reads: exact, or before ". ", or the first one-letter word."""
    if len(prediction) == 1 and prediction in OFFICIAL_LETTERS:
        return prediction
    if len(prediction) >= 3 and prediction[0] in OFFICIAL_LETTERS and prediction[1:3] == ". ":
        return prediction[0]
    first = _ONE_LETTER_WORD.search(prediction)
    return first[1].upper() if first else "FAILED"


SCORER = Scorer(
    "scienceqa.v2",
    "the letter an answer chooses, by position, announcement, choice text or lone capital",
    lambda prediction, reference: float(chosen(prediction, reference) == right_letter(reference)),
    says=right_letter,
    compat=Scorer(
        "scienceqa.coin.v2",
        "the letter itself, or before '. ', or the first one-letter word in upper case; ids as text",
        lambda prediction, reference: float(official_choice(prediction) == right_letter(reference)),
        text_ids=True,
        says=right_letter,
    ),
)
