"""Existence questions on easy-VQA's scenes, as GQA: official images and questions, as many yes as no."""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from importlib.resources import files
from typing import Literal

from numpy.random import Generator

from delo_llava.mini.entities import COLOURS, Scene, Split, scene_split, scenes
from delo_llava.mini.render import hide_shape, scene_image
from delo_llava.mini.tasks.base import Example, carriers, pick

_POSITIVE = re.compile(
    r"^(is there a|does the image contain a|is a) (\w+)( shape)?( in the image| present)?\?$"
)
TOLD = ("the picture holds a {scene}", "somebody drew a {scene}", "a {scene} on plain paper")
NEUTRAL = ("the picture holds one shape", "somebody drew it today", "a drawing on plain paper")


@lru_cache
def _questions(part: Literal["train", "test"]) -> dict[str, list[tuple[str, str, str]]]:
    """Official positively worded existence questions: image id -> [(question, asked property, answer)]."""
    raw = json.loads(files("easy_vqa").joinpath("data", part, "questions.json").read_text(encoding="utf-8"))
    found: dict[str, list[tuple[str, str, str]]] = {}
    for question, answer, image_id in raw:
        match = _POSITIVE.match(question)
        if match and answer in ("yes", "no"):
            asked = "colour" if match.group(2) in COLOURS else "form"
            found.setdefault(f"{part}/{image_id}", []).append((question, asked, answer))
    return found


def _pools(split: Split) -> dict[tuple[str, str], list[tuple[Scene, str]]]:
    """(asked property, answer) -> [(scene, question)]: drawing a key first makes answers even."""
    part: Literal["train", "test"] = "test" if split == "test" else "train"
    pools: dict[tuple[str, str], list[tuple[Scene, str]]] = {
        (p, a): [] for p in ("colour", "form") for a in ("yes", "no")
    }
    for scene in scenes(part):
        if scene_split(scene) == split:
            for question, asked, answer in _questions(part).get(scene.key, ()):
                pools[asked, answer].append((scene, question))
    return pools


def records(split: Split, rng: Generator) -> Iterator[Example]:
    """The answer is yes or no, evenly."""
    pools = _pools(split)
    keys = list(pools)
    while True:
        key = keys[int(rng.integers(len(keys)))]
        scene, question = pools[key][int(rng.integers(len(pools[key])))]
        in_image, in_context = carriers(rng, image_only=0.50, both=0.20)
        yield Example(
            image=hide_shape(scene_image(scene), rng, "nothing" if in_image else "all"),
            context=pick(rng, TOLD if in_context else NEUTRAL).format(scene=f"{scene.colour} {scene.form}"),
            instruction=question,
            answer=key[1],
            entity=f"scene/{scene.key}",
            in_image=in_image,
            in_context=in_context,
        )
