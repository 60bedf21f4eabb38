"""The general mixture: short talks about pictures, about contexts, about both, and about facts of train
entities.

A talk is a context (or none), a picture's truth (or none) and a list of (instruction, answer) turns. Its
wording is kept apart from the six tasks' instructions. Either the context or the picture carries an answer,
never neither.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from delo_llava.mini.entities import COLOURS, FORMS, NUMBER_NAMES, REGIONS
from tools.mini_base.pretrain.facts import caption, emoji_talk, land_talk, number_hint, part_of, shape_turns
from tools.mini_base.pretrain.talk import (
    FAMILIES,
    FIELDS,
    LETTERS,
    NEUTRAL,
    NUMBERS,
    PEOPLE,
    THINGS,
    Rng,
    Talk,
    Truth,
    Turns,
    choose,
    known_country,
    known_emoji,
    note,
    pick,
    safe_capitals,
    some,
    train_countries,
    train_emoji,
)


def thing(rng: Rng) -> str:
    """A value to copy or look up: a word in capitals, a coloured shape, a thing, a number or a name."""
    match int(rng.integers(6)):
        case 0:
            return safe_capitals(rng)
        case 1:
            return f"{pick(rng, list(COLOURS))} {pick(rng, FORMS)}"
        case 2:
            return pick(rng, THINGS)
        case 3:
            return pick(rng, NUMBERS)
        case 4:
            return pick(rng, _short_names())
        case _:
            return pick(rng, [*(c.name for c in train_countries()), *REGIONS])


@lru_cache
def _short_names() -> tuple[str, ...]:
    return tuple(e.name for e in train_emoji() if e.name.count(" ") < 2)


def copying(rng: Rng) -> Talk:
    """What does the note say?"""
    value = thing(rng)
    form = pick(
        rng,
        [
            "it says {}",
            "the note reads {}",
            "{}",
            "a copy: {}",
            "someone wrote {}",
            "written there: {}",
            "{} it is",
        ],
    )
    ask = pick(rng, ["what is in the note?", "repeat the note.", "say it again.", "what was written?"])
    return Talk("copy", ((ask, value),), form.format(value))


def lookup(rng: Rng) -> Talk:
    """Several keys with values, asked one after another."""
    count = int(rng.integers(2, 4))
    values = [thing(rng) for _ in range(count)]
    if rng.random() < 0.5:
        keys = some(rng, PEOPLE, count)
        say, ask = (
            pick(rng, ["{k} has {v}.", "{k} took {v}.", "{v} is for {k}."]),
            pick(rng, ["what about {}?", "{} has what?", "tell me {}'s."]),
        )
    else:
        keys = some(rng, FIELDS, count)
        say, ask = (
            pick(rng, ["{k}: {v}.", "the {k} is {v}.", "{k} = {v}."]),
            pick(rng, ["what is the {}?", "the {}?", "give the {}."]),
        )
    context = " ".join(say.format(k=k, v=v) for k, v in zip(keys, values, strict=True))
    order = rng.permutation(count)
    return Talk("lookup", tuple((ask.format(keys[i]), values[i]) for i in order), context)


def letters(rng: Rng) -> Talk:
    """Find the letter of an option that is named, or the option of a letter."""
    pool = (
        [thing(rng) for _ in range(int(rng.integers(2, 6)))]
        if rng.random() < 0.3
        else some(rng, pick_pool(rng), int(rng.integers(2, 6)))
    )
    pool = list(dict.fromkeys(pool))
    context = " ".join(f"{LETTERS[i]}. {o}" for i, o in enumerate(pool))
    turns: Turns = []
    for i in rng.permutation(len(pool)):
        if rng.random() < 0.7:
            turns.append(
                (
                    pick(rng, ["letter of {}?", "where is {}?", "pick {}", "{} is which letter?"]).format(
                        pool[i]
                    ),
                    LETTERS[i],
                )
            )
        else:
            turns.append((pick(rng, ["what is at {}?", "read option {}"]).format(LETTERS[i]), pool[i]))
    return Talk("letters", tuple(turns), context)


def pick_pool(rng: Rng) -> tuple[str, ...]:
    """One family of words that options come from; numbers most often."""
    return FAMILIES[int(rng.choice(len(FAMILIES), p=[0.35, 0.15, 0.05, 0.2, 0.1, 0.15]))]


def told_letter(rng: Rng) -> Talk:
    """The context tells the answer, the instruction lists the options."""
    pool = pick_pool(rng)
    right = pick(rng, pool)
    context = pick(
        rng, ["it is {}", "the answer is {}", "{} it is", "someone says {}", "they chose {}", "note: {}"]
    ).format(right)
    asks = ["which one?", "what is it?", "the note?", "which is right?"]
    return Talk("told_letter", tuple(choose(rng, right, pool, pick(rng, asks)) for _ in range(3)), context)


def numerals(rng: Rng) -> Talk:
    """Successor and predecessor facts, as a question, from a context, or among options."""
    value = int(rng.integers(0, 10))
    hint, ask = (
        number_hint(rng, value),
        pick(rng, ["so which number?", "what number is meant?", "tell the number."]),
    )
    match int(rng.integers(3)):
        case 0:
            return Talk("numerals", ((f"{hint}. {ask}", NUMBERS[value]),))
        case 1:
            return Talk("numerals", ((ask, NUMBERS[value]),), hint)
        case _:
            return Talk("numeral_letter", (choose(rng, NUMBERS[value], NUMBER_NAMES, ask),), hint)


def read_caption(rng: Rng) -> Talk:
    """Colour, form and yes/no questions answered from a caption alone."""
    colour, form = pick(rng, list(COLOURS)), pick(rng, FORMS)
    return Talk("caption", tuple(shape_turns(rng, colour, form, 5)), caption(rng, colour, form))


def agree(rng: Rng) -> Talk:
    """Do two phrases say the same?"""
    value, yes = thing(rng), bool(rng.random() < 0.5)
    other = value if yes else thing(rng)
    ask = pick(rng, ["does it say {}?", "is {} right?", "{}, yes or no?"]).format(other)
    return Talk(
        "agree",
        ((ask, "yes" if other == value else "no"),),
        pick(rng, ["it says {}", "{}", "note: {}"]).format(value),
    )


def fact(rng: Rng) -> Talk:
    """A fact about a train emoji's name or a train country."""
    if rng.random() < 0.5:
        item = train_emoji()[int(rng.integers(len(train_emoji())))]
        return emoji_talk(rng, item, hidden=True, picture=False)
    land = train_countries()[int(rng.integers(len(train_countries())))]
    return land_talk(rng, land, hidden=True, picture=False)


