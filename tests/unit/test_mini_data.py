"""mini6 and mini8: all builds are one, splits share no entity, hidden pictures hide, answers are there."""

import hashlib
import json
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from delo_eval.scorers.base import Reference
from delo_llava.data.readers import read_records
from delo_llava.data.recipe import load_sequence, read_recipe
from delo_llava.errors import DeloError
from delo_llava.mini import build, entities, render
from delo_llava.mini.neutral import CONTENT, WORDING, neutral
from delo_llava.mini.tasks import attribute, grounding, unanswerable
from delo_llava.mini.tasks.base import Example
from delo_llava.registry import load_plugin
from tools.mini_base.pretrain import mixture

SMALL = {"train": 40, "val": 10, "test": 20}
TASKS = build.MINI8.tasks


def examples(task: str, split: str, count: int = 120, seed: int = 0) -> list[Example]:
    records = import_module(f"delo_llava.mini.tasks.{task}").records
    return list(islice(records(split, np.random.default_rng(seed)), count))


def pixels(image) -> np.ndarray:
    return np.asarray(image)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return build.ensure_mini8(tmp_path_factory.mktemp("mini8"), SMALL)


@pytest.fixture(scope="module")
def six(tmp_path_factory) -> Path:
    return build.ensure_mini6(tmp_path_factory.mktemp("mini6"), SMALL)


def test_the_bytes_of_mini6_never_change(six):
    """The hashes were taken before mini8, its builder and the second edition existed; the first records of a
    split are in both editions."""
    records, values = hashlib.sha256(), hashlib.sha256()
    for path in sorted(p for p in six.rglob("*.json") if p.name != "manifest.json"):
        records.update(path.read_bytes())
    for path in sorted(six.rglob("*.png")):
        values.update(np.asarray(Image.open(path)).tobytes())
    assert six.name == "mini6-v2"
    assert records.hexdigest() == "47ed6832a0793179733f0a93a3e67fcba50bf17053316e661e7d0337ea8659f8"
    assert values.hexdigest() == "720a301890286dad5edba4c02d30f8a8f2e1c3fa8b4167c15f1305a337ec0b70"


@pytest.mark.parametrize("task", ["geography", "grounding"])
def test_no_picture_is_in_two_splits_though_maps_without_dot_are_alike(task, tmp_path):
    """At full size; other tasks hide things behind grain, which is never drawn twice."""
    build.build_task(tmp_path, task, build.MINI8.seeds[task], build.COUNTS)
    seen: dict[str, set[bytes]] = {}
    for split, count in build.COUNTS.items():
        files = sorted((tmp_path / task / "images" / split).iterdir())
        rows = json.loads((tmp_path / task / f"{split}.json").read_text())
        assert len(files) == len(rows) == count and rows[-1]["image"].endswith(files[-1].name)
        seen[split] = {path.read_bytes() for path in files}
    assert len(seen["train"]) < build.COUNTS["train"], "the same picture may be drawn twice within a split"
    assert not seen["train"] & seen["val"] and not (seen["train"] | seen["val"]) & seen["test"]


def test_mini8_holds_mini6_record_for_record_and_the_recipe_has_its_order(built, six):
    whole, part = (json.loads((folder / "manifest.json").read_text()) for folder in (built, six))
    for kind in ("files", "pictures"):
        assert len(part[kind]) == 18 and part[kind].items() <= whole[kind].items()
    assert [t for t in TASKS if t in build.MINI6.tasks] == list(build.MINI6.tasks)
    for collection in (build.MINI6, build.MINI8):
        assert tuple(t.name for t in read_recipe(collection.name).tasks) == collection.tasks


def test_a_second_build_has_the_same_hashes(built, tmp_path):
    again = build.ensure_mini8(tmp_path, SMALL)
    assert json.loads((again / "manifest.json").read_text()) == json.loads(
        (built / "manifest.json").read_text()
    )
    assert build.describe(built, build.MINI8) == json.loads((built / "manifest.json").read_text())


def test_a_finished_folder_is_reused_and_the_slower_of_two_builders_gives_way(built, tmp_path):
    stamp = (built / "manifest.json").stat().st_mtime_ns
    assert build.ensure_mini8(built.parent) == built
    draft = tmp_path / "draft"
    draft.mkdir()
    build._publish(draft, built)
    assert (built / "manifest.json").stat().st_mtime_ns == stamp and not list(built.parent.glob(".mini8*"))


