"""The mathematics of PCLR's rank pool, as pure functions: who is chosen, who is dropped, what knows a task.

A rank has two keys, of the words and of the image, and a query has two parts: N×2×d and B×2×d, every part of
length one, or zero where there is nothing. Specification: newer methods, section 3.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

#: Decimals of a score that count: ranks of one task share a key, and their order must not hang on rounding.
DECIMALS = 9


def unit(vectors: Tensor) -> Tensor:
    """Every vector of the last dimension at length one; zero stays zero. Float64."""
    return F.normalize(vectors.double(), dim=-1)


def scores(queries: Tensor, keys: Tensor, image_weight: float) -> Tensor:
    """q_l·κ_l + image_weight · q_v·κ_v: B×N, float64."""
    words, images = (queries[:, part].double() @ keys[:, part].double().T for part in (0, 1))
    return (words + image_weight * images).round(decimals=DECIMALS)


def chosen(found: Tensor, count: int) -> Tensor:
    """A mask of the `count` best of every row (B×N, bool); ties go to the lower index; at most all."""
    best = found.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(found, dtype=torch.bool).scatter_(1, best, True)


def dropped(ranks: int, count: int) -> Tensor:
    """A mask of `count` of `ranks`, evenly spread: every skip-th, where skip = ranks / count is whole."""
    place = torch.arange(ranks + 1) * count // max(1, ranks)
    return place.diff() > 0


def student_keys(keys: Tensor, queries: Tensor, count: int, image_weight: float) -> Tensor:
    """Keys of what a compressed pool keeps: to each, the queries of the tasks are added for which it is among
    the `count` best. So those who stand in for dropped ranks are found by their task.

    Args:
        keys: of the ranks that stay, N×2×d; queries: of the tasks, T×2×d.
    """
    stands = chosen(scores(queries, keys, image_weight), count).double()
    return unit(keys.double() + torch.einsum("tn,tpd->npd", stands, queries.double()))


def drawn_task(losses: Tensor, seed: int) -> int:
    """A task, with probability in proportion to √(loss + 1e-4); the same on every rank."""
    chance = (losses.double().cpu() + 1e-4).sqrt()
    draw = torch.Generator().manual_seed(seed)
    return int(torch.multinomial(chance / chance.sum(), 1, generator=draw))


def distil_sum(teacher: Tensor, student: Tensor, top: int) -> Tensor:
    """Σ KL(p ‖ q) over answer tokens, p ∝ √softmax of the teacher over its `top` largest logits, q the same
    of the student over the same entries.

    Args:
        teacher, student: N×V, logits of the N answer tokens.
    """
    wanted, entries = teacher.float().topk(min(top, teacher.shape[-1]), dim=-1)
    p = (wanted / 2).log_softmax(-1)
    q = (student.float().gather(-1, entries) / 2).log_softmax(-1)
    return F.kl_div(q, p, reduction="sum", log_target=True)
