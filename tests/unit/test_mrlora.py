"""MR-LoRA: experts that never meet, a router that says letters, and what it is trained on."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from contract_support import Bench, examples, items, story
from method_support import START, Given, alone
from torch import Tensor

from delo_llava.adapters.carrier import routing
from delo_llava.adapters.lowrank import lowrank
from delo_llava.data.collate import IGNORE, BatchView
from delo_llava.data.examples import Item
from delo_llava.errors import DeloError
from delo_llava.features.inputs import RouteInputs
from delo_llava.methods.base import Clock
from delo_llava.methods.mrlora import ROUTE, ROUTER

ROWS = [*items("task0"), *items("task1")[:2]]
TASKS = ("task0", "task1")


def ready(stages: int = 2) -> tuple[Bench, Any, Any]:
    """The model that answers after some stages, with its method."""
    told, bench = story("mrlora"), Bench("mrlora")
    return bench, bench.loaded(told.past(stages)), bench.method


def begun(stage: int = 0) -> tuple[Bench, Any, Any]:
    """A stage before its first step, with what it learns from."""
    told, bench = story("mrlora"), Bench("mrlora")
    past = {name: examples(name) for name in TASKS[:stage]}
    bench.method.mixture(told.stages[stage], examples(TASKS[stage]), past)
    return bench, bench.begin(told.stages[stage]), bench.method


def outputs(model: Any, batch: Any, who: Any) -> list[tuple[Any, Tensor, Tensor]]:
    """(layer, input, output) of every adapted linear; the frozen pass through the projector comes first."""
    found: dict[str, tuple[Any, Tensor, Tensor]] = {}
    layers = sum(lowrank(model).layers(), start=list[Any]())
    hooks = [m.register_forward_hook(lambda m, a, y: found.__setitem__(m.name, (m, a[0], y))) for m in layers]
    with torch.no_grad(), routing(model, RouteInputs.from_batch(batch, tasks=who)):
        model(**batch.inputs)
    for hook in hooks:
        hook.remove()
    return list(found.values())


@pytest.mark.parametrize("who", [["task0", "task1", "task1", "task0", "router", "task0"], ["task1"] * 6])
def test_every_row_has_one_adapter_alone(who: list[str]) -> None:
    """With the true letters, that is a LoRA for each task."""
    bench, model, _ = ready()
    batch = bench.batch(ROWS)
    other = 0
    for layer, x, y in outputs(model, batch, who):
        base = layer.base_layer(x).double()
        for n in range(len(x)):
            name = who[int(batch.image_rows[n]) if layer.projector else n]
            a, b = (t.double() for t in layer.pair(name))
            added = layer.scale[name] * x[n].double() @ a.T @ b.T
            torch.testing.assert_close(y[n].double(), base[n] + added, rtol=0, atol=2e-5)
            other += not torch.allclose(y[n].double(), base[n], atol=1e-3)
    assert other


# ---- what the router learns ----
def test_the_router_sees_remembered_records_of_every_task_so_far_with_their_letters() -> None:
    _, _, method = begun(1)
    kept = {(record.task, record.id) for record, _ in method._samples}
    assert len(kept) == 6 and {task for task, _ in kept} == set(TASKS)
    seen = set()
    for step in range(20):
        view = method.views(items("task1"), Clock(step, 100, 10))[ROUTE]
        assert view.rows == (0, 1, 2, 3)
        for record, has in view.items:
            assert (record.task, record.id) in kept
            assert record.answer == {"task0": "A", "task1": "B"}[record.task]
            assert record.instruction.endswith("A: task0\nB: task1\nAnswer with the letter.")
            original = next((r, h) for r, h in method._samples if r.id == record.id and r.task == record.task)
            assert record.instruction.startswith(original[0].instruction) and has == original[1]
            seen.add((record.task, record.id))
    assert seen == kept, "all of them come"


def test_what_a_row_draws_does_not_depend_on_its_micro_batch() -> None:
    _, _, method = begun(1)
    rows = items("task1")
    whole = method.views(rows, START)[ROUTE].items
    parts = [item for row in rows[::-1] for item in method.views([row], START)[ROUTE].items]
    assert parts[::-1] == list(whole)
    assert method.views(rows, Clock(1, 100, 10))[ROUTE].items != whole, "and another step draws anew"


def test_a_task_that_is_not_trained_yet_is_not_listed() -> None:
    _, _, method = begun(0)
    [(record, _)] = method.views(items("task0")[:1], START)[ROUTE].items
    assert "B:" not in record.instruction and "task1" not in record.instruction


def test_each_loss_trains_its_own_adapter() -> None:
    bench, model, method = begun(1)
    batch = bench.batch(items("task1"))
    batch.views = {ROUTE: viewed(bench, method, items("task1"))}
    assert method.counts(batch)[ROUTE] == float((batch.views[ROUTE].batch.labels[:, 1:] != IGNORE).sum())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    losses = method.loss_sums(model, batch)
    for name, own, other in (("answer", ".task1.", f".{ROUTER}."), (ROUTE, f".{ROUTER}.", ".task1.")):
        found = torch.autograd.grad(
            losses[name], list(trained.values()), allow_unused=True, retain_graph=True
        )
        moved = {n for n, g in zip(trained, found, strict=True) if g is not None and bool((g != 0).any())}
        assert moved and all(own in n for n in moved) and not any(other in n for n in moved)


def viewed(bench: Bench, method: Any, rows: list[Item]) -> Any:
    """The collated view of some rows."""

    view = method.views(rows, START)[ROUTE]
    return BatchView(torch.tensor(view.rows), bench.batch(list(view.items)))


def test_the_router_may_have_a_rate_of_its_own() -> None:
    told, bench = story("mrlora"), Bench("mrlora", router_lr=1e-3)
    model = bench.begin(told.stages[0])
    groups = bench.method.groups(model, bench.config.train)
    names = {id(p): n for n, p in model.named_parameters()}
    peaks = {names[id(p)]: group["peak"] for group in groups for p in group["params"]}
    assert len(peaks) == sum(p.requires_grad for p in model.parameters())
    assert all((peak == 1e-3) == (f".{ROUTER}." in name) for name, peak in peaks.items())


# ---- the choice ----
def letters_of(bench: Bench) -> dict[str, int]:
    """Token ids of the letters as answers are written, by hand."""
    batch = bench.batch([(ROWS[0][0], (False, False))])
    assert batch.again is not None and batch.labels is not None
    found = {}
    for letter in "AB":
        labels = batch.again([(replace(ROWS[0][0], answer=letter), (False, False))]).labels
        assert labels is not None
        found[letter] = int(labels[labels != IGNORE][0])
    return found


def test_a_choice_is_the_letter_that_is_said_first() -> None:
    bench, model, method = ready()
    ids = letters_of(bench)
    assert method._ids.tolist() == [ids["A"], ids["B"]] and ids["A"] != ids["B"]
    batch = bench.batch(ROWS, generation=True)
    choice = method.choose(model, batch)
    asked = [method._asked(item) for item in ROWS]
    for row, item in enumerate(asked):
        one = bench.batch([item], generation=True)
        with torch.no_grad(), routing(model, RouteInputs.from_batch(one, tasks=ROUTER)):
            logits = model(**one.inputs).logits[0, -1].double()
            said = model.generate(**one.inputs, max_new_tokens=1, do_sample=False)[0, -1]
        expected = logits.log_softmax(-1)[[ids["A"], ids["B"]]]
        torch.testing.assert_close(choice.scores[row], expected, rtol=0, atol=1e-4)
        legal = int(said) in ids.values()
        assert choice.voided[row] == (not legal)
        assert int(choice.index[row]) == (int(expected.argmax()) if legal else -1)


def test_a_choice_does_not_hang_on_an_answer_that_stands_there() -> None:
    """As where given answers are weighed: rows end with an answer and pad on the right."""
    bench, model, method = ready()
    asked, answered = (method.choose(model, bench.batch(ROWS, generation=g)) for g in (True, False))
    torch.testing.assert_close(asked.scores, answered.scores, rtol=0, atol=1e-4)
    assert asked.voided == answered.voided


@pytest.mark.parametrize("word", ["legal", "illegal"])
def test_a_letter_that_is_no_task_s_is_no_choice(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """However much likelier one legal letter is than the others."""
    bench, model, method = ready()
    said = {"legal": int(method._ids[1]), "illegal": int(method._ids[1]) + 1}[word]

    def loud(module: Any, args: Any, output: Any) -> Any:
        output.logits[:, -1, said] += 100
        output.logits[:, -1, method._ids[1]] += 50
        return output

    hook = model.register_forward_hook(loud)
    choice = method.choose(model, bench.batch(ROWS, generation=True))
    hook.remove()
    assert choice.voided == [word == "illegal"] * 6
    assert choice.index.tolist() == [-1 if word == "illegal" else 1] * 6
    assert bool((choice.scores[:, 1] > choice.scores[:, 0]).all())


def test_without_the_instruction_the_router_is_not_shown_it() -> None:
    _, _, method = begun(1)
    record, has = method._asked(ROWS[0], ("image", "text"))
    assert ROWS[0][0].instruction not in record.instruction and has == ROWS[0][1]
    _, has = method._asked(ROWS[0], ("instruction", "text"))
    assert has == (False, True)


def test_letters_are_known_on_every_rank() -> None:
    """Of two ranks, one has the example that they are read from."""
    bench, model, method = begun(1)
    method.finish(model, Given([bench.batch(items("task1")[:1])]), alone)
    whole = method._ids.clone()
    parts: list[Tensor] = []
    method.finish(model, Given([bench.batch(items("task1")[:1])]), lambda t: parts.append(t) or t)
    method.finish(model, Given(), lambda t: parts[0] + t)
    assert torch.equal(method._ids, whole) and whole.tolist() == list(letters_of(bench).values())
    doubled: Any = Given([bench.batch(items("task1")[:1])])
    method.finish(model, doubled, lambda t: 2 * t)
    assert torch.equal(method._ids, whole)


def test_what_cannot_be_listed_is_refused() -> None:
    class Many:
        names = tuple(f"t{i}" for i in range(27))

    class Taken:
        names = ("a", ROUTER)

    method: Any = Bench("mrlora").method
    with pytest.raises(DeloError, match="more tasks than letters"):
        method.stages(Many())
    with pytest.raises(DeloError, match="router's name"):
        method.stages(Taken())
