"""Phrases and questions that talks with and without a picture share: numbers, shapes, emoji and countries."""

from delo_llava.mini import entities
from delo_llava.mini.entities import COLOURS, FORMS, REGIONS
from tools.mini_base.pretrain.talk import NUMBERS, Rng, Talk, Turns, choose, note, pick, some


def number_hint(rng: Rng, value: int) -> str:
    """A phrase from which the number follows."""
    forms = (
        [
            f"the number after {NUMBERS[value - 1]}",
            f"one more than {NUMBERS[value - 1]}",
            f"it follows {NUMBERS[value - 1]}",
        ]
        if value
        else []
    )
    forms += [
        f"the number before {NUMBERS[value + 1]}",
        f"one less than {NUMBERS[value + 1]}",
        f"next is {NUMBERS[value + 1]}",
        f"the number {NUMBERS[value]}",
    ]
    return pick(rng, forms)


def caption(rng: Rng, colour: str, form: str) -> str:
    """A caption of one shape."""
    phrase = pick(
        rng,
        [
            "a {c} {f}",
            "{c} {f}",
            "there is a {c} {f}",
            "a {f}, {c}",
            "someone drew a {c} {f}",
            "a {f} that is {c}",
        ],
    )
    return phrase.format(c=colour, f=form)


def shape_turns(rng: Rng, colour: str, form: str, count: int) -> Turns:
    """Questions about one coloured shape: colour, form, both, and balanced yes/no."""
    turns: Turns = []
    for kind in rng.choice(5, size=count, p=[0.14, 0.12, 0.14, 0.3, 0.3]):
        yes = bool(rng.random() < 0.5)
        other_colour, other_form = (
            pick(rng, [c for c in COLOURS if c != colour]),
            pick(rng, [f for f in FORMS if f != form]),
        )
        match int(kind):
            case 0:
                turns.append(
                    (
                        pick(
                            rng, ["which hue?", "tell the paint.", "the hue of it?", "what paint was used?"]
                        ),
                        colour,
                    )
                )
            case 1:
                turns.append(
                    (
                        pick(
                            rng, ["which outline?", "tell the outline.", "what figure?", "the figure's kind?"]
                        ),
                        form,
                    )
                )
            case 2:
                turns.append(
                    (pick(rng, ["describe it.", "say what it shows.", "caption?"]), f"{colour} {form}")
                )
            case 3:
                ask = pick(rng, ["any {} here?", "does it show {}?", "{}, yes or no?", "can {} be seen?"])
                turns.append((ask.format(colour if yes else other_colour), "yes" if yes else "no"))
            case _:
                ask = pick(
                    rng, ["any {} here?", "does it show a {}?", "a {}, yes or no?", "can a {} be seen?"]
                )
                turns.append((ask.format(form if yes else other_form), "yes" if yes else "no"))
    return turns


def emoji_talk(rng: Rng, item: entities.Emoji, hidden: bool, picture: bool = True) -> Talk:
    """The group of an icon or of its name; rarely the name of the icon."""
    groups = list(entities.GROUPS.values())
    known = pick(
        rng, [item.name, item.name, " ".join(some(rng, item.keywords, 2)) if item.keywords else item.name]
    )
    said = pick(rng, ["called {}", "its name is {}", "an icon of {}", "{}", "tags: {}"]).format(known)
    ask = pick(rng, ["what sort is it?", "the family?", "it is part of what family?", "sort it."])
    if not picture and rng.random() < 0.5:
        return Talk(
            "fact",
            (
                (
                    pick(rng, ["what sort is {}?", "{} is of which family?", "sort {}"]).format(known),
                    item.group,
                ),
            ),
            None,
            ("emoji", item.name),
        )
    context = note(rng, said, hidden)
    draw = rng.random()
    if draw < 0.15:
        turn = choose(rng, item.group, groups, ask)
    elif draw < 0.25 and picture and not hidden:
        turn = (pick(rng, ["what is the icon called?", "its name?"]), item.name)
    elif draw < 0.45:
        asked = item.group if rng.random() < 0.5 else pick(rng, [g for g in groups if g != item.group])
        turn = (
            pick(rng, ["is it of the family {}?", "family {}, yes or no?"]).format(asked),
            "yes" if asked == item.group else "no",
        )
    else:
        turn = (ask, item.group)
    return Talk("emoji" if picture else "fact", (turn,), context, ("emoji", item.name))


def land_talk(rng: Rng, land: entities.Country, hidden: bool, picture: bool = True) -> Talk:
    """The continent of a dot on a map, or of a train country, its capital or language."""
    clues = [f"{pick(rng, ['named', 'the land of', 'this is'])} {land.name}"]
    clues += [f"the seat is {land.capital}", f"chief city {land.capital}"] if land.capital else []
    ask = pick(rng, ["what continent?", "the continent?", "on which continent?", "continent of it?"])
    if not picture and rng.random() < 0.5:
        about = pick(rng, [land.name, land.capital or land.name])
        turn = (
            pick(rng, ["what continent is {} on?", "{} lies on which continent?"]).format(about),
            land.region,
        )
        return Talk("fact", (turn,), None, ("country", land.name))
    told = pick(rng, [f"a land of {land.region}", f"found on {land.region}", f"continent: {land.region}"])
    clue = pick(rng, [told, told, *clues]) if picture else pick(rng, clues)
    turns: Turns = [(ask, land.region) if rng.random() < 0.8 else choose(rng, land.region, REGIONS, ask)]
    if picture and not hidden:
        turns.append(
            (
                pick(rng, ["which part holds the dot?", "dot in which part?"]),
                part_of(land.latitude, land.longitude),
            )
        )
        turns = [turns[i] for i in rng.permutation(2)]
    return Talk("map" if picture else "fact", tuple(turns), note(rng, clue, hidden), ("country", land.name))


def part_of(latitude: float, longitude: float) -> str:
    """The ninth of a world map that holds a position."""
    row = "top" if latitude > 30 else "middle" if latitude > -10 else "bottom"
    return f"{row} {'left' if longitude < -30 else 'centre' if longitude < 60 else 'right'}"
