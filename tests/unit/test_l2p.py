"""L2P: choice and prefixes against loops in float64, and what must not move or leak."""

from typing import Any

import pytest
import torch
from contract_support import Bench, items, story
from prompts_support import HEADS, LAYERS, Built, queries, view_cosine

from delo_llava.methods._prompts import prompts_of
from delo_llava.methods.base import Stage
from delo_llava.methods.l2p import METHOD, nearest

PRESENCE = [(True, True), (False, True), (True, False), (False, False)]
SIZE, CHOSEN, LENGTH = 6, 2, 3


@pytest.fixture(scope="module")
def built() -> Built:
    return Built("l2p", pool_size=SIZE, chosen=CHOSEN, length=LENGTH)


def test_prefixes_are_those_of_the_nearest_keys(built: Built) -> None:
    asked, pool = queries(PRESENCE), built.held()["pool"]
    plan = built.plan(asked, PRESENCE)
    assert plan.keys.keys() == plan.values.keys() == set(range(LAYERS))
    for row in range(len(PRESENCE)):
        scores = [view_cosine(asked, row, key) for key in pool["keys"]]
        chosen = sorted(range(SIZE), key=lambda i: -scores[i])[:CHOSEN]
        assert float(plan.terms["pull"][row]) == pytest.approx(sum(1 - scores[i] for i in chosen), abs=1e-6)
        for layer in range(LAYERS):
            for part, found in enumerate((plan.keys, plan.values)):
                for head in range(HEADS):
                    wanted = torch.cat([pool["prompts"][i, layer, part, head] for i in chosen])
                    assert torch.equal(found[layer][row, head], wanted)


def test_a_row_chooses_alone_unless_a_vote_is_asked_for() -> None:
    scores = torch.tensor([[9.0, 8, 1, 0], [9.0, 1, 8, 0], [0.0, 1, 8, 9]])
    assert nearest(scores, 2, vote=False).tolist() == [[0, 1], [0, 2], [3, 2]]
    assert nearest(scores, 2, vote=True).tolist() == [[0, 2]] * 3
    assert nearest(scores[:1], 2, vote=True).tolist() == [[0, 1]], "the vote depends on a row's company"


def test_the_vote_is_marked() -> None:
    assert not Bench("l2p").method.capabilities.transductive and not METHOD.capabilities.transductive
    assert Bench("l2p", transductive=True).method.capabilities.transductive


def test_what_is_chosen_learns_and_the_rest_keeps_its_bits_under_weight_decay(tmp_path: Any) -> None:
    words = ("--train.weight_decay=0.5",)
    bench = Bench("l2p", "llava", "none", *words, pool_size=SIZE, chosen=CHOSEN, length=LENGTH)
    done = bench.train(bench.stages()[0], tmp_path / "stage")
    prompts, keys = (f"prompts.trained.pool.{name}" for name in ("prompts", "keys"))
    moved = [
        [not torch.equal(before, after) for before, after in zip(done.start[n], done.end[n], strict=True)]
        for n in (prompts, keys)
    ]
    assert moved[0] == moved[1] and CHOSEN <= sum(moved[0]) < SIZE
    parts = (done.start[prompts] != done.end[prompts])[torch.tensor(moved[0])]
    assert parts.flatten(4).any(-1).all(), "keys and values of every layer and head"


def test_keys_learn_from_the_pull_alone(built: Built) -> None:
    """Gates are constants: without the term, keys would never move."""
    batch = built.bench.batch(items("task0"))
    sums = built.method.loss_sums(built.model, batch)
    pool = prompts_of(built.model).trained["pool"]
    by_answer, by_pull = (
        torch.autograd.grad(sums[term], [pool.prompts, pool.keys], allow_unused=True, retain_graph=True)
        for term in ("answer", "pull")
    )
    assert by_answer[1] is None and by_pull[0] is None
    assert float(by_answer[0].abs().max()) > 0 and float(by_pull[1].abs().max()) > 0
    assert built.method.counts(batch)["pull"] == 4.0


def test_a_filler_counts_nothing(built: Built) -> None:
    batch: Any = built.bench.batch(items("task0")[:1])
    batch.filler = True
    assert float(built.method.loss_sums(built.model, batch)["pull"].detach()) == 0.0
    assert built.method.counts(batch)["pull"] == 0.0


def test_the_pool_is_one_for_all_tasks_and_can_match_another_method() -> None:
    told = story("l2p")
    first, second = told.trained
    assert {n: t.shape for n, t in first.end.items()} == {n: t.shape for n, t in second.end.items()}
    assert all(torch.equal(first.end[n], second.start[n]) for n in first.end)

    def trained(name: str, **options: Any) -> int:
        model = Bench(name, **options).begin(Stage(0, "task0"))
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    matched = trained("l2p", pool_size="match", chosen=1)
    each = trained("l2p", pool_size=2, chosen=1) - trained("l2p", pool_size=1, chosen=1)
    assert abs(matched - trained("delo")) <= each / 2


def test_a_choice_larger_than_the_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="chosen 3 is larger than pool_size 2"):
        METHOD.Config(pool_size=2, chosen=3)
