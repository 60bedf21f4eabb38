"""Colour or form of a framed easy-VQA scene, as VQAv2; the caption names what the picture hides."""

from collections.abc import Iterator
from typing import Literal

from numpy.random import Generator

from delo_llava.mini.entities import Scene, Split, scene_split, scenes
from delo_llava.mini.render import Hiding, framed, hide_shape, scene_image
from delo_llava.mini.tasks.base import Example, carriers, pick

INSTRUCTIONS = {
    "colour": ("tell me its hue", "how was it painted?", "say the paint in the frame"),
    "form": ("tell me its outline", "how was it cut?", "say the figure in the frame"),
}
TOLD = ("caption: one {scene}", "seen earlier: {scene}", "the artist notes {scene}")
NEUTRAL = {
    "colour": ("caption: one {form}", "seen earlier: {form}", "the artist notes {form}"),
    "form": ("caption: one {colour} thing", "seen earlier: {colour}", "the artist notes {colour}"),
}


def _caption(scene: Scene, asked: str, told: bool, rng: Generator) -> str:
    """Both attributes when told, else only the one that is not asked for."""
    template = pick(rng, TOLD if told else NEUTRAL[asked])
    return template.format(scene=f"{scene.colour} {scene.form}", colour=scene.colour, form=scene.form)


def records(split: Split, rng: Generator) -> Iterator[Example]:
    """Two questions of three ask for the colour (eight answers), the others for the form (three)."""
    part: Literal["train", "test"] = "test" if split == "test" else "train"
    pool = [s for s in scenes(part) if scene_split(s) == split]
    while True:
        scene = pool[int(rng.integers(len(pool)))]
        asked: Hiding = "colour" if rng.random() < 0.67 else "form"
        in_image, in_context = carriers(rng, image_only=0.45, both=0.25)
        yield Example(
            image=framed(hide_shape(scene_image(scene), rng, "nothing" if in_image else asked)),
            context=_caption(scene, asked, in_context, rng),
            instruction=pick(rng, INSTRUCTIONS[asked]),
            answer=scene.colour if asked == "colour" else scene.form,
            entity=f"scene/{scene.key}",
            in_image=in_image,
            in_context=in_context,
        )
