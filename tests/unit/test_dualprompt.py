"""DualPrompt: prefixes and keys against loops in float64, and the choice of a task."""

from typing import Any

import pytest
import torch
from contract_support import Bench, items, story
from prompts_support import Built, queries, unit, view_cosine

from delo_llava.adapters.carrier import frozen_queries
from delo_llava.errors import DeloError
from delo_llava.features.inputs import RouteInputs
from delo_llava.methods._prompts import Layout, prompts_of, share_of
from delo_llava.methods.base import Past, Stage

PRESENCE = [(True, True), (False, True), (True, False)]


@pytest.fixture(scope="module")
def built() -> Built:
    """At the start of a second stage: two experts."""
    told = story("dualprompt")
    one = Built("dualprompt")
    torch.manual_seed(1)
    past = {"task0": Past(told.trained[0].folder, told.stages[0].tasks)}
    one.model = one.method.begin(one.bench.base(), Stage(1, "task1", past=past))
    return one


def test_rows_read_the_general_prompt_and_the_one_of_their_task(built: Built) -> None:
    asked, held = queries(PRESENCE), built.held()
    tasks = ["task1", "task0", "task1"]
    plan = built.plan(asked, PRESENCE, tasks)
    assert list(plan.keys) == [0, 1], "general at the first layer, expert behind it"
    for row, task in enumerate(tasks):
        place = int(task[-1])
        for part, found in enumerate((plan.keys, plan.values)):
            assert torch.equal(found[0][row], held["general"]["prompts"][0, 0, part])
            assert torch.equal(found[1][row], held["expert"]["prompts"][place, 0, part])
        score = view_cosine(asked, row, held["expert"]["keys"][place])
        assert float(plan.terms["pull"][row]) == pytest.approx(1 - score, abs=1e-6)


def test_training_reads_its_own_expert_whatever_the_keys_say(built: Built) -> None:
    own = built.plan(queries(PRESENCE), PRESENCE)
    wanted = built.held()["expert"]["prompts"][1, 0, 0]
    assert all(torch.equal(row, wanted) for row in own.keys[1])


def test_a_sample_is_answered_by_the_task_of_the_nearest_key() -> None:
    told = story("dualprompt")
    model = told.bench.loaded(told.past(2))
    prompts, method = prompts_of(model), told.bench.method
    keys: Any = prompts.earlier["expert"].keys
    keys.copy_(unit(*keys.shape))
    batch = told.bench.batch(items("task0"), generation=True)
    asked = frozen_queries(model, RouteInputs.from_batch(batch), batch.inputs)
    choice: Any = method.choose(model, batch)
    for row in range(4):
        scores = [view_cosine(asked, row, key) for key in keys]
        assert choice.scores[row].tolist() == pytest.approx(scores, abs=1e-6)
        assert int(choice.index[row]) == scores.index(max(scores))
    sighted: Any = method.choose(model, batch, ("image",))
    assert float(sighted.scores[2].abs().max()) == 0.0, "the third row has no image"
    assert [index < 0 for index in sighted.index.tolist()] == [False, False, True, False], "nothing speaks"
    with method.answering(model, batch, None) as prompt, torch.no_grad():
        unasked = model(**prompt.inputs).logits
    chosen = [choice.tasks[i] for i in choice.index.tolist()]
    with method.answering(model, batch, chosen) as prompt, torch.no_grad():
        assert torch.equal(unasked, model(**prompt.inputs).logits)
    with (
        pytest.raises(DeloError, match="No expert prompt"),
        method.answering(model, batch, ["x"] * 4) as prompt,
    ):
        model(**prompt.inputs)


def test_a_key_starts_at_the_mean_query_and_is_drawn_to_it() -> None:
    from method_support import Given, alone

    built = Built("dualprompt")
    rows = [items("task0")[:3], items("task0")[3:]]
    batches = [built.bench.batch(part) for part in rows]
    built.method.prepare(built.model, Given(batches), alone)
    parts = [frozen_queries(built.model, RouteInputs.from_batch(b), b.inputs) for b in batches]
    for view in range(3):
        total = torch.cat([part[view] for part in parts]).double().sum(0)
        key = prompts_of(built.model).trained["expert"].keys[0, view]
        assert torch.allclose(key.double(), total / total.norm(), atol=1e-6)


def test_keys_and_experts_of_earlier_tasks_stay() -> None:
    told = story("dualprompt")
    ends = [{n: t for n, t in done.end.items() if "expert" in n} for done in told.trained]
    held = prompts_of(told.trained[1].model).earlier["expert"]
    for name, tensor in ends[0].items():
        assert torch.equal(getattr(held, name.rpartition(".")[2]), tensor)
    general = "prompts.trained.general.prompts"
    assert torch.equal(told.trained[0].end[general], told.trained[1].start[general])
    assert not torch.equal(told.trained[1].end[general], told.trained[1].start[general])


def test_layers_are_shares_of_the_depth() -> None:
    assert [share_of(1 / 6, n) for n in (2, 4, 12, 32)] == [1, 1, 2, 5]
    base = Bench("dualprompt").base()
    assert Layout.of(base, 5, 1 / 4, after=1).layers == 1
    with pytest.raises(DeloError, match="too few layers"):
        Layout.of(base, 5, 1 / 4, after=2)
