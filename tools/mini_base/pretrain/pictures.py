"""Pictures to learn to see from, with their truth: train digits, emoji and countries, random cards and
shapes, train scenes of easy-VQA.

The pool is drawn once from a seed and kept in memory: uint8 [N, 64, 64, 3] and a list of truths.
"""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from delo_llava.mini import entities, render
from delo_llava.mini.entities import COLOURS, FORMS, NUMBER_NAMES, split_of
from tools.mini_base.pretrain.talk import Rng, Truth, pick, safe_capitals, train_countries, train_emoji

KINDS = {"digit": 0.19, "card": 0.16, "emoji": 0.25, "shape": 0.2, "grid": 0.07, "land": 0.08, "dot": 0.05}
HIDDEN = 0.2
"""Share of pictures that hide what they would show."""


@dataclass
class Pool:
    """Pictures as uint8 [N, 64, 64, 3] and what each shows."""

    pixels: NDArray[np.uint8]
    truths: list[Truth]


@lru_cache
def _digits() -> tuple[entities.Digit, ...]:
    return tuple(d for d in entities.digits() if split_of("digit", d.key) == "train")


@lru_cache
def _scenes() -> tuple[tuple[entities.Scene, Image.Image], ...]:
    """easy-VQA's train scenes of the train split, decoded."""
    found = [s for s in entities.scenes("train") if entities.scene_split(s) == "train"]
    root = files("easy_vqa")
    return tuple((s, Image.open(str(root.joinpath(*s.path.split("/")))).convert("RGB")) for s in found)


def draw(rng: Rng) -> tuple[Image.Image, Truth]:
    """One picture of a random kind."""
    kind = list(KINDS)[int(rng.choice(len(KINDS), p=list(KINDS.values())))]
    hidden = bool(rng.random() < HIDDEN)
    match kind:
        case "digit":
            digit = _digits()[int(rng.integers(len(_digits())))]
            image = render.digit_image(digit.scan, rng, hidden)
            truth = Truth("digit", ("digit", digit.key), hidden, NUMBER_NAMES[digit.value])
            return _roughen(image, rng), truth
        case "card":
            word = safe_capitals(rng)
            return render.letter_card(word, rng, hidden), Truth("card", ("word", word.lower()), hidden, word)
        case "emoji":
            item = train_emoji()[int(rng.integers(len(train_emoji())))]
            image = render.emoji_image(item.char, rng, hidden)
            return _turn(image, rng), Truth("emoji", ("emoji", item.name), hidden)
        case "shape":
            return _shape(rng)
        case "grid":
            return _grid(rng)
        case "land":
            land = train_countries()[int(rng.integers(len(train_countries())))]
            image = render.map_image(land.latitude, land.longitude, rng, hidden)
            return image, Truth(
                "land", ("country", land.name), hidden, land.region, place=(land.latitude, land.longitude)
            )
        case _:
            place = (float(rng.uniform(-58, 78)), float(rng.uniform(-178, 178)))
            return render.map_image(*place, rng), Truth("dot", None, False, place=place)


def _roughen(image: Image.Image, rng: Rng) -> Image.Image:
    """A small turn and a missing spot now and then, so that few scans stand for many hands."""
    paper = tuple(int(v) for v in np.asarray(image)[0, 0])
    if rng.random() < 0.6:
        image = image.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BILINEAR, fillcolor=paper)
    if rng.random() < 0.2:
        left, top = (int(v) for v in rng.integers(8, 46, 2))
        image.paste(paper, (left, top, left + 9, top + 9))
    return image


def _turn(image: Image.Image, rng: Rng) -> Image.Image:
    """Mirrored half of the time, and turned or shrunk a little."""
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        image = image.rotate(
            float(rng.uniform(-20, 20)), Image.Resampling.BILINEAR, fillcolor=image.getpixel((0, 0))
        )
    return image


def _shape(rng: Rng) -> tuple[Image.Image, Truth]:
    """One free shape, half of the time a scene of easy-VQA; colour, form or everything may be hidden;
    sometimes framed.
    """
    if rng.random() < 0.5:
        scene, image = _scenes()[int(rng.integers(len(_scenes())))]
        colour, form, entity = scene.colour, scene.form, ("scene", scene.key)
    else:
        colour, form, entity = pick(rng, list(COLOURS)), pick(rng, FORMS), None
        image = render.shapes_image([render.random_shape(colour, form, rng)], rng)
    hiding = pick(rng, ["nothing"] * 5 + ["colour", "colour", "form", "form", "all"])
    image = render.hide_shape(image, rng, hiding)  # type: ignore[arg-type]
    if rng.random() < 0.4:
        image = render.framed(image)
    lost = hiding == "all"
    return image, Truth(
        "shapes",
        entity,
        lost,
        items=((colour, form),),
        colourless=hiding == "colour",
        formless=hiding == "form",
    )


def _grid(rng: Rng) -> tuple[Image.Image, Truth]:
    """Two to four shapes, one a cell; the text of the truth lists their cells."""
    cells = sorted(int(c) for c in rng.permutation(16)[: int(rng.integers(2, 5))])
    items = tuple((pick(rng, list(COLOURS)), pick(rng, FORMS)) for _ in cells)
    half = [float(rng.uniform(5, 7)) for _ in cells]
    shapes = [
        render.Shape(c, f, cell % 4 * 16 + 8.0, cell // 4 * 16 + 8.0, h, h)
        for (c, f), cell, h in zip(items, cells, half, strict=True)
    ]
    return render.shapes_image(shapes, rng), Truth("shapes", None, False, " ".join(map(str, cells)), items)


def pool(seed: int, count: int) -> Pool:
    """`count` pictures: a pure function of the seed."""
    rng = np.random.default_rng([seed, 4])
    pixels, truths = np.empty((count, 64, 64, 3), np.uint8), []
    for i in range(count):
        image, truth = draw(rng)
        pixels[i] = np.asarray(image.convert("RGB"))
        truths.append(truth)
    return Pool(pixels, truths)


def cached_pool(path: Path, seed: int, count: int) -> Pool:
    """`pool`, kept as `path`.npy (pixels) and `path`.json (truths) once drawn."""
    pixels, truths = path.with_suffix(".npy"), path.with_suffix(".json")
    if not truths.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = pool(seed, count)
        np.save(pixels, drawn.pixels)
        truths.write_text(json.dumps([asdict(t) for t in drawn.truths]), encoding="utf-8")
    return Pool(np.load(pixels), [_truth(raw) for raw in json.loads(truths.read_text(encoding="utf-8"))])


def _truth(raw: dict[str, object]) -> Truth:
    """A truth from JSON, which knows lists only."""
    entity, items, place = raw.pop("entity"), raw.pop("items"), raw.pop("place")
    return Truth(
        entity=tuple(entity) if entity else None,  # type: ignore[arg-type]
        items=tuple(tuple(i) for i in items),  # type: ignore[attr-defined]
        place=tuple(place),  # type: ignore[arg-type]
        **raw,  # type: ignore[arg-type]
    )
