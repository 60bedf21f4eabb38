"""Shown records as files: a page of HTML without any other file, or a contact sheet of pictures."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from delo_llava.data_tools.show_text import rows, visible
from delo_llava.data_tools.shown import Shown
from delo_llava.files import write_text_atomic

#: Longest side of a picture in the page and on the sheet, in pixels; pictures beside each other on the sheet.
SIDE, ACROSS = 256, 4

#: Height of the lines of text below a picture of the sheet.
CAPTION = 48

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 60rem; padding: 0 1rem; }}
article {{ border-top: 1px solid #999; padding: 1rem 0; }}
img {{ max-width: 100%; }}
dt {{ font-weight: bold; }} dd {{ margin: 0 0 .4rem; overflow-wrap: anywhere; }}
.tokens {{ line-height: 2; overflow-wrap: anywhere; }}
.tokens span {{ padding: .15rem .2rem; margin-right: .1rem; border-radius: .2rem; color: #111; }}
.image {{ background: #e9c6ee; }} .context {{ background: #bfe6ee; }} .instruction {{ background: #c9ecc4; }}
.other {{ background: #e6e6e6; }}
.trained {{ background: #ffe08a; text-decoration: underline; font-weight: bold; }}
</style></head><body><h1>{title}</h1>
<p class="tokens"><span class="image">image</span> <span class="context">context</span>
<span class="instruction">instruction</span> <span class="other">other</span>
<span class="trained">trained</span></p>
{body}
</body></html>
"""


def write_html(path: Path, title: str, items: Sequence[Shown]) -> None:
    """A page with every record; pictures are inside it."""
    body = "\n".join(_article(item) for item in items)
    write_text_atomic(path, PAGE.format(title=html.escape(title), body=body))


def _article(item: Shown) -> str:
    picture = "" if item.picture is None else f'<img alt="" src="{_data(item.picture)}">'
    facts = "".join(f"<dt>{name}</dt><dd>{html.escape(visible(value))}</dd>" for name, value in rows(item))
    spans = []
    for segment in item.segments:
        kind = "trained" if segment.trained else segment.kind
        count = f" ×{segment.size}" if segment.kind == "image" else ""
        spans.append(f'<span class="{kind}">{html.escape(visible(segment.text))}{count}</span>')
    tokens = f'<p class="tokens">{"".join(spans)}</p>'
    return f"<article><h2>{html.escape(item.record.id)}</h2>{picture}{tokens}<dl>{facts}</dl></article>"


def _data(picture: Image.Image) -> str:
    """A copy of a picture, in the page's size, as a data address."""
    file = io.BytesIO()
    ImageOps.contain(picture, (SIDE, SIDE)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def write_sheet(path: Path, items: Sequence[Shown]) -> None:
    """A PNG with every picture above its question and answer; a record without image is an empty square."""
    lines = -(-len(items) // ACROSS)
    sheet = Image.new("RGB", (min(len(items), ACROSS) * SIDE, lines * (SIDE + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, item in enumerate(items):
        left, top = number % ACROSS * SIDE, number // ACROSS * (SIDE + CAPTION)
        if item.picture is None:
            draw.rectangle((left + 4, top + 4, left + SIDE - 4, top + SIDE - 4), outline="grey")
        else:
            small = ImageOps.contain(item.picture, (SIDE - 8, SIDE - 8))
            sheet.paste(small, (left + (SIDE - small.width) // 2, top + (SIDE - small.height) // 2))
        record = item.record
        words = [record.id, visible(record.instruction), f"-> {record.answer}"]
        draw.text((left + 4, top + SIDE), "\n".join(word[:42] for word in words), "black")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    sheet.save(draft, "PNG")
    draft.replace(path)
