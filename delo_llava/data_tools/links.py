"""Symbolic links that lead out of an image folder: allowed, and told, once for each link of folders."""

import os
from collections import Counter
from functools import cache
from pathlib import Path


class Links:
    """Looks where the images of one file really lie.

    Args:
        root: the image folder; when it is a link itself, what it leads to counts as inside.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._real = root, os.path.realpath(root)
        self._leaves = cache(self._first_leaving)
        self._first: dict[tuple[str, str], tuple[int, str]] = {}
        self._counts: Counter[tuple[str, str]] = Counter()

    def look(self, image: Path, number: int, name: str) -> None:
        """Follow the links of the image of an entry with this number and id."""
        folder = image.parent
        link = self._leaves(folder)
        if link is None and os.path.islink(image):
            target = os.path.dirname(os.path.realpath(image))
            link = None if self._inside(target) else (str(folder), target)
        if link is not None:
            self._first.setdefault(link, (number, name))
            self._counts[link] += 1

    def _first_leaving(self, folder: Path) -> tuple[str, str] | None:
        """The topmost folder on the way that lies outside, and where it lies."""
        way = [folder, *folder.parents]
        below = way[: way.index(self._root)] if self._root in way else []
        for step in reversed(below):
            if not self._inside(target := os.path.realpath(step)):
                return str(step), target
        return None

    def _inside(self, target: str) -> bool:
        return target == self._real or target.startswith(self._real + os.sep)

    def outside(self) -> list[tuple[int, str, str]]:
        """(entry, id, message) of the first image that each pair of folders concerns."""
        return [
            (*self._first[pair], f"{count} images in {pair[0]} lie in {pair[1]}, outside the image folder")
            for pair, count in self._counts.items()
        ]
