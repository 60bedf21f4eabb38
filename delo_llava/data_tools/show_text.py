"""Shown records on a terminal: coloured there, with plain marks where the output goes elsewhere."""

import json

from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from delo_llava.data_tools.shown import Segment, Shown
from delo_llava.errors import printable

#: Colours of what tokens are; trained ones are bold and underlined on top.
STYLES = {"image": "magenta", "context": "cyan", "instruction": "green", "other": "dim"}
TRAINED = "bold underline yellow"

#: Columns of a picture's preview; each character is two pixels high.
PREVIEW = 32


def show(console: Console, item: Shown, preview: bool, tokens: bool) -> None:
    """One record.

    Args:
        preview: draw the picture with half blocks, where the terminal has colours.
        tokens: write every token instead of each segment's text.
    """
    record = item.record
    console.rule(Text(printable(f"{record.task}/{record.split}  {record.id}")), align="left")
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, value in rows(item):
        facts.add_row(name, Text(printable(value)))
    console.print(facts)
    if preview and item.picture is not None and console.color_system is not None:
        console.print(half_blocks(item.picture))
    console.print(_tokens(item.segments, tokens))


def rows(item: Shown) -> list[tuple[str, str]]:
    """(name, value) of everything about a record but its tokens."""
    record, (image, context) = item.record, item.presence
    return [
        ("image", f"{record.image}  ({item.facts})" if record.image else "none"),
        ("context", record.context or "none"),
        ("instruction", record.instruction),
        ("answer", record.answer),
        ("shown", f"image: {_told(image, record.image)}, context: {_told(context, record.context)}"),
        ("prompt", repr(item.prompt)),
        ("cut", ", ".join(item.cut) or "nothing"),
        ("scorer", item.scorer),
        ("extra", json.dumps(dict(record.extra), ensure_ascii=False)),
    ]


def _told(shown: bool, given: object) -> str:
    """Whether a modality is left, and whose doing it is if not."""
    return "yes" if shown else "not in the data" if given is None else "left out by the missing pattern"


def _tokens(segments: list[Segment], every: bool) -> Table:
    """One row for each segment, its tokens counted."""
    count, trained = (
        sum(s.size for s in segments),
        sum(s.size for s in segments if s.trained),
    )
    table = Table(title=f"{count} tokens, {trained} trained", title_justify="left")
    for name in ("modality", "trained", "tokens"):
        table.add_column(name)
    table.add_column("text", overflow="fold")
    for segment in segments:
        style = TRAINED if segment.trained else STYLES[segment.kind]
        mark = "TRAINED" if segment.trained else "-"
        pieces = "|".join(segment.pieces) if every and segment.kind != "image" else visible(segment.text)
        table.add_row(Text(segment.kind, style), mark, str(segment.size), Text(printable(pieces), style))
    return table


def visible(text: str) -> str:
    """Line breaks that can be seen."""
    return text.replace("\n", "↵")


def half_blocks(picture: Image.Image) -> Text:
    """A small picture of characters: the upper half in the text's colour, the lower in the background's."""
    height = max(2, round(picture.height * PREVIEW / picture.width / 2) * 2)
    small = picture.resize((PREVIEW, min(height, 2 * PREVIEW)))
    text = Text()
    for y in range(0, small.height, 2):
        for x in range(small.width):
            above, below = (_colour(small, x, y + row) for row in (0, 1))
            text.append("▀", style=f"{above} on {below}")
        text.append("\n")
    return text


def _colour(picture: Image.Image, x: int, y: int) -> str:
    pixel = picture.getpixel((x, y))
    red, green, blue = pixel if isinstance(pixel, tuple) else (0, 0, 0)
    return f"#{int(red):02x}{int(green):02x}{int(blue):02x}"
