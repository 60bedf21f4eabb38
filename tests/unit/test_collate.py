"""The collator against hand-made expectations: kinds, labels, padding, truncation, missing modalities."""

import pytest
import torch
from collate_support import (  # noqa: F401
    BOTH,
    FAMILIES,
    NEITHER,
    NO_IMAGE,
    NO_TEXT,
    change,
    collator,
    family,
    science_record,
    spelled,
)
from PIL import Image

from delo_llava.data import images
from delo_llava.data.collate import IGNORE, Batch
from delo_llava.data.examples import dropped_view
from delo_llava.data.tokens import token_kinds
from delo_llava.errors import DeloError
from delo_llava.tasks import Record


def test_spans_of_llava(record: Record) -> None:
    """By hand: a word piece carries the space before it, so that space goes with the word."""
    batch = collator()([(record, BOTH)])
    assert spelled("llava", batch) == [
        ("<s> USER: ", "O"),
        ("<image>" * 16, "I"),
        ("\nContext:", "O"),
        (" hint: six", "C"),
        ("\n", "O"),
        ("which number is shown?", "Q"),
        (" ASSISTANT:", "O"),
        (" four</s>", "T"),
    ]
    assert spelled("llava", collator()([(record, NEITHER)])) == [
        ("<s> USER:", "O"),
        (" which number is shown?", "Q"),
        (" ASSISTANT:", "O"),
        (" four</s>", "T"),
    ]