TEXT: dict[Callable[[Rng], Talk], float] = {
    copying: 0.12,
    lookup: 0.14,
    letters: 0.18,
    told_letter: 0.2,
    numerals: 0.12,
    read_caption: 0.12,
    agree: 0.06,
    fact: 0.14,
}
"""How often each kind of talk without a picture comes."""


def text_talk(rng: Rng) -> Talk:
    """One talk without a picture."""
    makers = list(TEXT)
    return makers[int(rng.choice(len(makers), p=np.array(list(TEXT.values())) / sum(TEXT.values())))](rng)


def digit_talk(rng: Rng, truth: Truth) -> Talk:
    """Name the digit, its successor or parity, or the letter of its name."""
    value = NUMBERS.index(truth.text)
    turns: Turns = []
    for kind in rng.choice(4, size=3, p=[0.2, 0.6, 0.1, 0.1]):
        ask = pick(rng, ["name the digit.", "read the numeral.", "what numeral is it?", "the digit?"])
        if kind == 0:
            turns.append((ask, truth.text))
        elif kind == 1:
            turns.append(choose(rng, truth.text, NUMBER_NAMES, ask))
        elif kind == 2:
            turns.append(
                (pick(rng, ["even or odd?", "is the numeral odd or even?"]), "odd" if value % 2 else "even")
            )
        else:
            turns.append((pick(rng, ["what comes next after it?", "add one to it."]), NUMBERS[value + 1]))
    return Talk("digit", tuple(turns), note(rng, number_hint(rng, value), truth.hidden), truth.entity)


