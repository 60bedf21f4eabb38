"""Logits and loss of the answers' tokens alone.

A loss over answers reads the logits of 5 to 20 in a hundred positions, and logits are the largest tensors of
a step (8 rows of 640 tokens at 152,000 words: 3.1 GB in fp32). So the output head is shown only the positions
whose next token is trained. That is done by a hook on the head, whatever the family and the version of
transformers: `logits_to_keep` takes positions of single rows in some of them only.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from delo_llava.backbones.base import unwrapped
from delo_llava.data.collate import IGNORE, Batch
from delo_llava.errors import DeloError


def at_answers(states: Tensor, labels: Tensor) -> Tensor:
    """What stands where the next token is trained, row by row: N×d.

    Args:
        states: B×S×d, one vector for each position.
        labels: B×S, `IGNORE` where not trained.
    """
    return states[:, :-1][labels[:, 1:] != IGNORE]


def answer_logits(model: nn.Module, batch: Batch) -> Tensor:
    """N×V: the logits that predict the N trained tokens of a batch, row by row, from one forward with
    `batch.inputs`; N is zero where nothing is trained, and the gradient is zero then.

    Args:
        model: a base with or without adapters; whatever else it needs (`routing`) is there already.

    Raises:
        DeloError: its output head is not called once, with a state for every position of the labels.
    """
    labels = batch.labels
    assert labels is not None
    shown: list[torch.Size] = []

    def only_answers(head: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor]:
        [states] = given
        shown.append(states.shape[:-1])
        return ((at_answers(states, labels) if shown == [labels.shape] else states[..., :0, :]).unsqueeze(0),)

    inner: Any = unwrapped(model)
    hook = inner.get_output_embeddings().register_forward_pre_hook(only_answers)
    try:
        logits: Tensor = model(**batch.inputs).logits
    finally:
        hook.remove()
    if shown != [labels.shape]:
        raise DeloError(
            "The model's output head does not see every position once, so the answers' cannot be taken out",
            given=f"{type(inner).__name__}: {[tuple(s) for s in shown]}, labels {tuple(labels.shape)}",
            allowed=["one call with B×S×d"],
            fix="take `model(**batch.inputs).logits` and `at_answers` in the method's `loss_sums`",
        )
    return logits[0]


def answer_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed next-token cross-entropy over the trained tokens.

    Args:
        logits: N×V, of the N trained tokens as `answer_logits` gives them.
        labels: B×S, `IGNORE` where not trained.
    """
    trained = labels[:, 1:] != IGNORE
    each = F.cross_entropy(logits.float(), labels[:, 1:][trained], reduction="none")
    # Added up where they stand in the batch: the sum is then that over all positions, to the last bit.
    placed = each.new_zeros(trained.shape).masked_scatter(trained, -each).view(-1, 1)
    return F.nll_loss(placed, torch.where(trained, 0, IGNORE).flatten(), reduction="sum", ignore_index=IGNORE)