def test_spans_of_qwen(record: Record) -> None:
    batch = collator("qwen2_vl")([(record, BOTH)])
    assert spelled("qwen2_vl", batch) == [
        ("<|im_start|>systemĊYou are a helpful assistant.<|im_end|>Ċ<|im_start|>userĊ<|vision_start|>", "O"),
        ("<|image_pad|>" * 6, "I"),
        ("<|vision_end|>Context:", "O"),
        (" hint: six", "C"),
        ("Ċ", "O"),
        ("which number is shown?", "Q"),
        ("<|im_end|>Ċ<|im_start|>assistantĊ", "O"),
        ("four<|im_end|>", "T"),
    ]
    assert batch.inputs["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert batch.inputs["mm_token_type_ids"].tolist() == [[int(s == 1) for s in batch.segments[0].tolist()]]


def test_a_token_across_a_border_belongs_to_its_first_visible_character(record: Record) -> None:
    prompt = [("ab  ", 0), ("c d.", 2), ("\n", 0), ("ef", 3)]
    text = "ab  c d.\nef gh"
    spans = [(0, 2), (2, 3), (3, 5), (5, 6), (6, 7), (7, 9), (9, 11), (11, 14)]
    assert token_kinds(text, spans, prompt, record) == [0, 0, 2, 2, 2, 2, 3, None]
    with pytest.raises(DeloError, match="joins the prompt and the answer of record 'r0'"):
        token_kinds(text, [(10, 14)], prompt, record)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("has", [BOTH, NO_IMAGE, NO_TEXT, NEITHER])
def test_generation_prompt_equals_the_training_prompt(
    kind: str, has: tuple[bool, bool], record: Record
) -> None:
    answers = ["four", "B", "4.5", "?", "(x)", "Ünïcode", " spaced ", "US", "\nx", "not shown.", "'s", "!!"]
    for answer in answers:
        item = (change(record, answer=answer), has)
        train, prompt = collator(kind)([item]), collator(kind, generation=True)([item])
        assert train.labels is not None
        assert prompt.labels is None
        length = int((train.labels[0] == IGNORE).sum())
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(train.inputs[name][:, :length], prompt.inputs[name])
        assert torch.equal(train.segments[:, :length], prompt.segments)
        assert (train.segments[:, length:] == 0).all()
        trained = family(kind)[1].tokenizer.decode(train.labels[0, length:], skip_special_tokens=True)
        assert trained.strip() == answer.strip()


@pytest.mark.parametrize("generation", [False, True])
def test_a_batch_can_be_made_again_of_other_rows(record: Record, generation: bool) -> None:
    """In the same form: with or without answers, padded on the same side."""
    collate = collator(generation=generation)
    batch = collate([(record, NEITHER), (record, BOTH)])
    assert batch.again is not None
    again, whole = (
        batch.again([(record, BOTH), (record, NO_TEXT)]),
        collate([(record, BOTH), (record, NO_TEXT)]),
    )
    assert again.inputs.keys() == whole.inputs.keys()
    assert all(torch.equal(value, whole.inputs[name]) for name, value in again.inputs.items())
    assert (again.labels is None) == generation


@pytest.mark.parametrize("kind", FAMILIES)
def test_padding_sides(kind: str, record: Record) -> None:
    long = change(record, id="r1", context="it comes after six " * 5)
    for generation in (False, True):
        batch = collator(kind, generation=generation)([(record, BOTH), (long, BOTH)])
        mask = batch.inputs["attention_mask"]
        short = int(mask[0].sum())
        assert short < mask.shape[1] == int(mask[1].sum())
        expected = [0] * (mask.shape[1] - short) + [1] * short
        assert mask[0].tolist() == (expected if generation else expected[::-1])
        pads = batch.inputs["input_ids"][0][mask[0] == 0]
        assert set(pads.tolist()) == {family(kind)[1].tokenizer.pad_token_id}
        assert (batch.segments[0][mask[0] == 0] == 0).all()
        if batch.labels is not None:
            assert (batch.labels[mask == 0] == IGNORE).all()


def test_labels_are_the_answer_and_its_end_only(record: Record) -> None:
    batch = collator()([(record, BOTH), (change(record, answer="two"), NO_TEXT)])
    assert batch.labels is not None
    tokenizer = family("llava")[1].tokenizer
    trained = [tokenizer.decode(row[row != IGNORE]) for row in batch.labels]
    assert trained == ["four</s>", "two</s>"]
    assert torch.equal(
        batch.inputs["input_ids"][batch.labels != IGNORE], batch.labels[batch.labels != IGNORE]
    )
    assert batch.answers == ["four", "two"]
    assert batch.tasks == ["science", "science"]


def test_a_batch_without_trained_tokens_is_refused(record: Record) -> None:
    blank = [(change(record, id=i, answer=" "), BOTH) for i in ("a17", "b18")]
    with pytest.raises(DeloError, match=r"(?s)no answer token.*a17, b18"):
        collator()(blank)
    batch = collator()([*blank, (record, BOTH)])
    assert batch.labels is not None
    assert (batch.labels != IGNORE).any(1).tolist() == [False, False, True]
    assert collator(generation=True)(blank).labels is None


# ---- presence ----------------------------------------


def image_tokens(kind: str, record: Record) -> int:
    """What the record's own image becomes."""
    backbone, processor = family(kind)
    return backbone.encode_image(processor, images.load_image(record.image, record)).tokens(
        backbone.image_token
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_absent_images_have_no_tokens_and_no_pixels(kind: str, record: Record) -> None:
    batch = collator(kind)([(record, NO_IMAGE), (record, BOTH), (record, NEITHER)])
    assert batch.presence.tolist() == [[False, True], [True, True], [False, False]]
    assert batch.image_rows.tolist() == [1]
    counts = (batch.segments == 1).sum(1).tolist()
    assert counts == [0, image_tokens(kind, record), 0]
    assert (batch.segments == 2).any(1).tolist() == [True, True, False]
    none = collator(kind)([(record, NO_IMAGE)])
    assert not {"pixel_values", "image_grid_thw"} & none.inputs.keys()
    assert none.image_rows.shape == none.image_units.shape == (0,)


@pytest.mark.parametrize("kind", FAMILIES)
def test_dummy_images_are_white_fed_and_flagged_missing(kind: str, record: Record) -> None:
    batch = collator(kind, image_mode="dummy")([(record, NO_IMAGE), (record, BOTH)])
    assert batch.presence.tolist() == [[False, True], [True, True]]
    assert batch.image_rows.tolist() == [0, 1]
    backbone, processor = family(kind)
    white = backbone.encode_image(processor, Image.new("RGB", images.DUMMY_SIZE, "white"))
    pixels = white.inputs["pixel_values"]
    assert torch.equal(batch.inputs["pixel_values"][: len(pixels)], pixels)
    counts = (batch.segments == 1).sum(1).tolist()
    assert counts == [white.tokens(backbone.image_token), image_tokens(kind, record)]


def test_flags_not_content_decide(record: Record) -> None:
    """Text that says there is nothing is still text; a field the record lacks is absent in any case."""
    batch = collator()(
        [(change(record, context="none"), BOTH), (change(record, context=None, image=None), BOTH)]
    )
    assert batch.presence.tolist() == [[True, True], [False, False]]
    hidden = collator()([(record, NO_TEXT)])
    assert "hint" not in family("llava")[1].tokenizer.decode(hidden.inputs["input_ids"][0])


def test_placeholder_in_a_text_is_refused(record: Record) -> None:
    for field in ("context", "instruction", "answer"):
        with pytest.raises(DeloError, match="record 'r0' holds the image placeholder"):
            collator()([(change(record, **{field: "a <image> here"}), BOTH)])


# ---- truncation ----------------------------------------


def trained(batch: Batch) -> int:
    """Tokens of a batch's answers."""
    assert batch.labels is not None
    return int((batch.labels != IGNORE).sum())


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_answer_changes_what_is_seen_before_it(kind: str, record: Record) -> None:
    """Neither its length nor that it is there: training and generation show the same prompt, which leaves
    room for the task's answers.
    """
    long = change(record, context="it comes after six " * 40)
    limit, options = 120, {"rooms": {"science": 12}}
    (asked,) = collator(kind, limit, generation=True, **options)([(long, BOTH)]).inputs["input_ids"]
    assert len(asked) == limit - 12
    for answer in ("", "six", "six " * 9):
        given = collator(kind, limit, **options)([(change(long, answer=answer), BOTH), (record, BOTH)])
        assert torch.equal(given.inputs["input_ids"][0][: len(asked)], asked)
        assert given.cut == {0: ["context"]}


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_answer_beyond_its_room_loses_its_end_where_it_does_not_fit(kind: str, record: Record) -> None:
    long, limit = change(record, answer="six " * 90), 120
    full = collator(kind, 4096)([(long, BOTH)])
    prompt = collator(kind, 4096, generation=True)([(long, BOTH)]).inputs["input_ids"].shape[1]
    batch = collator(kind, limit, rooms={"science": 12})([(long, BOTH)])
    assert torch.equal(batch.inputs["input_ids"], full.inputs["input_ids"][:, :limit])
    assert trained(batch) == limit - prompt > 12 and batch.cut == {0: ["answer"]}
    both = change(long, context="it comes after six " * 40)
    batch = collator(kind, limit, rooms={"science": 12})([(both, BOTH)])
    assert trained(batch) == 12 and batch.cut == {0: ["context", "answer"]}, "what can be generated stays"
    assert batch.cuts == {("science", "context", "r0"), ("science", "answer", "r0")}


@pytest.mark.parametrize("kind", FAMILIES)
def test_context_is_cut_first_from_its_end(kind: str, record: Record) -> None:
    long = change(record, context="it comes after six " * 40)
    full = collator(kind, 4096)([(long, BOTH)])
    limit = collator(kind)([(record, BOTH)]).inputs["input_ids"].shape[1] + 5
    assert full.labels is not None
    batch = collator(kind, limit, rooms={"science": trained(full)})([(long, BOTH)])
    assert batch.inputs["input_ids"].shape[1] == limit
    assert batch.cut == {0: ["context"]}
    assert batch.labels is not None
    for segment in (0, 1, 3):
        kept, all_of_it = batch.segments == segment, full.segments == segment
        assert torch.equal(batch.inputs["input_ids"][kept], full.inputs["input_ids"][all_of_it])
    assert torch.equal(batch.labels[batch.labels != IGNORE], full.labels[full.labels != IGNORE])
    context = batch.inputs["input_ids"][batch.segments == 2]
    assert len(context) >= 5
    assert torch.equal(context, full.inputs["input_ids"][full.segments == 2][: len(context)])


def test_of_an_instruction_the_middle_is_cut(record: Record) -> None:
    """The question is most often its end."""
    long = change(record, instruction="a tale of six cats. " * 30 + "what is shown", context="a")
    full = collator()([(long, BOTH)])
    limit = int((full.segments != 3).sum()) + 12
    batch = collator(max_length=limit, rooms={"science": trained(full)})([(long, BOTH)])
    whole, kept = (b.inputs["input_ids"][b.segments == 3] for b in (full, batch))
    assert len(kept) == 12 and torch.equal(kept, torch.cat([whole[:6], whole[-6:]]))
    assert batch.cut == {0: ["instruction"]}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("field", ["context", "instruction", "answer"])
def test_words_that_look_like_control_tokens_are_words(kind: str, field: str, record: Record) -> None:
    """Neither an end in the middle of an answer, nor a role in a question."""
    one = collator(kind)
    controls = [t for t in one.tokenizer.all_special_tokens if t != one.backbone.image_token]
    told = change(record, **{field: f"a {''.join(controls)} b"})
    plain, batch = one([(record, BOTH)]), one([(told, BOTH)])
    ids = set(one.tokenizer.convert_tokens_to_ids(controls))

    def count(found: Batch) -> int:
        return sum(int(i) in ids for i in found.inputs["input_ids"][0])

    assert count(batch) == count(plain)
    spoken = one.tokenizer.decode(batch.inputs["input_ids"][0])
    assert all(spoken.count(token) >= 1 for token in controls)
    assert batch.labels is not None and int(batch.labels[batch.labels != IGNORE][-1]) in ids, "the end is one"


def test_then_the_instruction_and_never_image_or_answer(record: Record) -> None:
    short = collator()([(change(record, context="a", instruction="a"), BOTH)])
    least, rooms = short.inputs["input_ids"].shape[1], {"science": trained(short)}
    batch = collator(max_length=least, rooms=rooms)(
        [(change(record, instruction="a" + " a" * 40, context="a" + " a" * 40), BOTH)]
    )
    assert batch.cut == {0: ["context", "instruction"]}
    assert [(batch.segments == s).sum().item() for s in (1, 2, 3)] == [16, 1, 1]
    assert spelled("llava", batch)[-1] == (" four</s>", "T")
    with pytest.raises(DeloError, match=r"(?s)Record 'r0' does not fit.*data\.max_length"):
        collator(max_length=least - 1, rooms=rooms)([(record, BOTH)])


def test_short_records_are_not_cut(record: Record) -> None:
    whole = collator()([(record, BOTH)])
    exact = whole.inputs["input_ids"].shape[1]
    batch = collator(max_length=exact, rooms={"science": trained(whole)})([(record, BOTH)])
    assert batch.inputs["input_ids"].shape[1] == exact and not batch.cut


# ---- the dropped view ----------------------------------------


def dropping(seed: int = 0):
    return lambda items: {"dropped": dropped_view(items, seed)}


@pytest.mark.parametrize("kind", FAMILIES)
def test_dropped_view_shows_complete_rows_less_one_modality(kind: str, record: Record) -> None:
    records = [change(record, id=f"r{i}", answer="four" if i % 2 else "two one") for i in range(24)]
    shown = [(BOTH, NO_IMAGE, BOTH, NO_TEXT)[i % 4] for i in range(24)]
    batch = collator(kind)(list(zip(records, shown, strict=True)), dropping())
    rows, view = batch.views["dropped"].rows, batch.views["dropped"].batch
    assert rows.tolist() == list(range(0, 24, 2))
    assert view.record_ids == [f"r{i}" for i in range(0, 24, 2)]
    assert (view.presence.sum(1) == 1).all()
    assert 0 < view.presence[:, 0].sum() < 12, "always the same modality is dropped"
    assert len(view.image_rows) == view.presence[:, 0].sum()
    assert not view.views and not view.filler
    assert batch.labels is not None
    assert view.labels is not None
    for row, source in enumerate(rows.tolist()):
        mine, its = view.labels[row], batch.labels[source]
        assert torch.equal(mine[mine != IGNORE], its[its != IGNORE])


def test_dropped_view_depends_on_seed_and_record_only(record: Record) -> None:
    records = [(change(record, id=f"r{i}"), BOTH) for i in range(16)]

    def dropped(seed: int, items) -> dict[str, list[bool]]:
        view = collator()(items, dropping(seed)).views["dropped"].batch
        return dict(zip(view.record_ids, view.presence.tolist(), strict=True))

    whole = dropped(0, records)
    assert whole == dropped(0, records[::-1])
    assert dropped(0, records[:3]) == {key: whole[key] for key in ("r0", "r1", "r2")}
    assert dropped(1, records) != whole


def test_a_view_without_rows_is_a_filler_of_which_nothing_is_trained(record: Record) -> None:
    view = collator()([(record, NO_TEXT)], dropping()).views["dropped"]
    assert view.rows.tolist() == [] and view.batch.filler and len(view.batch) == 1
    assert view.batch.labels is not None and bool((view.batch.labels == IGNORE).all())
    assert "pixel_values" not in view.batch.inputs


def test_to_moves_every_tensor(record: Record) -> None:
    batch = collator("qwen2_vl")([(record, BOTH), (record, NO_IMAGE)], dropping())
    moved = batch.to("meta")
    view = moved.views["dropped"]
    assert view.rows.device.type == "meta"
    for part in (moved, view.batch):
        tensors = [
            *part.inputs.values(),
            part.labels,
            part.segments,
            part.presence,
            part.image_rows,
            part.image_units,
        ]
        assert {tensor.device.type for tensor in tensors if tensor is not None} == {"meta"}
    assert moved.record_ids == batch.record_ids
    assert len(batch) == 2


def test_the_batch_composition_changes_no_row(record: Record) -> None:
    """Traps T7, T12: ids and kinds of a row, read at its mask, are those of the row alone."""
    items = [
        (change(record, id=f"r{i}", context="six " * (3 * i + 1)), (BOTH, NO_TEXT, NO_IMAGE)[i % 3])
        for i in range(6)
    ]
    together = collator("qwen2_5_vl")(items)
    for row, item in enumerate(items):
        alone, seen = collator("qwen2_5_vl")([item]), together.inputs["attention_mask"][row].bool()
        assert torch.equal(together.inputs["input_ids"][row][seen], alone.inputs["input_ids"][0])
        assert torch.equal(together.segments[row][seen], alone.segments[0])


def test_unknown_image_mode_is_refused() -> None:
    with pytest.raises(DeloError, match="dumy"):
        collator(image_mode="dumy")
