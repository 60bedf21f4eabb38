"""How often each factor is chosen: counts per pool, so that a report can show dead and overworked experts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from delo_llava.methods.delo.router import Selection

#: Whose pool (a task), of which modality, whether that modality was present in the sample, A or B.
Key = tuple[str, str, bool, str]


@dataclass
class RoutingUse:
    """Counts since the last `take`; tensors stay on the device until then.

    Attributes:
        counts: key -> int64 S×E, how often factor e of linear s was chosen.
        rows: key -> samples behind the counts.
    """

    counts: dict[Key, Tensor] = field(default_factory=dict)
    rows: dict[Key, int] = field(default_factory=dict)

    def add(self, selection: Selection, tasks: Sequence[str], presence: Tensor, pool_size: int) -> None:
        """Count the selection of one batch.

        Args:
            tasks: whose pools each row used, B names.
            presence: bool B×2 (image, text).
            pool_size: E.
        """
        chosen = {
            ("image", "A"): selection.image_a, ("image", "B"): selection.image_b,
            ("text", "A"): selection.text_a, ("text", "B"): selection.text_b,
        }  # fmt: skip
        visible = presence.tolist()
        for column, modality in enumerate(("image", "text")):
            groups: dict[tuple[str, bool], list[int]] = {}
            for row, task in enumerate(tasks):
                groups.setdefault((task, visible[row][column]), []).append(row)
            for (task, present), rows in groups.items():
                index = torch.tensor(rows, device=presence.device)
                for part in ("A", "B"):
                    counted = _histogram(chosen[modality, part].index_select(0, index), pool_size)
                    key = (task, modality, present, part)
                    self.counts[key] = self.counts[key] + counted if key in self.counts else counted
                    self.rows[key] = self.rows.get(key, 0) + len(rows)

    def take(self) -> list[dict[str, Any]]:
        """Everything counted, as JSON holds it, and start anew: `task`, `modality`, `present`, `part`, `rows`
        and `counts` (a list of E for each linear)."""
        names = ("task", "modality", "present", "part")
        pools = [
            {**dict(zip(names, key, strict=True)), "rows": self.rows[key], "counts": counts.tolist()}
            for key, counts in sorted(self.counts.items())
        ]
        self.counts, self.rows = {}, {}
        return pools


def _histogram(index: Tensor, pool_size: int) -> Tensor:
    """B×S×r positions as S×E counts."""
    flat = index.transpose(0, 1).flatten(1)
    return flat.new_zeros(len(flat), pool_size).scatter_add_(1, flat, torch.ones_like(flat))
