"""MissRAG: what is missing comes from the nearest remembered record by what is there; by plain loops."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from contract_support import Bench, examples, items, records, story
from method_support import Given, alone
from torch import Tensor

from delo_llava.adapters.carrier import frozen_queries
from delo_llava.data.examples import Item
from delo_llava.errors import DeloError
from delo_llava.methods.base import Past
from delo_llava.methods.missrag import INFER, TAKEN, nearest
from delo_llava.methods.replay import MEMORY
from delo_llava.strict import read_json

ROWS = [*items("task0"), *items("task1")[:3]]


def ready(stages: int = 2, **options: Any) -> tuple[Bench, Any, Any]:
    """The model that answers after some stages, with its method."""
    told, bench = story("missrag"), Bench("missrag", **options)
    model = bench.loaded(told.past(stages))
    return bench, model, bench.method


def filled(bench: Bench, model: Any, rows: list[Item]) -> list[Item]:
    """The rows as they are shown."""
    batch = bench.batch(rows, generation=True)
    method: Any = bench.method
    return list(method._filled(model, batch).items)


def queries_of(bench: Bench, model: Any, rows: list[Item]) -> list[list[Tensor]]:
    """Image, text and instruction query of each row, float64."""
    batch = bench.batch(rows)
    method: Any = bench.method
    found = frozen_queries(model, method.inputs(batch), batch.inputs)
    return [[view[row].double() for view in found] for row in range(len(rows))]


def test_a_stand_in_is_the_nearest_record_by_what_is_there() -> None:
    bench, model, method = ready()
    pool = [
        (name, queries_of(bench, model, [(record, (True, True))])[0])
        for name, record in (((t, r.id), r) for t in ("task0", "task1") for r in records(t))
        if name in method._names
    ]
    assert [name for name, _ in pool] != [] and len(pool) == len(method._names) == 6
    asked = queries_of(bench, model, ROWS)
    for (record, has), shown, query in zip(ROWS, filled(bench, model, ROWS), asked, strict=True):
        if all(has):
            assert shown == (record, has)
            continue
        view = 0 if has[0] else 1
        best = max(float(query[view] @ known[view]) for _, known in pool)
        other = method._record(method._names[0])
        names = [name for name, known in pool if float(query[view] @ known[view]) > best - 1e-6]
        others = [method._record(name) for name in names]
        assert shown[1] == (True, True) and other.image is not None
        assert shown[0].image in ([record.image] if has[0] else [o.image for o in others])
        assert shown[0].context in ([record.context] if has[1] else [o.context for o in others])


def test_a_remembered_record_stands_in_for_itself() -> None:
    bench, model, method = ready(prompt=False)
    for name in method._names:
        record = method._record(name)
        for has in ((True, False), (False, True)):
            [(shown, presence)] = filled(bench, model, [(record, has)])
            assert presence == (True, True)
            same = [r for r in map(method._record, method._names) if r.context == record.context]
            assert shown.context == record.context or (has[0] and not has[1]), (name, has)
            assert shown.image in [r.image for r in same] or has[0]


def test_one_modality_asks_alone_and_the_instruction_only_where_there_is_none() -> None:
    torch.manual_seed(0)
    pool = torch.nn.functional.normalize(torch.randn(5, 3, 4), dim=-1)
    rows = pool[[3, 1, 4, 2]].clone()
    presence = torch.tensor([[True, False], [False, True], [False, False], [True, False]])
    for row, view in enumerate((0, 1, 2, 0)):  # the other views lead elsewhere
        for other in {0, 1, 2} - {view}:
            rows[row, other] = pool[0, other]
    assert nearest(rows, presence, pool).tolist() == [3, 1, 4, 2]
    assert nearest(rows[:1], torch.tensor([[False, True]]), pool).tolist() == [0], "negative control"
    twice = torch.cat([pool, pool])
    assert nearest(rows, presence, twice).tolist() == [3, 1, 4, 2], "the earlier one in a tie"


def test_the_prompt_says_what_is_there() -> None:
    only_told, (model, method) = ready(retrieve=False)[0], ready(retrieve=False)[1:]
    row = (records("task0")[1], (True, False))
    [(shown, presence)] = filled(only_told, model, [row])
    assert presence == (True, False) and shown.context == row[0].context
    assert shown.instruction == f"Image: given.\nText: {INFER}.\n{row[0].instruction}"
    both, model, method = ready()
    [(shown, _)] = filled(both, model, [row])
    assert f"Text: {TAKEN}" in shown.instruction
    silent, model, method = ready(prompt=False)
    [(shown, _)] = filled(silent, model, [row])
    assert shown.instruction == row[0].instruction
    neither, model, method = ready(prompt=False, retrieve=False)
    rows = [row, ROWS[0]]
    plain = neither.batch(rows, generation=True)
    with method.answering(model, plain, None) as prompt:
        assert prompt.inputs is plain.inputs, "without both there is nothing to do"


def test_what_is_filled_in_changes_the_answer_and_complete_rows_keep_their_bits() -> None:
    full, off = ready(), ready(prompt=False, retrieve=False)
    complete = [ROWS[0], ROWS[3]]
    assert torch.equal(full[0].logits(full[1], complete), off[0].logits(off[1], complete))
    lacking = [ROWS[1]]
    retrieved = ready(prompt=False)
    one, other = (b.logits(m, lacking)[:, -1] for b, m, _ in (retrieved, off))
    assert not torch.allclose(one, other, atol=1e-4)


def test_only_complete_records_of_training_are_remembered() -> None:
    told = story("missrag")
    for done, stage in zip(told.trained, told.stages, strict=True):
        memory = read_json(done.folder / MEMORY, "memory")
        task = stage.tasks[0].name
        whole = {
            name
            for (_, name), has in zip(examples(task).names, examples(task).presence, strict=True)
            if all(has)
        }
        assert set(memory) == {task} and len(memory[task]) == 3 and set(memory[task]) <= whole


def test_a_rank_gives_its_part_and_an_example_that_comes_twice_counts_once() -> None:
    bench = Bench("missrag")
    stage = bench.stages()[0]
    own = examples("task0")
    bench.method.mixture(stage, own, {})
    model = bench.begin(stage)
    method: Any = bench.method
    method.finish(model, Given([bench.batch([own[i]]) for i in range(8)]), alone)
    whole = method._queries.clone()
    method.finish(model, Given([bench.batch([own[i]]) for i in [*range(8), 0, 3]]), alone)
    torch.testing.assert_close(method._queries, whole)
    halves = []
    for part in (range(4), range(4, 8)):
        batches = Given([bench.batch([own[i]]) for i in part])
        method.finish(model, batches, lambda tensor: halves.append(tensor) or tensor)
    summed = sum(halves)
    method.finish(model, Given(), lambda tensor: summed)
    torch.testing.assert_close(method._queries, whole)


def test_a_record_that_changed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, model, method = ready()
    stages: dict[str, Past] = dict(method._past)
    changed = [replace(r, answer=f"{r.answer}!") for r in records("task0")]
    monkeypatch.setattr("delo_llava.methods.missrag.read_records", lambda task, split: changed)
    with pytest.raises(DeloError, match="remembered record"):
        bench.logits(model, [ROWS[1]])
    assert stages, "and complete rows need none of them"
    bench.logits(model, [ROWS[0]])


def test_without_a_complete_record_there_is_nothing_to_take() -> None:
    bench, model, method = ready(kept=3)
    method._names = []
    [(shown, presence)] = filled(bench, model, [ROWS[1]])
    assert presence == ROWS[1][1] and INFER in shown.instruction
