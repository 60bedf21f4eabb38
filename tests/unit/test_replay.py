"""Replay: which records are remembered, that they are what they were, their share of a batch."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract_support import Bench, examples, records, story

from delo_llava.data.examples import Examples
from delo_llava.errors import DeloError
from delo_llava.methods.replay import MEMORY, recall, record_hash, remember
from delo_llava.tasks import Record
from delo_llava.training.mixture import StageBatches


def made(count: int, task: str = "task0") -> list[Record]:
    """Records without image."""
    return [Record(f"r{i}", task, "train", None, f"about {i}", "what ?", str(i)) for i in range(count)]


def shown(rows: list[Record]) -> Examples:
    return Examples(((rows, np.ones((len(rows), 2), dtype=np.bool_)),))


def test_the_draw_is_even_and_depends_on_seed_and_ids_alone() -> None:
    rows = made(200)
    (kept,) = remember(shown(rows), 20, seed=1).values()
    assert len(kept) == 20
    assert remember(shown(rows[::-1]), 20, seed=1) == {"task0": kept}
    assert set(remember(shown(rows), 20, seed=2)["task0"]) != set(kept)
    assert set(remember(shown(made(200, "other")), 20, seed=1)["other"]) != set(kept)
    drawn = Counter(name for seed in range(200) for name in remember(shown(rows), 20, seed)["task0"])
    assert len(drawn) == 200 and max(drawn.values()) < 45 and min(drawn.values()) > 4  # 20 each expected
    assert len(remember(shown(made(3)), 20, seed=0)["task0"]) == 3


def test_every_task_of_a_stage_is_remembered() -> None:
    both = shown(made(9)) + shown(made(7, "task1"))
    assert {task: len(kept) for task, kept in remember(both, 8, 0).items()} == {"task0": 8, "task1": 7}


def stored(folder: Path, rows: list[Record], count: int) -> Path:
    file = folder / "task0" / MEMORY
    file.parent.mkdir()
    file.write_text(json.dumps(remember(shown(rows), count, 0)))
    return file


def test_what_is_recalled_is_what_was_kept_with_its_presence(tmp_path: Path) -> None:
    rows = made(12)
    file = stored(tmp_path, rows, 5)
    presence = np.array([(i % 2 == 0, i % 3 == 0) for i in range(12)])
    found = recall(Examples(((rows, presence),)), file)
    assert sorted(name for _, name in found.names) == sorted(json.loads(file.read_text())["task0"])
    for record, flags in (found[i] for i in range(len(found))):
        number = int(record.id[1:])
        assert flags == (number % 2 == 0, number % 3 == 0) and record == rows[number]


@pytest.mark.parametrize("change", ["gone", "context", "answer", "image"])
def test_a_record_that_is_not_what_it_was_is_named(tmp_path: Path, change: str) -> None:
    picture = tmp_path / "picture.png"
    shutil.copy(records("task0")[0].image, picture)
    rows = [replace(row, image=picture) for row in made(6)]
    file = stored(tmp_path, rows, 6)
    assert len(recall(shown(rows), file)) == 6
    elsewhere = tmp_path / "moved.png"
    shutil.copy(picture, elsewhere)
    assert (
        len(recall(shown([replace(row, image=elsewhere) for row in rows]), file)) == 6
    )  # a path says nothing
    if change == "image":
        picture.write_bytes(records("task0")[1].image.read_bytes())
    changed = {"gone": [], "image": [rows[2]]}.get(change)
    if changed is None:
        changed = [replace(rows[2], **{change: "other"})]
    told = "is not in its task's training data" if change == "gone" else "has changed"
    with pytest.raises(DeloError, match=told) as refused:
        recall(shown([*rows[:2], *changed, *rows[3:]]), file)
    assert "task0/r" in str(refused.value) and (change == "image" or "task0/r2" in str(refused.value))
    with pytest.raises(DeloError, match="cannot be read"):
        recall(shown(rows), tmp_path / "none.json")


def test_a_hash_sees_every_text() -> None:
    row = made(1)[0]
    others = [replace(row, **{key: "other"}) for key in ("instruction", "context", "answer")]
    assert len({record_hash(r) for r in (row, *others)}) == 4
    assert record_hash(replace(row, id="another")) == record_hash(row)  # the id is the key


def mixture(**options: Any) -> tuple[Bench, Any]:
    told, bench = story("replay"), Bench("replay", **options)
    return bench, bench.method.mixture(told.stages[1], examples("task1"), {"task0": examples("task0")})


def test_remembered_records_join_the_stage_s_own_or_have_a_share() -> None:
    _, plain = mixture()
    assert [(len(part.examples), part.share) for part in plain] == [(8, None), (3, None)]
    bench, shared = mixture(share=0.25)
    assert [part.share for part in shared] == [0.75, 0.25]
    batches = StageBatches(bench.config, shared, seed=0)
    for step in batches.steps:
        tasks = Counter(batches.examples[i][0].task for i in step)
        assert tasks == {"task1": 3, "task0": 1}
    joined = StageBatches(bench.config, plain, seed=0)
    seen = Counter(i for step in joined.steps for i in step)
    assert set(seen) == set(range(11))


@pytest.mark.parametrize("share", [0.05, 0.12, 0.13, 0.5, 0.87, 0.88, 0.99])
def test_a_share_without_a_record_is_refused_before_the_first_stage(share: float) -> None:
    """Just where the second stage could not make its batches of four."""
    bench, shared = mixture(share=share)
    try:
        StageBatches(bench.config, shared, seed=0)
    except DeloError:
        with pytest.raises(DeloError, match="not even one record"):
            bench.method.stages(bench.sequence)
    else:
        assert [plan.name for plan in bench.method.stages(bench.sequence)] == bench.sequence.names


def test_the_memory_of_a_stage_is_of_training_records_and_only_ids_and_hashes() -> None:
    told = story("replay")
    assert told.bench.method.mixture(told.stages[0], examples("task0"), {})[0].share is None
    for name, done in zip(("task0", "task1"), told.trained, strict=True):
        memory = json.loads((done.folder / MEMORY).read_text())
        known = {record.id: record_hash(record) for record in records(name)}
        assert list(memory) == [name] and len(memory[name]) == 3
        assert memory[name].items() <= known.items()
        assert all(record.split == "train" for record in records(name))