def card_talk(rng: Rng, truth: Truth) -> Talk:
    """Spell a card's word."""
    said = pick(rng, ["a copy: {}", "it says {}", "someone typed {}", "typed: {}", "{}"]).format(truth.text)
    ask = pick(rng, ["spell the card.", "type it out.", "which letters?", "copy the letters."])
    return Talk("card", ((ask, truth.text),), note(rng, said, truth.hidden), truth.entity)


def shape_talk(rng: Rng, truth: Truth) -> Talk:
    """Questions about one shape, or about a row of several."""
    if len(truth.items) > 1:
        return scene_talk(rng, truth)
    colour, form = truth.items[0]
    telling = caption(rng, colour, form)
    if truth.colourless and rng.random() < 0.5:
        telling = pick(rng, [f"the hue is {colour}", f"painted {colour}", colour])
    elif truth.formless and rng.random() < 0.5:
        telling = pick(rng, [f"the outline is a {form}", f"drawn as a {form}", form])
    lost = truth.hidden or truth.colourless or truth.formless
    return Talk("shape", tuple(shape_turns(rng, colour, form, 4)), note(rng, telling, lost))


def scene_talk(rng: Rng, truth: Truth) -> Talk:
    """List, count, find and look up the shapes of a grid."""
    turns: Turns = []
    colours, forms = [c for c, _ in truth.items], [f for _, f in truth.items]
    for kind in rng.choice(4, size=2, p=[0.3, 0.2, 0.25, 0.25]):
        yes = bool(rng.random() < 0.5)
        if kind == 0:
            turns.append(
                (
                    pick(rng, ["list all figures.", "list what it shows."]),
                    " ".join(f"{c} {f}" for c, f in truth.items[:2]),
                )
            )
        elif kind == 1:
            turns.append((pick(rng, ["how many figures?", "count them."]), NUMBERS[len(truth.items)]))
        elif kind == 2:
            asked = pick(rng, colours if yes else [c for c in COLOURS if c not in colours])
            turns.append(
                (pick(rng, ["any {} here?", "does it show {}?"]).format(asked), "yes" if yes else "no")
            )
        else:
            i = int(rng.integers(len(truth.items)))
            if colours.count(colours[i]) == 1:
                turns.append((f"which outline has the {colours[i]} one?", forms[i]))
            elif yes:
                turns.append((f"any {forms[i]} here?", "yes"))
            else:
                turns.append(("how many figures?", NUMBERS[len(truth.items)]))
    return Talk("scene", tuple(turns), None if rng.random() < 0.6 else pick(rng, NEUTRAL))


def dot_talk(rng: Rng, truth: Truth) -> Talk:
    """Where is a dot that is no country's?"""
    return Talk(
        "dot",
        ((pick(rng, ["which part holds the dot?", "dot in which part?"]), part_of(*truth.place)),),
        note(rng, "a dot", False),
    )


def picture_talk(rng: Rng, truth: Truth) -> Talk:
    """One talk about a picture."""
    match truth.kind:
        case "digit":
            return digit_talk(rng, truth)
        case "card":
            return card_talk(rng, truth)
        case "shapes":
            return shape_talk(rng, truth)
        case "dot":
            return dot_talk(rng, truth)
        case "emoji":
            return emoji_talk(rng, known_emoji(truth), truth.hidden)
    return land_talk(rng, known_country(truth), truth.hidden)
