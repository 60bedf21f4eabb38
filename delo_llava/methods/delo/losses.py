"""The auxiliary losses: alignment of the two modalities in the router, consistency between complete and
incomplete views (specification 6)."""

from torch import Tensor
from torch.nn import functional as F

from delo_llava.errors import DeloError


def align_loss_sum(
    latents: tuple[Tensor, Tensor], proxies: tuple[Tensor, Tensor], complete: Tensor
) -> Tensor:
    """Σ over complete rows of ½·Σ_m (1 − cos(z_m(φ(q_m̄)), z_m(q_m))).

    Args:
        latents: router latents of the image and of the text query, B×latent.
        proxies: latents of what φ makes of the other modality's query, image and text.
        complete: bool B, rows with both modalities.

    Returns:
        A scalar; divide by the number of complete rows for the mean. Zero, with a gradient of zero, when
        there is none.
    """
    terms = sum(
        1 - F.cosine_similarity(proxy, latent, dim=-1) for proxy, latent in zip(proxies, latents, strict=True)
    )
    return (terms * complete).sum() / 2


def consistency_loss_sum(
    teacher_logits: Tensor,
    teacher_labels: Tensor,
    student_logits: Tensor,
    student_labels: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Σ over answer tokens of KL(teacher ‖ student); the teacher saw the complete view and gets no gradient.

    Args:
        teacher_logits, teacher_labels: N×V of the N answer tokens and B×S (−100 where not trained), of the
            complete rows.
        student_logits, student_labels: N×V and B×S' of the same rows with one modality dropped; lengths may
            differ.
        temperature: softens both; the loss is scaled by its square.

    Raises:
        DeloError: when the views' answers are not the same tokens, row by row.
    """
    teacher_mask, student_mask = teacher_labels[:, 1:] != -100, student_labels[:, 1:] != -100
    same_counts = (
        bool((teacher_mask.sum(1) == student_mask.sum(1)).all())
        if len(teacher_mask) == len(student_mask)
        else False
    )
    if not same_counts or not bool(
        (teacher_labels[:, 1:][teacher_mask] == student_labels[:, 1:][student_mask]).all()
    ):
        raise DeloError(
            "Teacher and student must answer the same records in the same order",
            given=f"{int(teacher_mask.sum())} and {int(student_mask.sum())} answer tokens",
            fix="select the teacher's rows by dropped_rows",
        )
    target = F.log_softmax(teacher_logits.detach().float() / temperature, -1)
    guess = F.log_softmax(student_logits.float() / temperature, -1)
    return F.kl_div(guess, target, reduction="sum", log_target=True) * temperature**2
