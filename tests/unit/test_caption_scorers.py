"""Caption metrics: numbers that follow by hand, the mean of seven, and what is unavailable without Java."""

import importlib.util
import math
import shutil
import sys

import pytest

from delo_eval.scorers import _captions
from delo_eval.scorers.base import Reference
from delo_eval.scorers.caption import SCORER
from delo_eval.scorers.caption_plain import SCORER as PLAIN
from delo_llava.errors import DeloError

HORSE, BOAT = "a man rides a brown horse", "two boats float on the calm lake"


def references(*captions: list[str]) -> list[Reference]:
    return [Reference(str(i), row[0], extra={"captions": row}) for i, row in enumerate(captions)]


def test_the_library_is_installed_for_the_tests() -> None:
    assert importlib.util.find_spec("pycocoevalcap")


def test_plain_metrics_of_equal_captions_are_one_and_cider_ten() -> None:
    """CIDEr is ten times a mean cosine, so ten where every caption equals the only reference."""
    asked = references([HORSE], [BOAT])
    assert PLAIN.details is not None
    found = PLAIN.details([HORSE.title() + ".", BOAT], asked)
    assert found == pytest.approx({f"BLEU-{n}": 1 for n in (1, 2, 3, 4)} | {"ROUGE-L": 1, "CIDEr": 10})
    assert PLAIN.total([HORSE.title() + ".", BOAT], asked) == pytest.approx(10)


def test_plain_metrics_of_a_shortened_caption_follow_by_hand() -> None:
    """Three of four words: precision 1 for n ≤ 3 with brevity penalty e^(1 − 4/3); ROUGE-L with beta 1.2."""
    found = _captions.metrics(("one two three",), (("one two three four",),), java=False)
    penalty = math.exp(1 - 4 / 3)
    for n in (1, 2, 3):
        assert found[f"BLEU-{n}"] == pytest.approx(penalty, rel=1e-6)
    recall, beta = 0.75, 1.2
    assert found["ROUGE-L"] == pytest.approx((1 + beta**2) * recall / (recall + beta**2))
    assert found["CIDEr"] == 0.0  # one image: no word tells images apart


def test_a_records_own_score_is_its_rouge_l() -> None:
    reference = references([HORSE, BOAT])[0]
    assert SCORER(HORSE, reference) == 1.0 and SCORER(BOAT + "!", reference) == 1.0
    assert SCORER("", reference) == 0.0 and 0 < SCORER("a horse", reference) < 1


def test_without_java_it_is_named_what_is_unavailable_and_never_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_captions.shutil, "which", lambda name: None)
    asked = references([HORSE], [BOAT])
    for scorer in (SCORER, SCORER.in_mode("compat")):
        with pytest.raises(DeloError, match="METEOR and PTB tokenisation.*unavailable") as told:
            scorer.check(asked)
        assert "caption_plain" in str(told.value)
        with pytest.raises(DeloError, match="Java is missing"):
            scorer.total(["a horse alone", "b"], asked)
    PLAIN.check(asked)
    assert PLAIN.total([HORSE, BOAT], asked) == pytest.approx(10)
    assert {SCORER.id, PLAIN.id} == {"caption.v2", "caption_plain.v2"}


def test_records_without_captions_are_refused() -> None:
    PLAIN.check([Reference("1", HORSE, extra={"answers": [HORSE, BOAT]})])
    with pytest.raises(DeloError, match="1 of 2 records have no list of captions"):
        PLAIN.check([*references([HORSE]), Reference("2", BOAT)])


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(DeloError, match=r"pip install 'delo-llava\[captions\]'"):
        PLAIN.check([])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR and PTB tokens are Java programs")
def test_seven_metrics_with_java_and_their_mean() -> None:
    asked = references([HORSE, "a man on a horse"], [BOAT], ["a red car."])
    said = [HORSE + ".", "Two boats, floating on the calm lake!", ""]
    assert SCORER.details is not None
    found = SCORER.details(said, asked)
    assert list(found) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]
    assert 0 < found["METEOR"] < 1 and 0 < found["BLEU-4"] < 1
    assert SCORER.total(said, asked) == found["CIDEr"]
    assert SCORER.in_mode("compat").total(said, asked) == pytest.approx(sum(found.values()) / 7)
    tokens = _captions._ptb([("A man's horse, brown-ish.\n",), ("",), ("two", "")])
    assert tokens == {0: ["a man 's horse brown-ish"], 1: [""], 2: ["two", ""]}
