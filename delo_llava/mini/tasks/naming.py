"""Naming the class of a drawing, as ImageNet: to which of six groups does an OpenMoji drawing belong?"""

from collections.abc import Iterator

from numpy.random import Generator

from delo_llava.mini.entities import Emoji, Split, emoji, split_of
from delo_llava.mini.render import emoji_image
from delo_llava.mini.tasks.base import Example, carriers, pick

INSTRUCTIONS = (
    "name the class of this icon",
    "to which group does the drawing belong?",
    "sort this icon into its class",
)
CLUES = {
    "activity": ("people play or celebrate with it", "it is for a game or a party", "it is for sport or fun"),
    "face": ("it shows how one feels", "it is a mood", "it shows a feeling"),
    "food": ("one can eat or drink it", "it comes from a kitchen", "it is a meal or a drink"),
    "nature": ("it lives or grows outside", "it is a plant or an animal", "it is alive"),
    "object": ("it is a tool or a thing to own", "it lies at home or at work", "one can buy and use it"),
    "travel": (
        "one sees it on a trip",
        "it is a place or a way to go there",
        "it is seen on the road or in the sky",
    ),
}
NEUTRAL = ("it is drawn with a black line", "one of many icons", "somebody sent it in a message")


def records(split: Split, rng: Generator) -> Iterator[Example]:
    """Groups are drawn evenly; the answer is one word."""
    members: dict[str, list[Emoji]] = {group: [] for group in CLUES}
    for entry in emoji():
        if split_of("emoji", entry.name) == split:
            members[entry.group].append(entry)
    while True:
        group = pick(rng, tuple(CLUES))
        entry = members[group][int(rng.integers(len(members[group])))]
        in_image, in_context = carriers(rng, image_only=0.40, both=0.25)
        yield Example(
            image=emoji_image(entry.char, rng, hidden=not in_image),
            context=pick(rng, CLUES[group] if in_context else NEUTRAL),
            instruction=pick(rng, INSTRUCTIONS),
            answer=group,
            entity=f"emoji/{entry.name}",
            in_image=in_image,
            in_context=in_context,
        )
