"""Rows gathered into blocks: a sum of d×d products costs one large product a block, not a small one a batch.

A product of few rows is no work, but adding it passes over d² numbers: at d = 4096, 128 MiB each time. Blocks
are cut by rows alone, wherever batches begin, so the bits of a sum do not depend on the micro-batch, nor on
when a run was left, if the rows that fill no block travel with the checkpoint.
"""

from collections.abc import Callable

import torch
from torch import Tensor

#: Rows of a block. Larger ones save nothing more; 256 rows of d = 4096 are 4 MiB.
BLOCK = 256


class RowBlocks:
    """Hands out whole blocks of the rows that it is given, on the CPU.

    Args:
        width: of a row.
        take: told every block, BLOCK×width float64 (fewer rows from `flush`).
    """

    def __init__(self, width: int, take: Callable[[Tensor], None]) -> None:
        self._width, self._take = width, take
        self._parts = [torch.empty(0, width)]

    def add(self, rows: Tensor) -> None:
        """Take over n×width rows, on any device; blocks that they fill are handed out."""
        self._parts.append(rows.detach().cpu())
        if sum(map(len, self._parts)) >= BLOCK:
            waiting = self.rows()
            whole = len(waiting) // BLOCK * BLOCK
            for block in waiting[:whole].split(BLOCK):
                self._take(block.double())
            self._parts = [waiting[whole:].clone()]

    def rows(self) -> Tensor:
        """The rows that fill no block yet: fewer than BLOCK×width."""
        return torch.cat(self._parts)

    def flush(self) -> None:
        """Hand out what fills no block: no more rows will come."""
        if len(rest := self.rows()):
            self._take(rest.double())
        self._parts = [torch.empty(0, self._width)]
