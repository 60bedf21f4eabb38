"""Scorers against naive second implementations of the rules, over many random texts; corpus rules by hand."""

import random
import re
from collections.abc import Sequence
from functools import cache
from itertools import pairwise, product

import pytest

from delo_eval.scorers import (
    _vqa,
    anls,
    gqa,
    grounding,
    imagenet,
    mllm_dcl_rs,
    multilabel_f1,
    ocrvqa,
    scienceqa,
)
from delo_eval.scorers._text import has_phrase, phrase
from delo_eval.scorers.base import Reference
from delo_eval.scorers.textvqa import SCORER as TEXTVQA
from delo_eval.scorers.vizwiz import SCORER as VIZWIZ
from delo_eval.scorers.vqav2 import SCORER as VQAV2

ALPHABET = [
    *["a", "A", "the", "two", "none", "x", "yes", "dont", "im", "cat", "1", "0", " ", " ", ".", ",", "?"],
    *["'", "'s", "-", "/", "\n", "\t", "[", "]", "!", ":", "’"],
]
MARKS = ";/[]{}()=+\\_-><@`,?!" + '"'
COUNTED = "zero one two three four five six seven eight nine ten"


def texts(count: int, seed: int, longest: int = 7) -> list[str]:
    """Random texts over pieces that matter to the rules, with repetitions so that they often meet."""
    draw = random.Random(seed)
    return ["".join(draw.choices(ALPHABET, k=draw.randint(0, longest))) for _ in range(count)]


def naive_normaliser(text: str, m4c: bool) -> str:
    """The official normaliser step by step, as the specification tells it."""
    if m4c:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.strip().replace("\n", " ").replace("\t", " ").strip()
    result = text
    for mark in MARKS:
        touches = (mark + " ") in text or (" " + mark) in text or re.search(r"\d,\d", text)
        result = "".join(("" if touches else " ") if c == mark else c for c in result)
    kept, removed = "", 0
    for i, c in enumerate(result):
        if c == "." and not result[i + 1 : i + 2].isdigit() and removed < 32:
            removed += 1
        else:
            kept += c
    numbers = {word: digit for digit, word in enumerate(COUNTED.split())} | {"none": 0}
    said = [str(numbers.get(word, word)) for word in kept.lower().split()]
    said = [word for word in said if word not in ("a", "an", "the")]
    return " ".join("don't" if word == "dont" else word for word in said)


def naive_accuracy(said: str, answers: Sequence[str]) -> float:
    """Leave one out, literally."""
    shares = []
    for left_out in range(len(answers)):
        others = [answer for i, answer in enumerate(answers) if i != left_out]
        shares.append(min(1.0, sum(answer == said for answer in others) / 3))
    return sum(shares) / len(shares)


def test_official_normalisers_against_a_naive_one() -> None:
    for text in [*texts(4000, 1), *texts(40, 2, longest=120)]:
        assert _vqa.official_m4c(text) == naive_normaliser(text, m4c=True), repr(text)
        assert _vqa.official_prediction(text) == naive_normaliser(text, m4c=False), repr(text)


def test_ten_answer_rules_against_naive_ones() -> None:
    draw, pool = random.Random(3), texts(30, 4, longest=2)
    for _ in range(1500):
        few = draw.sample(pool, draw.randint(1, 4))
        answers, said = draw.choices(few, k=10), draw.choice([*few, draw.choice(pool)])
        reference = Reference("q", answers[0], extra={"answers": answers})
        m4c = naive_accuracy(
            naive_normaliser(said, True), [naive_normaliser(answer, True) for answer in answers]
        )
        assert TEXTVQA.in_mode("compat")(said, reference) == pytest.approx(m4c)
        bare = naive_normaliser(said, False)
        assert VIZWIZ.in_mode("compat")(said, reference) == pytest.approx(naive_accuracy(bare, answers))
        spaced = [" ".join(text.replace("\t", "\n").split("\n")).strip() for text in (said, *answers)]
        if len(set(spaced[1:])) > 1:
            spaced = [naive_normaliser(text, False) for text in spaced]
        assert VQAV2.in_mode("compat")(said, reference) == pytest.approx(
            naive_accuracy(spaced[0], spaced[1:])
        )
        native = _vqa.normalise(said)
        expected = naive_accuracy(native, [_vqa.normalise(answer) for answer in answers]) if native else 0.0
        assert (
            TEXTVQA(said, reference)
            == pytest.approx(expected)
            == VQAV2(said, reference)
            == VIZWIZ(said, reference)
        )


def test_the_native_normaliser_is_stable_and_forgets_case_marks_and_articles() -> None:
    for text in texts(3000, 5):
        once = _vqa.normalise(text)
        assert _vqa.normalise(once) == once, repr(text)
        assert _vqa.normalise(text.upper()) == once
        if not set(once.split()) <= {"a", "an", "the"}:
            assert _vqa.normalise(f"The {text} ;") == once


def test_letters_against_a_naive_reader() -> None:
    for text in texts(3000, 6):
        first = next(iter(re.findall(r"\b(\w)\b", text)), "failed")
        expected = (
            text if text in list("ABCDE") else text[0] if re.match(r"[A-E]\. ", text) else first.upper()
        )
        assert scienceqa.official_choice(text) == expected, repr(text)


