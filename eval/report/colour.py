"""Colours of the report: one sequential palette that needs no colour vision, with text readable on it.

Lightness falls steadily along the palette, so it also reads in grey; every value is written out besides.
"""

#: Steps of the palette; cells are rounded to one of them and get its class `q0` … `q20`.
STEPS = 21

#: From light to dark, sRGB.
ANCHORS = ((0xF1, 0xF6, 0xFB), (0xB7, 0xD2, 0xE9), (0x62, 0xA1, 0xD1), (0x1F, 0x63, 0xA8), (0x0A, 0x2C, 0x5E))

Rgb = tuple[int, int, int]


def step_of(value: float, low: float = 0.0, high: float = 100.0) -> int:
    """The palette step of a value between `low` and `high`; values outside get the nearest end."""
    share = (value - low) / (high - low) if high > low else 0.0
    return round(min(1.0, max(0.0, share)) * (STEPS - 1))


def palette() -> list[Rgb]:
    """The colours of all steps."""
    return [_between(step / (STEPS - 1)) for step in range(STEPS)]


def palette_css() -> str:
    """A class per step, its text black or white, whichever contrasts more (at least 4.5 to 1).

    On a dark screen the palette runs the other way, so that nothing (0) is dark there and does not glow.
    """

    def classes(colours: list[Rgb]) -> str:
        return "\n".join(
            f".q{step}{{background:{hex_of(colour)};color:{text_on(colour)}}}"
            for step, colour in enumerate(colours)
        )

    dark = classes(palette()[::-1])
    return f"{classes(palette())}\n@media screen and (prefers-color-scheme:dark){{\n{dark}\n}}"


def hex_of(colour: Rgb) -> str:
    """`#rrggbb`."""
    return "#" + "".join(f"{part:02x}" for part in colour)


def text_on(colour: Rgb) -> str:
    """Black or white, whichever contrasts more with `colour`."""
    return "#000" if contrast(colour, (0, 0, 0)) >= contrast(colour, (255, 255, 255)) else "#fff"


def contrast(one: Rgb, other: Rgb) -> float:
    """The contrast ratio of WCAG 2, from 1 to 21."""
    bright, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _luminance(colour: Rgb) -> float:
    """Relative luminance of an sRGB colour (WCAG 2)."""
    parts = (part / 255 for part in colour)
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _between(share: float) -> Rgb:
    """The palette's colour at `share` of its length."""
    place = share * (len(ANCHORS) - 1)
    first = min(int(place), len(ANCHORS) - 2)
    red, green, blue = (
        round(a + (b - a) * (place - first)) for a, b in zip(ANCHORS[first], ANCHORS[first + 1], strict=True)
    )
    return red, green, blue
