"""Missing modalities: exact counts, and a pure function of seed, task, split and record id."""

import hashlib
import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from delo_llava.data.missing import MissingSpec, effective, pattern_spec, presence, record_presence, share_of
from delo_llava.errors import DeloError
from delo_llava.tasks import Record

IDS = [f"r{i}" for i in range(101)]


def lost(mask: np.ndarray) -> tuple[int, int]:
    return int((~mask[:, 0]).sum()), int((~mask[:, 1]).sum())


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 10, 90, 101])
@pytest.mark.parametrize("tenths", [0, 1, 3, 5, 7, 9, 10])
def test_counts_are_exact(count: int, tenths: int) -> None:
    drawn = Fraction(tenths, 10) * count // 1
    for kind, expected in (
        ("image", (drawn, 0)),
        ("text", (0, drawn)),
        ("both", (drawn // 2, drawn - drawn // 2)),
    ):
        mask = presence(MissingSpec(ratio=tenths / 10, kind=kind), "t", "train", IDS[:count])
        assert mask.shape == (count, 2)
        assert mask.dtype == np.bool_
        assert lost(mask) == expected
        assert mask.any(1).all(), "no record loses both"


def test_a_ratio_is_the_decimal_number_written() -> None:
    """Binary floats would give floor(0.7 * 90) = 62."""
    assert int(0.7 * 90) == 62
    assert lost(presence(MissingSpec(ratio=0.7, kind="text"), "t", "train", IDS[:90])) == (0, 63)


def test_matches_an_independent_reference() -> None:
    mask = presence(MissingSpec(ratio=0.5, kind="both", seed=3), "ocr", "val", IDS[:9])
    order = sorted(IDS[:9], key=lambda i: hashlib.sha256(f"3|ocr|val|{i}".encode()).hexdigest())
    assert [i for i, row in zip(IDS, mask, strict=False) if not row[1]] == sorted([order[0], order[2]])
    assert [i for i, row in zip(IDS, mask, strict=False) if not row[0]] == sorted([order[1], order[3]])


def test_order_of_records_does_not_matter() -> None:
    spec = MissingSpec(ratio=0.6, seed=1)
    forward = dict(zip(IDS, presence(spec, "t", "test", IDS).tolist(), strict=True))
    shuffled = np.random.default_rng(0).permutation(IDS).tolist()
    assert dict(zip(shuffled, presence(spec, "t", "test", shuffled).tolist(), strict=True)) == forward


def test_seed_task_and_split_each_change_the_draw() -> None:
    masks = [
        presence(MissingSpec(ratio=0.5, seed=seed), task, split, IDS)
        for seed, task, split in ((0, "a", "train"), (1, "a", "train"), (0, "b", "train"), (0, "a", "test"))
    ]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(masks, 2))


@pytest.mark.parametrize("kind", ["image", "text", "both"])
def test_what_is_missing_at_a_small_ratio_is_missing_at_a_larger(kind: str) -> None:
    masks = [presence(MissingSpec(ratio=r, kind=kind), "t", "train", IDS) for r in (0.1, 0.3, 0.7, 0.9)]
    assert all((after <= before).all() for before, after in itertools.pairwise(masks))


def test_golden_draw_never_changes() -> None:
    """The stored runs' data depend on this draw."""
    mask = presence(
        MissingSpec(ratio=0.5, kind="both", seed=0), "ocr", "train", [f"ocr-{i}" for i in range(12)]
    )
    digest = hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()
    assert digest[:16] == "e982a4850fdcbfc7"


def test_repeated_ids_are_refused() -> None:
    with pytest.raises(DeloError, match="not unique"):
        presence(MissingSpec(ratio=0.5), "t", "train", ["a", "b", "a"])


def test_patterns() -> None:
    run = MissingSpec(ratio=0.7, kind="both", seed=5, image="dummy")
    assert pattern_spec("run", run) == run
    for name, expected in (("complete", (0, 0)), ("image", (101, 0)), ("text", (0, 101))):
        spec = pattern_spec(name, run)
        assert spec.image == "dummy", "how a missing image is shown stays the run's choice"
        assert lost(presence(spec, "t", "test", IDS)) == expected
    with pytest.raises(DeloError, match=r"did you mean image\?"):
        pattern_spec("imge", run)


@pytest.mark.parametrize(
    "bad", [{"ratio": -0.1}, {"ratio": 1.1}, {"kind": "all"}, {"image": "white"}, {"x": 1}]
)
def test_bad_specifications_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MissingSpec.model_validate(bad)


def records(rows: list[tuple[bool, str | None]]) -> list[Record]:
    return [
        Record(f"r{i}", "t", "train", Path("x.png") if image else None, context, "what?", "yes")
        for i, (image, context) in enumerate(rows)
    ]


def test_fields_that_records_lack_are_missing_and_counted_separately() -> None:
    some = records([(True, "c"), (True, None), (False, "c"), (False, None), (True, "")])
    assert record_presence(MissingSpec(), some).tolist() == [
        [True, True], [True, False], [False, True], [False, False], [True, False],
    ]  # fmt: skip
    report = effective(MissingSpec(ratio=1.0, kind="image"), some)
    assert report == {
        "records": 5, "lost_image": 3, "lost_text": 0, "no_image": 2, "no_text": 3, "neither": 3,
        "image_ratio": 1.0, "text_ratio": 0.6, "ratio": 1.0,
    }  # fmt: skip


def test_effective_of_complete_records_is_the_protocol() -> None:
    report = effective(MissingSpec(ratio=0.7), records([(True, "c")] * 90))
    assert (report["lost_image"], report["lost_text"], report["neither"]) == (31, 32, 0)
    assert report["ratio"] == pytest.approx(0.7)


def test_no_records() -> None:
    assert record_presence(MissingSpec(ratio=0.5), []).shape == (0, 2)
    assert effective(MissingSpec(ratio=0.5), [])["records"] == 0


def test_a_share_is_the_decimal_number_that_was_written() -> None:
    for percent in range(101):
        for count in range(0, 300, 7):
            assert share_of(percent / 100, count) == percent * count // 100
    assert share_of(0.7, 90) == 63  # 0.7 * 90 is 62.999…
