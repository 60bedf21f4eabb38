"""What a row of the mixture is, and what it may speak of."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from delo_llava.mini import entities
from delo_llava.mini.entities import COLOURS, FORMS, NUMBER_NAMES, REGIONS, split_of

Rng = np.random.Generator
Turns = list[tuple[str, str]]
NUMBERS = (*NUMBER_NAMES, "ten")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PEOPLE = ("tom", "ann", "ben", "eva", "max", "lea", "sam", "ida", "joe", "mia")
THINGS = ("cup", "box", "hat", "pen", "car", "bag", "key", "ball", "book", "lamp", "coat", "kite")
FIELDS = ("code", "label", "mark", "title", "sort", "kind", "place", "tone")
FAMILIES = (NUMBERS, tuple(COLOURS), FORMS, THINGS, REGIONS, tuple(entities.GROUPS.values()))
"""Small families of words that options come from."""
NEUTRAL = (
    "no note",
    "nothing is known",
    "nothing noted",
    "not much to tell",
    "the notes are lost",
    "an ordinary file",
)


@dataclass(frozen=True)
class Talk:
    """One row of the mixture; `entity` is the (kind, key) whose facts or picture it uses, if any."""

    skill: str
    turns: tuple[tuple[str, str], ...]
    context: str | None = None
    entity: tuple[str, str] | None = None


@dataclass(frozen=True)
class Truth:
    """What one picture shows: kind, facts and whether the drawing hides them (blank, blurred or occluded)."""

    kind: str
    entity: tuple[str, str] | None = None
    hidden: bool = False
    text: str = ""
    items: tuple[tuple[str, str], ...] = ()
    """(colour, form) of each shape, in reading order."""
    colourless: bool = False
    formless: bool = False
    place: tuple[float, float] = (0.0, 0.0)
    """Latitude and longitude of a map's dot, degrees."""


@lru_cache
def train_emoji() -> tuple[entities.Emoji, ...]:
    """Emoji that pretraining may see."""
    return tuple(e for e in entities.emoji() if split_of("emoji", e.name) == "train")


@lru_cache
def train_countries() -> tuple[entities.Country, ...]:
    """Countries that pretraining may see."""
    return tuple(c for c in entities.countries() if split_of("country", c.name) == "train")


@lru_cache
def train_words() -> tuple[str, ...]:
    """Words that pretraining may show on a card."""
    return tuple(w for w in entities.words() if split_of("word", w) == "train")


@lru_cache
def _by_name() -> tuple[dict[str, entities.Emoji], dict[str, entities.Country]]:
    return {e.name: e for e in train_emoji()}, {c.name: c for c in train_countries()}


def known_emoji(truth: Truth) -> entities.Emoji:
    """The train emoji that a picture of kind `emoji` shows."""
    return _by_name()[0][truth.entity[1] if truth.entity else ""]


def known_country(truth: Truth) -> entities.Country:
    """The train country that a picture of kind `land` marks."""
    return _by_name()[1][truth.entity[1] if truth.entity else ""]


def pick(rng: Rng, choices: tuple[str, ...] | list[str]) -> str:
    """One of the choices."""
    return choices[int(rng.integers(len(choices)))]


def some(rng: Rng, choices: tuple[str, ...] | list[str], count: int) -> list[str]:
    """`count` different choices in random order."""
    return [choices[int(i)] for i in rng.permutation(len(choices))[:count]]


def capitals(rng: Rng) -> str:
    """A word in capitals: half of the time a train word, else three to six random letters."""
    if rng.random() < 0.5:
        return pick(rng, train_words()).upper()
    return "".join(pick(rng, list(LETTERS)) for _ in range(int(rng.integers(3, 7))))


def safe_capitals(rng: Rng) -> str:
    """`capitals`, drawn again when the letters spell a word of another split."""
    word = capitals(rng)
    return word if word not in _forbidden() else safe_capitals(rng)


@lru_cache
def _forbidden() -> frozenset[str]:
    return frozenset(w.upper() for w in entities.words() if split_of("word", w) != "train")


def options(rng: Rng, right: str, pool: tuple[str, ...] | list[str]) -> tuple[str, str]:
    """A shuffled list "A. x B. y …" of two to five options and the letter of the right one."""
    others = [o for o in some(rng, pool, 5) if o != right][: int(rng.integers(1, 5))]
    shown = some(rng, [right, *others], 9)
    return " ".join(f"{LETTERS[i]}. {o}" for i, o in enumerate(shown)), LETTERS[shown.index(right)]


def choose(rng: Rng, right: str, pool: tuple[str, ...] | list[str], about: str) -> tuple[str, str]:
    """A turn that wants the letter of the right option."""
    listed, letter = options(rng, right, pool)
    form = pick(
        rng,
        [
            "{a} {o} give the letter",
            "pick the letter: {a} {o}",
            "{a} choose one letter. {o}",
            "{o} which letter fits? {a}",
        ],
    )
    return form.format(a=about, o=listed), letter


def note(rng: Rng, telling: str, hidden: bool) -> str | None:
    """The context of a picture: it tells when the picture hides; otherwise it tells, says nothing, or is
    missing.
    """
    if hidden or rng.random() < 0.3:
        return telling
    return pick(rng, NEUTRAL) if rng.random() < 0.4 else None
