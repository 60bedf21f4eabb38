"""Symbolic links that lead out of an image folder: allowed, and told, once for each pair of folders."""

import os
from collections import Counter
from functools import cache
from pathlib import Path

from delo_llava.data_tools.walk import Entry


class Links:
    """Looks where the images of one file really lie.

    Args:
        root: the image folder; when it is a link itself, what it leads to counts as inside.
    """

    def __init__(self, root: Path) -> None:
        self._root = os.path.realpath(root)
        self._real_folder = cache(os.path.realpath)
        self._first: dict[tuple[str, str], tuple[int, str]] = {}
        self._counts: Counter[tuple[str, str]] = Counter()

    def look(self, entry: Entry) -> None:
        """Follow the links of an entry's image."""
        if entry.image is None:
            return
        folder, name = os.path.split(entry.image)
        target = self._real_folder(folder)
        if os.path.islink(entry.image):
            target = os.path.dirname(os.path.realpath(os.path.join(target, name)))
        if target == self._root or target.startswith(self._root + os.sep):
            return
        self._first.setdefault((folder, target), (entry.number, entry.id))
        self._counts[folder, target] += 1

    def outside(self) -> list[tuple[int, str, str]]:
        """(entry, id, message) of the first image that each pair of folders concerns."""
        return [
            (*self._first[pair], f"{count} images in {pair[0]} lie in {pair[1]}, outside the image folder")
            for pair, count in self._counts.items()
        ]
