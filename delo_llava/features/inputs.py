"""What must be known of a batch, besides the model's own inputs, to make frozen queries and decisions from
them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from delo_llava.errors import DeloError
from delo_llava.features.queries import Queries

#: From queries and presence (bool B×2) to the task of each row.
Chooser = Callable[[Queries, Tensor], Sequence[str]]


@dataclass(frozen=True)
class RouteInputs:
    """What routing must know of a batch besides the model's own inputs.

    Attributes:
        input_ids: B×S; segments: uint8 B×S (see `queries`); presence: bool B×2 (image, text), as the data
            says.
        image_rows: int64 N, batch row of each image that goes through the tower.
        image_units: int64 N, entries of each image along dimension 0 of the projector's output.
        image_kept: bool, which of the projector's outputs, in order, the language model sees; None: all. It
            has no default: without it, queries of letterboxed pictures are wrong and nothing fails.
        tasks: one task for all rows, or one per row, or None for the active adapter.
        choose: picks the tasks from frozen queries instead; used when `tasks` is None.
        expand: beams per row, for `generate`, which repeats rows.
        queries: an encoder's, which stand in for those from the base's own features.
    """

    input_ids: Tensor
    segments: Tensor
    presence: Tensor
    image_rows: Tensor
    image_units: Tensor
    image_kept: Tensor | None
    tasks: str | Sequence[str] | None = None
    choose: Chooser | None = None
    expand: int = 1
    queries: Queries | None = None

    def __post_init__(self) -> None:
        rows = len(self.input_ids)
        if self.segments.shape != self.input_ids.shape or self.presence.shape != (rows, 2):
            shapes = (
                f"{tuple(self.input_ids.shape)}, {tuple(self.segments.shape)}, {tuple(self.presence.shape)}"
            )
            raise DeloError(
                "input_ids, segments and presence disagree on the batch",
                given=shapes,
                fix="take all three from one Batch",
            )
        if self.tasks is not None and not isinstance(self.tasks, str) and len(self.tasks) != rows:
            raise DeloError("There must be one task per row", given=f"{len(self.tasks)} tasks, {rows} rows")
        if len(self.image_rows) != len(self.image_units):
            raise DeloError(
                "Each image needs a row and a number of units",
                given=f"{len(self.image_rows)}, {len(self.image_units)}",
            )

    @classmethod
    def from_batch(cls, batch: Any, **options: Any) -> "RouteInputs":
        """From a collated batch; `options` are `tasks`, `choose`, `expand` and `queries`."""
        fields = ("segments", "presence", "image_rows", "image_units", "image_kept")
        return cls(batch.inputs["input_ids"], *(getattr(batch, name) for name in fields), **options)

    def image_lengths(self, tokens: int) -> list[int]:
        """How many of a projector tensor's `tokens` (all its dimensions but the last) are each image's.

        Raises:
            DeloError: units and tokens cannot belong together.
        """
        units = self.image_units.tolist()
        whole = sum(units)
        if tokens % whole if whole else tokens:
            raise DeloError(
                "image_units does not add up to the projector's output",
                given=f"{whole} units and {tokens} tokens",
            )
        return [count * (tokens // whole) for count in units]

    @property
    def rows(self) -> int:
        """Number of rows, beams included."""
        return len(self.input_ids) * self.expand