def test_exact_and_containment_rules_against_naive_ones() -> None:
    for said, wanted in pairwise(texts(6000, 7, longest=3)):
        reference = Reference("q", wanted)
        assert imagenet.official(said, reference) == (said in wanted or wanted in said)
        bare = said
        while bare.endswith("."):
            bare = bare[:-1]
        assert gqa.official(said, reference) == (bare.lower() == wanted)
        assert ocrvqa.official(said, reference) == (said.lower() == wanted.lower())
        low, gold = said.lower(), wanted.lower()
        if " " not in gold:
            gold = gold.replace(".", "")
            if " " in low:
                right = any(p + gold + n in low for p, n in ((" ", ""), ("", " "), ("", "."), ("", ",")))
            else:
                right = gold in low
        else:
            right = gold in low
        rule = mllm_dcl_rs.SCORER.in_mode("compat")
        assert rule(said, reference) == right, (said, wanted)


def test_phrases_are_whole_words_in_a_row() -> None:
    for said, wanted in product(texts(60, 8, longest=4), repeat=2):
        outer, inner = phrase(said).split(" "), phrase(wanted).split(" ")
        slices = [outer[i : i + len(inner)] for i in range(len(outer))]
        assert has_phrase(said, wanted) == (bool(phrase(wanted)) and inner in slices)


def test_iou_against_counting_cells() -> None:
    draw = random.Random(9)
    for _ in range(300):
        corners = [sorted(draw.sample(range(9), 2)) for _ in range(4)]
        first, second = ((x[0], y[0], x[1], y[1]) for x, y in (corners[:2], corners[2:]))
        cells = [
            {(i, j) for i in range(box[0], box[2]) for j in range(box[1], box[3])} for box in (first, second)
        ]
        expected = len(cells[0] & cells[1]) / len(cells[0] | cells[1])
        assert grounding.iou(first, second) == pytest.approx(expected)


def naive_distance(first: str, second: str) -> int:
    """Levenshtein's recursion, from the ends of both texts."""

    @cache
    def of(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        exchanged = of(i - 1, j - 1) + (first[i - 1] != second[j - 1])
        return min(of(i - 1, j) + 1, of(i, j - 1) + 1, exchanged)

    return of(len(first), len(second))


def test_anls_against_a_naive_distance() -> None:
    for said, wanted in pairwise(texts(3000, 10, longest=4)):
        reference = Reference("q", wanted)
        plain = [" ".join(text.lower().split()) for text in (said, wanted)]
        distance = naive_distance(*plain)
        longest = max(map(len, plain))
        share = distance / longest if plain[0] and longest else 1.0
        assert anls.right(said, reference) == pytest.approx(1 - share if share < 0.5 else 0.0)
        length = max(len(said.upper()), len(wanted.upper()))
        similarity = 1 - (distance / length if length else 0.0)
        assert anls.official(said, reference) == pytest.approx(similarity if similarity >= 0.5 else 0.0)


def test_macro_f1_by_hand() -> None:
    """drama: 2 right of 2 said, 2 true → 1; comedy: 1 of 2 said, 1 true → 2/3; war: 0 said, 1 true → 0."""
    asked = [
        Reference("1", "x", extra={"labels": ["Drama"]}),
        Reference("2", "x", extra={"labels": ["Comedy", "Drama"]}),
        Reference("3", "war"),
    ]
    said = ["drama, Comedy.", "comedy; drama", "sci-fi"]
    assert multilabel_f1.SCORER.total(said, asked) == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert multilabel_f1.details(said, asked) == pytest.approx(
        {"sample F1": (2 / 3 + 1 + 0) / 3, "F1 comedy": 2 / 3, "F1 drama": 1.0, "F1 war": 0.0}
    )
    seen = [
        Reference(r.id, r.answer, extra={**r.extra, "classes": ["Drama", "War", "Horror"]}) for r in asked
    ]
    assert multilabel_f1.SCORER.total(said, seen) == pytest.approx((1 + 0) / 2)


def test_macro_f1_against_scikit_learn() -> None:
    from sklearn.metrics import f1_score
    from sklearn.preprocessing import MultiLabelBinarizer

    draw, names = random.Random(11), ["drama", "comedy", "war", "film noir", "sci fi"]
    wanted = [draw.sample(names, draw.randint(1, 3)) for _ in range(50)]
    said = [draw.sample(names, draw.randint(0, 3)) for _ in range(50)]
    asked = [Reference(str(i), ", ".join(row), extra={"labels": row}) for i, row in enumerate(wanted)]
    binary = MultiLabelBinarizer(classes=sorted(names))
    truth, guess = binary.fit_transform(wanted), binary.transform(said)
    told = [", ".join(row) for row in said]
    assert multilabel_f1.SCORER.total(told, asked) == pytest.approx(f1_score(truth, guess, average="macro"))
    samples = f1_score(truth, guess, average="samples", zero_division=0)
    assert multilabel_f1.details(told, asked)["sample F1"] == pytest.approx(samples)
