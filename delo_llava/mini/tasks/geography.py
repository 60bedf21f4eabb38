"""In which part of the world is the dot? Countries on a world frame, with facts beside them."""

from collections.abc import Iterator

from numpy.random import Generator

from delo_llava.mini.entities import REGIONS, Country, Split, countries, split_of
from delo_llava.mini.render import map_image
from delo_llava.mini.tasks.base import Example, carriers, pick

INSTRUCTIONS = (
    "which part of the world is marked?",
    "on what land does the dot lie?",
    "give the region of the country",
)
TOLD = ("{facts}, it lies in {region}", "{facts}, a country of {region}", "{region} is its home, {facts}")
NEUTRAL = ("{facts}, it is a country", "{facts}, see the map", "a home to many, {facts}")


def _facts(country: Country) -> str:
    """A fact that does not tell the region by itself to someone who never heard of the country."""
    return f"people speak {country.languages[0]}" if country.languages else "people live there"


def records(split: Split, rng: Generator) -> Iterator[Example]:
    """Regions are drawn evenly; the dot is moved by up to a degree and a half."""
    members: dict[str, list[Country]] = {region: [] for region in REGIONS}
    for country in countries():
        if split_of("country", country.name) == split:
            members[country.region].append(country)
    while True:
        region = pick(rng, REGIONS)
        country = members[region][int(rng.integers(len(members[region])))]
        in_image, in_context = carriers(rng, image_only=0.50, both=0.20)
        north, east = rng.uniform(-1.5, 1.5, 2)
        yield Example(
            image=map_image(country.latitude + north, country.longitude + east, rng, hidden=not in_image),
            context=pick(rng, TOLD if in_context else NEUTRAL).format(facts=_facts(country), region=region),
            instruction=pick(rng, INSTRUCTIONS),
            answer=region,
            entity=f"country/{country.name}",
            in_image=in_image,
            in_context=in_context,
        )
