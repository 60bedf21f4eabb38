"""Cross-modal maps and the auxiliary losses, against float64 references (5.2, 6)."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from delo_llava.errors import DeloError
from delo_llava.features.queries import Queries
from delo_llava.features.ridge import RidgeStatistics
from delo_llava.methods._answers import at_answers
from delo_llava.methods.delo.cross_modal import CrossModal
from delo_llava.methods.delo.losses import align_loss_sum, consistency_loss_sum

D = 5


def pairs(rows: int, seed: int = 0) -> tuple[Queries, torch.Tensor]:
    """Text queries that are a noisy rotation of image queries."""
    draw = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(9))).Q
    image = F.normalize(torch.randn(rows, D, generator=draw), dim=1)
    text = F.normalize(image @ turn + 0.05 * torch.randn(rows, D, generator=draw), dim=1)
    return Queries(image, text, torch.zeros(rows, D)), torch.ones(rows, 2, dtype=torch.bool)


@pytest.mark.parametrize("target", ["image", "text"])
def test_ridge_against_augmented_least_squares(target: str) -> None:
    queries, presence = pairs(30)
    presence[::4, 0] = False
    statistics = RidgeStatistics.empty(D)
    statistics.observe(queries, presence)
    weight, offset = statistics.solve(target, 0.1)
    keep = presence.all(1)
    x, y = (
        q[keep].double()
        for q in ((queries.text, queries.image) if target == "image" else (queries.image, queries.text))
    )
    xc, yc = x - x.mean(0), y - y.mean(0)
    ridge = 0.1 * (xc.T @ xc).diagonal().mean()
    stacked = (
        torch.cat([xc, ridge.sqrt() * torch.eye(D, dtype=torch.float64)]),
        torch.cat([yc, torch.zeros(D, D, dtype=torch.float64)]),
    )
    expected = torch.linalg.lstsq(*stacked).solution
    torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(offset.double(), y.mean(0) - x.mean(0) @ expected, rtol=0, atol=1e-6)


def test_ridge_statistics_add_up_over_tasks_and_survive_files(tmp_path: Path) -> None:
    parts = [RidgeStatistics.empty(D) for _ in range(2)]
    whole = RidgeStatistics.empty(D)
    for seed, part in enumerate(parts):
        part.observe(*pairs(20, seed))
        whole.observe(*pairs(20, seed))
    merged = parts[0].merge(parts[1])
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(merged.tensors()[name], tensor, rtol=0, atol=1e-12)
    whole.save(tmp_path)
    found = RidgeStatistics.load(tmp_path)
    assert torch.equal(found.count, whole.count) and torch.equal(found.sums, whole.sums)
    for target in ("image", "text"):  # moments have 16 bits in a file
        torch.testing.assert_close(
            found.solve(target, 0.1)[0], whole.solve(target, 0.1)[0], rtol=0, atol=2e-4
        )
    found.save(tmp_path)  # nothing drifts from stage to stage
    torch.testing.assert_close(RidgeStatistics.load(tmp_path).products, found.products, rtol=0, atol=1e-12)
    with pytest.raises(DeloError, match="are missing"):
        RidgeStatistics.load(tmp_path / "nowhere")
    with pytest.raises(DeloError, match="complete samples"):
        RidgeStatistics.empty(D).solve("image", 0.1)


def test_ridge_map_recovers_the_other_modality() -> None:
    queries, presence = pairs(200)
    statistics = RidgeStatistics.empty(D)
    statistics.observe(queries, presence)
    ridge, identity = CrossModal("ridge", D, 2), CrossModal("identity", D, 2)
    test, there = pairs(50, 7)
    missing_image = there & torch.tensor([False, True])
    start = ridge(test, missing_image).image
    torch.testing.assert_close(start, identity(test, missing_image).image)
    ridge.fit(statistics, 1e-3)
    closeness = F.cosine_similarity(ridge(test, missing_image).image, test.image).mean()
    assert closeness > 0.97 > F.cosine_similarity(start, test.image).mean()
    assert F.cosine_similarity(ridge(test, there & torch.tensor([True, False])).text, test.text).mean() > 0.97
    assert not list(ridge.parameters()) and len(ridge.state_dict()) == 4
    with pytest.raises(DeloError, match="closed form"):
        identity.fit(statistics, 0.1)


def test_learned_map_starts_as_the_identity_and_learns() -> None:
    torch.manual_seed(0)
    learned = CrossModal("linear", D, 3)
    queries, presence = pairs(40)
    missing = presence & torch.tensor([False, True])
    torch.testing.assert_close(learned(queries, missing).image, queries.text)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.05)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (1 - F.cosine_similarity(learned(queries, presence).proxy_image, queries.image)).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_align_loss() -> None:
    """½ Σ_m (1 − cos) over complete rows; no complete row is a zero with a gradient."""
    latents, proxies = (
        [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)] for _ in range(2)
    )
    complete = torch.tensor([True, False, True, False])
    expected = 0.0
    for i in (0, 2):
        for z, p in zip(latents, proxies, strict=True):
            expected += 0.5 * (1 - (z[i] @ p[i]) / (z[i].norm() * p[i].norm())).item()
    loss = align_loss_sum(tuple(latents), tuple(proxies), complete)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    none = align_loss_sum(tuple(latents), tuple(proxies), torch.zeros(4, dtype=torch.bool))
    none.backward()
    assert none.item() == 0 and not latents[0].grad.any()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_consistency_loss(temperature: float) -> None:
    """KL(teacher ‖ student) token by token; sequences of different length, answers at different places."""
    teacher, student = (
        torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True),
    )
    labels_t = torch.tensor([[-100, -100, -100, 2, 3, -100], [-100, -100, -100, -100, 4, -100]])
    labels_s = torch.tensor([[-100, 2, 3, -100], [-100, -100, -100, 4]])
    expected = 0.0
    for t, s in (
        ((0, 2), (0, 0)),
        ((0, 3), (0, 1)),
        ((1, 3), (1, 2)),
    ):  # logits that predict the labelled token
        p, q = (x.detach()[i].div(temperature).softmax(0) for x, i in ((teacher, t), (student, s)))
        expected += temperature**2 * (p * (p / q).log()).sum().item()
    told, said = at_answers(teacher, labels_t), at_answers(student, labels_s)
    loss = consistency_loss_sum(told, labels_t, said, labels_s, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    with pytest.raises(DeloError, match="same records"):
        consistency_loss_sum(told, labels_t, said, labels_s.flip(0))
    with pytest.raises(DeloError, match="same records"):
        consistency_loss_sum(told, labels_t, at_answers(student[:1], labels_s[:1]), labels_s[:1])
