"""Exact lengths of a stage's examples, as they will be shown: what batches of similar length go by.

Characters and a constant for a picture order records well where all pictures become as many tokens; where
pictures of any size become tokens of their own number (Qwen-VL, tiles), batches pad to the largest. So texts
are tokenised and pictures measured by their headers, by each rank a share.
"""

from itertools import islice
from typing import TYPE_CHECKING

import torch

from delo_llava.config import RunConfig
from delo_llava.data.examples import Examples, shown
from delo_llava.engines.ranks import Ranks
from delo_llava.training.pictures import Pictures, picture_of

if TYPE_CHECKING:
    from delo_llava.training.fit import Kit

#: Records that are tokenised together.
BATCH = 256


def token_lengths(examples: Examples, config: RunConfig, ranks: Ranks, kit: "Kit") -> list[int]:
    """Tokens of every example with its answer, image tokens included, cut to `data.max_length`; the same on
    every rank, for any number of them. An example whose picture cannot be used counts without it.

    Every rank must call it.

    Raises:
        DeloError: a record that cannot be shown.
    """
    collator, pictures = kit.collator(config), Pictures(kit, config.data.max_length)
    dummy = pictures.dummy if config.missing.image == "dummy" else None
    found = torch.zeros(len(examples), dtype=torch.int64)
    places = iter(range(ranks.rank, len(examples), ranks.world))
    while part := list(islice(places, BATCH)):
        items = [examples[i] for i in part]
        paths = [picture_of(item) for item in items]
        pictures.look([path for path in paths if path])
        usable = (path and path not in pictures.unusable for path in paths)
        images = [pictures.layout(path) if use else dummy for path, use in zip(paths, usable, strict=True)]
        presence = [(image is not None, shown(item)[1]) for item, image in zip(items, images, strict=True)]
        rows = collator.layout([record for record, _ in items], presence, images)
        found[torch.tensor(part)] = torch.tensor([len(row.ids) for row in rows])
    lengths: list[int] = ranks.sum(found).tolist()
    return lengths