def test_two_builders_at_once_agree(six, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: build.ensure_mini6(tmp_path, SMALL), range(2)))
    assert found[0] == found[1] and [p.name for p in tmp_path.iterdir()] == ["mini6-v2"]
    assert (found[0] / "manifest.json").read_text() == (six / "manifest.json").read_text()


def test_a_leftover_without_a_manifest_makes_way(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "half").write_text("x")
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "manifest.json").write_text("{}")
    build._publish(draft, tmp_path / "target")
    assert [p.name for p in (tmp_path / "target").iterdir()] == ["manifest.json"]


def test_a_changed_file_is_named(tmp_path):
    folder = build.ensure_mini6(tmp_path, {"train": 2, "val": 2, "test": 2})
    (folder / "ocr" / "images" / "val" / "00000.png").unlink()
    with pytest.raises(DeloError, match="2 pictures belong in ocr/images/val, 1"):
        build.ensure_mini6(tmp_path)
    (folder / "ocr" / "val.json").write_text("[]")
    with pytest.raises(DeloError, match="ocr/val.json"):
        build.ensure_mini6(tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_records_on_disk_have_coin_form(built, task):
    for split, count in SMALL.items():
        rows = json.loads((built / task / f"{split}.json").read_text())
        assert len(rows) == count
        for row in rows:
            assert (built / row["image"]).is_file() and row["context"] and row["entity"] and row["answer_in"]
            if split == "test":
                assert row["text"] and row["answer"] and "<image>" not in row["text"]
            else:
                human, gpt = row["conversations"]
                assert (human["from"], gpt["from"]) == ("human", "gpt") and gpt["value"]
                assert human["value"].startswith("<image>\n")


@pytest.mark.parametrize("task", TASKS)
def test_no_entity_is_in_two_splits(task):
    found = {split: {e.entity for e in examples(task, split)} for split in entities.SPLITS}
    assert (
        not found["train"] & found["val"]
        and not found["train"] & found["test"]
        and not found["val"] & found["test"]
    )
    for split, names in found.items():
        for name in names:
            kind, key = name.split("/", 1)
            if kind == "scene":
                assert key.startswith("test/" if split == "test" else "train/")
            else:
                assert entities.split_of(kind, key) == split


@pytest.mark.parametrize("task", TASKS)
def test_an_answer_is_always_in_one_source_and_often_in_only_one(task):
    rows = examples(task, "train", 400)
    shown, told = np.array([r.in_image for r in rows]), np.array([r.in_context for r in rows])
    if task == "unanswerable":
        lost = ~(shown | told)
        assert [r.answer == unanswerable.ANSWER for r in rows] == lost.tolist() and 0.2 < lost.mean() < 0.4
        shown, told = shown[~lost], told[~lost]
    assert (shown | told).all()
    assert 0.6 < shown.mean() < 0.8 and 0.4 < told.mean() < 0.7
    assert (shown & ~told).mean() > 0.3 and (told & ~shown).mean() > 0.2


TELLS = {  # what a context says, normalised, when it tells the answer
    "science": lambda e: _option(e) in e.context.split(),
    "ocr": lambda e: e.answer in e.context.split(),
    "attribute": lambda e: e.answer in e.context.split(),
    "geography": lambda e: e.answer in e.context.replace(",", "").split(),
    "naming": lambda e: e.context in import_module("delo_llava.mini.tasks.naming").CLUES[e.answer],
    "yesno": lambda e: bool(set(e.context.split()) & set(entities.COLOURS)),
    "unanswerable": lambda e: e.answer in e.context.split(),
    "grounding": lambda e: _begin(e) <= set(re.split(r"\W+", e.context)),
}


def _option(example: Example) -> str:
    words = example.instruction.split()
    return words[words.index(f"{example.answer}.") + 1]


def _begin(example: Example) -> set[str]:
    """The words of a box's first corner."""
    return set(example.answer.split()[:2])


@pytest.mark.parametrize("task", TASKS)
def test_a_context_tells_the_answer_exactly_when_it_is_said_to(task):
    for example in examples(task, "val", 300):
        assert TELLS[task](example) == example.in_context, example


def test_hidden_pictures_do_not_depend_on_what_they_hide():
    draw = lambda make: pixels(make(np.random.default_rng(5)))  # noqa: E731
    scans = [d.scan for d in entities.digits()[:2]]
    assert (
        draw(lambda r: render.digit_image(scans[0], r, True))
        == draw(lambda r: render.digit_image(scans[1], r, True))
    ).all()
    assert (
        draw(lambda r: render.digit_image(scans[0], r)) != draw(lambda r: render.digit_image(scans[1], r))
    ).any()
    assert (
        draw(lambda r: render.letter_card("sun", r, True))
        == draw(lambda r: render.letter_card("mangos", r, True))
    ).all()
    assert (
        draw(lambda r: render.emoji_image("🐄", r, True)) == draw(lambda r: render.emoji_image("🍎", r, True))
    ).all()
    assert (draw(lambda r: render.emoji_image("🐄", r)) != draw(lambda r: render.emoji_image("🍎", r))).any()
    assert (
        draw(lambda r: render.map_image(0, 0, r, True)) == draw(lambda r: render.map_image(50, 90, r, True))
    ).all()


def _plain(colour: str, form: str):
    image = render.shapes_image([render.Shape(colour, form, 30, 34, 12, 12)], np.random.default_rng(1))
    return lambda hiding: pixels(render.hide_shape(image, np.random.default_rng(2), hiding))


def test_hidden_colours_and_forms_leave_no_trace():
    assert (_plain("red", "circle")("all") == _plain("blue", "triangle")("all")).all()
    for colour in ("blue", "teal", "black"):
        difference = (_plain("red", "circle")("colour") != _plain(colour, "circle")("colour")).any(axis=2)
        assert difference.mean() < 0.02  # at most the smooth edge
        hatched = _plain(colour, "circle")("colour").reshape(-1, 3)
        assert (
            not (np.abs(hatched.astype(int) - entities.COLOURS[colour]).max(axis=1) < 30).any()
            or colour == "black"
        )
    assert (_plain("red", "circle")("form") == _plain("red", "rectangle")("form")).all()
    assert (_plain("red", "circle")("form") != _plain("blue", "circle")("form")).any()


def test_a_blurred_photograph_is_the_same_whatever_the_number():
    """`render.blurred` knows no scan, so what shows in it can only be ground and spots."""
    for example in examples("unanswerable", "train", 60):
        values = pixels(example.image.convert("L")).astype(int)
        steepest = max(np.abs(np.diff(values, axis=axis)).max() for axis in (0, 1))
        assert (steepest > 40) == example.in_image


def test_a_box_is_where_the_dot_is_drawn():
    for example in examples("grounding", "train", 100):
        bounds = example.extra["answer_bbox"]
        assert re.fullmatch(r"\[[01]\.\d\d(, [01]\.\d\d){3}\]", bounds)
        left, top, right, bottom = (round(64 * share) for share in json.loads(bounds))
        red = np.abs(pixels(example.image).astype(int) - (220, 20, 20)).max(2) < 20
        assert red[top:bottom, left:right].sum() == red.sum() and red.any() == example.in_image
        assert right - left == bottom - top == 64 // grounding.GRID


def test_boxes_are_records_that_the_scorer_knows(built):
    task = next(t for t in load_sequence("mini8", built.parent).tasks if t.name == "grounding")
    record = read_records(task, "test", 1.0, 0)[0]
    assert record.extra["parts"] == grounding.GRID and record.extra["size"] == [64, 64]
    scorer, reference = load_plugin("scorer", task.scorer), Reference.of(record)
    assert scorer.id == "grounding_words.v1" and scorer(record.answer, reference) == 1.0
    others = {" ".join(entities.NUMBER_NAMES[c] for c in grounding.corners(field)) for field in range(4)}
    assert {scorer(other, reference) for other in others - {record.answer}} == {0.0}
    wrong = ("unanswerable", "", f"{record.answer} one", "one one zero zero", record.extra["answer_bbox"])
    assert {scorer(said, reference) for said in wrong} == {0.0}


def test_official_scenes_lose_their_colour_too():
    scene = next(s for s in entities.scenes("train") if s.colour == "red")
    grey = pixels(render.hide_shape(render.scene_image(scene), np.random.default_rng(0), "colour")).astype(
        int
    )
    assert (grey.max(axis=2) - grey.min(axis=2)).max() < 40
    assert (pixels(render.scene_image(scene)).astype(int) @ [1, -1, 0]).max() > 200


CEILINGS = {"ocr": 0.1, "attribute": 0.35, "geography": 0.3, "yesno": 0.6, "naming": 0.3, "science": 0.45} | {
    "unanswerable": 0.4, "grounding": 0.4,
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_no_constant_answer_is_good(task):
    for split in get_args(entities.Split):
        counts = Counter(e.answer for e in examples(task, split, 300))
        assert counts.most_common(1)[0][1] / 300 < CEILINGS[task]


def test_entities_are_many_enough_and_plain():
    assert len(entities.digits()) == 1797 and len(entities.countries()) > 200 and len(entities.words()) > 900
    assert all(w.isascii() and w.islower() and 3 <= len(w) <= 6 for w in entities.words())
    groups = Counter(e.group for e in entities.emoji())
    assert set(groups) == set(entities.GROUPS.values()) and min(groups.values()) > 70
    assert len({e.name for e in entities.emoji()}) == len(entities.emoji())


def instructions(task: str) -> set[str]:
    """A task's wordings with what varies taken out."""
    module = import_module(f"delo_llava.mini.tasks.{task}")
    given = getattr(module, "INSTRUCTIONS", ())
    listed = [i for group in given.values() for i in group] if isinstance(given, dict) else list(given)
    return {i.replace("{options}", "").strip() for i in listed}


def test_the_tasks_wordings_differ_and_are_not_in_the_pretraining_mixture():
    found = {task: instructions(task) for task in TASKS}
    flat = [i for wordings in found.values() for i in wordings]
    assert len(flat) == len(set(flat))
    source = Path(mixture.__file__).read_text(encoding="utf-8")
    asked = [i for i in flat if i in source]
    assert not asked
    assert "present?" not in source and "is there a" not in source.replace("there is a", "")


def test_the_neutral_template_changes_instructions_and_no_file_of_mini6(six, tmp_path):
    folder = tmp_path / six.name
    shutil.copytree(six, folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    plain, neutral = load_sequence("mini6", tmp_path), load_sequence("mini6", tmp_path, "neutral")
    assert (plain.template, neutral.template) == (None, "neutral")
    assert {p: p.read_bytes() for p in before} == before
    assert build.ensure_mini6(tmp_path) == folder, "the manifest of mini6 stands"
    for one, other in zip(plain.tasks, neutral.tasks, strict=True):
        assert other.files["train"].name == "train-neutral.json" and one.files["train"].name == "train.json"
        for split in entities.SPLITS:
            records, same = read_records(one, split), read_records(other, split)
            assert [(r.id, r.image, r.context, r.answer, r.extra) for r in records] == [
                (r.id, r.image, r.context, r.answer, r.extra) for r in same
            ]
            assert {r.instruction.partition(":")[0] for r in same} == {WORDING}
            for record, worded in zip(records, same, strict=True):
                content = worded.instruction.partition(": ")[2]
                assert bool(content) is (one.name in CONTENT)
                assert content in record.instruction or one.name == "attribute"


def test_neutral_questions_can_still_be_answered():
    assert neutral("science", "which number is it? A. six B. one C. zero answer with the letter") == (
        f"{WORDING}: A. six B. one C. zero"
    )
    asked = {
        "is there a circle?": "circle",
        "does the image contain a red shape?": "red",
        "is a teal shape present?": "teal",
    }
    for question, word in asked.items():
        assert neutral("yesno", question) == f"{WORDING}: {word}"
    for kind, forms in attribute.INSTRUCTIONS.items():
        assert {neutral("attribute", form) for form in forms} == {f"{WORDING}: {kind}"}
    assert neutral("ocr", "read the word on the card") == neutral("naming", "name it") == WORDING
    with pytest.raises(ValueError, match="no instruction of yesno"):
        neutral("yesno", "what is it?")


def test_a_changed_neutral_file_is_named_and_mini8_has_them_too(built):
    sequence = load_sequence("mini8", built.parent, "neutral")
    assert all((built / f"{task}/test-neutral.json").is_file() for task in TASKS)
    assert {r.instruction for r in read_records(sequence.tasks[5], "test")} == {WORDING}
    (built / "ocr" / "val-neutral.json").write_text("[]")
    with pytest.raises(DeloError, match="val-neutral.json") as told:
        load_sequence("mini8", built.parent, "neutral")
    assert "manifest-neutral.json" in str(told.value)
    (built / "manifest-neutral.json").unlink()
    load_sequence("mini8", built.parent, "neutral")
    load_sequence("mini8", built.parent)
