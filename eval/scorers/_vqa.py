"""The VQA answer normaliser and the accuracy against several human answers, intended and as scripts have it.

Sources: the M4C evaluator of TextVQA (pythia / mmf, copied by LLaVA and CoIN), `vqaEval.py` of
GT-Vision-Lab/VQA and VizWiz's own version of it. All three share two defects kept in the official functions
below: the look-behind of the period rule is malformed, so that only the digit *after* a period protects it,
and `re.UNICODE` (32) is passed where the number of replacements belongs, so that at most 32 periods go.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from delo_eval.scorers._text import composed

#: Correct spellings; answers lack one of the apostrophes.
_SPELLINGS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
    wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_COUNTED = "zero one two three four five six seven eight nine ten"

CONTRACTED = _SPELLINGS.split()
NUMBERS = {word: str(i) for i, word in enumerate(_COUNTED.split())} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def _without_one_apostrophe(spellings: Sequence[str]) -> dict[str, str]:
    """Every spelling that lacks exactly one apostrophe -> the correct one."""
    return {word[:i] + word[i + 1 :]: word for word in spellings for i in range(len(word)) if word[i] == "'"}


#: As the scripts have it: keys with capitals never match lower-cased text, and one entry is reversed.
OFFICIAL_CONTRACTIONS = _without_one_apostrophe(CONTRACTED) | {"somebody'd": "somebodyd"}
CONTRACTIONS = _without_one_apostrophe([word.lower() for word in [*CONTRACTED, "somebody'd"]])

_MARKS = frozenset(PUNCTUATION)
_PLAIN = re.compile(r"[a-z0-9 ]*")
_PERIOD = re.compile(r"\.(?!\d)")
_DIGIT_COMMA = re.compile(r"(?<=\d),(?=\d)")
_TO_SPACE = str.maketrans(dict.fromkeys(PUNCTUATION + ":", " ") | {"’": "'", "‘": "'"})


@lru_cache(maxsize=1 << 17)
def normalise(text: str) -> str:
    """The normaliser as intended: composed letters, lower case, no thousands commas, punctuation or articles,
    number words as digits, contractions with their apostrophes. An answer of articles alone keeps them.
    """
    text = composed(text).lower()
    if not _PLAIN.fullmatch(text):
        text = _PERIOD.sub("", _DIGIT_COMMA.sub("", text).translate(_TO_SPACE))
    said = [NUMBERS.get(word, word) for word in text.split()]
    kept = [CONTRACTIONS.get(word, word) for word in said if word not in ARTICLES] or said
    return " ".join(kept)


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Share of agreement with human answers: min(1, matches / 3), averaged over leaving each answer out.

    With n < 4 answers the divisor is n − 1, and with one answer it is an exact match, so that 1 can be
    reached. Both sides are normalised; an empty prediction is never right.
    """
    said = normalise(prediction)
    if not said:
        return 0.0
    given = [normalise(answer) for answer in answers]
    count, matches = len(given), given.count(said)
    return float(matches) if count == 1 else leave_one_out(matches, count, min(3, count - 1))


def leave_one_out(matches: int, count: int, enough: int = 3) -> float:
    """The mean of min(1, others that match / `enough`) over the `count` answers, `matches` of which match."""
    with_it, without_it = min(1.0, (matches - 1) / enough), min(1.0, matches / enough)
    return (matches * with_it + (count - matches) * without_it) / count


@lru_cache(maxsize=1 << 17)
def official_m4c(text: str) -> str:
    """M4C's normaliser: commas and question marks vanish and 's is parted before anything else."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return official_words(official_punctuation(one_line(text)))


@lru_cache(maxsize=1 << 17)
def official_prediction(text: str) -> str:
    """The treatment of a prediction in `vqaEval.py` and in VizWiz's version of it."""
    return official_words(official_punctuation(one_line(text)))


def one_line(text: str) -> str:
    """Line ends and tabs as spaces, stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def official_punctuation(text: str) -> str:
    """A mark goes without trace where one of its kind touches a space, or a comma stands between digits
    anywhere in the text; otherwise each becomes a space. Then up to 32 periods go."""
    if _PLAIN.fullmatch(text):
        return text
    digit_comma, out = _DIGIT_COMMA.search(text) is not None, text
    for mark in _MARKS.intersection(text):
        touching = digit_comma or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if touching else " ")
    return _PERIOD.sub("", out, count=int(re.UNICODE))


def official_words(text: str) -> str:
    """Lower case, number words as digits, no articles, contractions by the official table."""
    said = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(OFFICIAL_CONTRACTIONS.get(word, word) for word in said if word not in ARTICLES)
