"""Quirk by quirk: what the official script makes of an input and what the native rule does, derived by hand.

The official results follow from reading the scripts (docs/scorers.md names them), not from running this
project.
"""

from typing import Any, NamedTuple, cast

import pytest

from delo_eval.scorers.base import Reference, Scorer
from delo_llava.errors import DeloError
from delo_llava.registry import load_plugin, plugin_names


class Case(NamedTuple):
    """One row of the table; `of` is what the reference holds beside its answer."""

    scorer: str
    quirk: str
    prediction: str
    answer: str
    official: float
    native: float
    of: dict[str, Any] = {}


def answers(*pairs: tuple[str, int]) -> dict[str, Any]:
    """Human answers, each with how many gave it."""
    return {"extra": {"answers": [text for text, count in pairs for _ in range(count)]}}


def image(name: str, instruction: str = "") -> dict[str, Any]:
    return {"image": name, "instruction": instruction}


def box(text: str) -> dict[str, Any]:
    return {"extra": {"answer_bbox": text, "size": [640, 480]}}


def several(*texts: str) -> dict[str, Any]:
    """OCRBench's answers to a question about a scene."""
    return {"extra": {"answer_type": "Scene Text-centric VQA", "answers": list(texts)}}


READING = {"extra": {"answer_type": "Handwriting Recognition"}}
FORMULA = {"extra": {"answer_type": "Handwritten Mathematical Expression Recognition"}}
COLI = {"extra": {"choices": ["E. coli", "yeast"]}}
CHOICES = {"extra": {"choices": ["salt", "iron", "wood"]}}
STATES = image("MapQA_7.png", "Which states have the lowest value?")
MAP = image("MapQA_7.png", "What is the value of Ohio?")

CASES = [
    # ScienceQA: the letter itself, before ". ", else the first one-letter word in upper case
    Case("scienceqa", "letter", "B", "B", 1, 1, CHOICES),
    Case("scienceqa", "letter and text", "B. iron", "B", 1, 1, CHOICES),
    Case("scienceqa", "small letter", "b", "B", 1, 1, CHOICES),
    Case("scienceqa", "index as reference", "B", "1", 1, 1, CHOICES),
    Case("scienceqa", "article before the letter", "It is a good idea, B", "B", 0, 1, CHOICES),
    Case("scienceqa", "article is the answer", "It is a good idea, B", "A", 1, 0, CHOICES),
    Case("scienceqa", "pronoun before the letter", "I think C", "C", 0, 1, CHOICES),
    Case("scienceqa", "capital article", "A metal, so B", "B", 0, 1, CHOICES),
    Case("scienceqa", "announced", "The answer is B.", "B", 1, 1, CHOICES),
    Case("scienceqa", "brackets", "(B)", "B", 1, 1, CHOICES),
    Case("scienceqa", "text of the choice", "iron", "B", 0, 1, CHOICES),
    Case("scienceqa", "two letters", "A or B", "A", 1, 0, CHOICES),
    Case("scienceqa", "small letter and text", "b. some iron", "B", 1, 1, CHOICES),
    Case("scienceqa", "small letter in brackets", "(b) iron", "B", 1, 1, CHOICES),
    Case("scienceqa", "small letter announced", "the answer is b.", "B", 1, 1, CHOICES),
    Case("scienceqa", "article announced", "the answer is a metal", "A", 1, 0, CHOICES),
    Case(
        "scienceqa", "no such option in front", "E. coli", "A", 0, 1, {"extra": {"choices": ["E. coli", "x"]}}
    ),
    Case("scienceqa", "nothing said", "", "A", 0, 0, CHOICES),
    # TextVQA: ten answers, each left out once, M4C's normaliser
    Case("textvqa", "one of ten", "yes", "yes", 0.3, 0.3, answers(("yes", 1), ("no", 9))),
    Case("textvqa", "two of ten", "yes", "yes", 0.6, 0.6, answers(("yes", 2), ("no", 8))),
    Case("textvqa", "three of ten", "yes", "yes", 0.9, 0.9, answers(("yes", 3), ("no", 7))),
    Case("textvqa", "four of ten", "yes", "yes", 1, 1, answers(("yes", 4), ("no", 6))),
    Case("textvqa", "case, article, period", "The Dog.", "dog", 1, 1, answers(("dog", 10))),
    Case("textvqa", "number word", "two", "2", 1, 1, answers(("2", 10))),
    Case("textvqa", "32 periods", "x" + "." * 32, "x", 1, 1, answers(("x", 10))),
    Case("textvqa", "33 periods", "x" + "." * 33, "x", 0, 1, answers(("x", 10))),
    Case("textvqa", "period after a digit", "3.", "3", 1, 1, answers(("3", 10))),
    Case("textvqa", "decimal point", "3.5", "35", 0, 0, answers(("35", 10))),
    Case("textvqa", "comma lost", "red,blue", "red blue", 0, 1, answers(("red blue", 10))),
    Case("textvqa", "thousands", "1,000", "1000", 1, 1, answers(("1000", 10))),
    Case("textvqa", "'s parted", "what's", "whats", 0, 1, answers(("whats", 10))),
    Case("textvqa", "'s parted on both sides", "Joe's", "joe's", 1, 1, answers(("joe's", 10))),
    Case("textvqa", "contraction", "dont", "don't", 1, 1, answers(("don't", 10))),
    Case("textvqa", "key in capitals", "im", "i'm", 0, 1, answers(("i'm", 10))),
    Case("textvqa", "reversed entry", "somebody'd", "somebodyd", 1, 1, answers(("somebodyd", 10))),
    Case("textvqa", "mark between letters", "x-y", "x y", 1, 1, answers(("x y", 10))),
    Case("textvqa", "mark touching a space elsewhere", "x-y - z", "x y z", 0, 1, answers(("x y z", 10))),
    Case("textvqa", "empty equals an article", "", "the", 1, 0, answers(("the", 10))),
    Case("textvqa", "empty equals marks", "", "red", 0.6, 0, answers(("?", 2), ("red", 8))),
    Case("textvqa", "marks equal articles", "?!", "a", 0.9, 0, answers(("an", 3), ("red", 7))),
    # VQAv2: both sides normalised where the answers differ, else compared as written
    Case("vqav2", "two of ten", "yes", "yes", 0.6, 0.6, answers(("yes", 2), ("no", 8))),
    Case("vqav2", "number word where all agree", "2", "two", 0, 1, answers(("two", 10))),
    Case("vqav2", "number word where they differ", "2", "two", 1, 1, answers(("two", 9), ("3", 1))),
    Case("vqav2", "capital where all agree", "Yes", "yes", 0, 1, answers(("yes", 10))),
    Case("vqav2", "capital in both", "Yes", "Yes", 1, 1, answers(("Yes", 10))),
    Case("vqav2", "agreed answers keep marks", "t-shirt", "t-shirt", 1, 1, answers(("t-shirt", 10))),
    Case(
        "vqav2", "differing answers lose marks", "t shirt", "t-shirt", 1, 1, answers(("t-shirt", 9), ("a", 1))
    ),
    Case("vqav2", "blanks around and line ends go", " a\nb", "a b", 1, 1, answers(("a b ", 10))),
    Case("vqav2", "32 periods", "x" + "." * 32, "x", 1, 1, answers(("x", 9), ("y", 1))),
    Case("vqav2", "33 periods", "x" + "." * 33, "x", 0, 1, answers(("x", 9), ("y", 1))),
    Case("vqav2", "digit comma removes all marks", "1,000-x", "1000x", 1, 0, answers(("1000x", 9), ("y", 1))),
    # VizWiz's own: answers as written
    Case("vizwiz", "two of ten", "red", "red", 0.6, 0.6, answers(("red", 2), ("blue", 8))),
    Case("vizwiz", "answers keep articles", "the cat", "the cat", 0, 1, answers(("the cat", 10))),
    Case("vizwiz", "answers keep marks", "t-shirt", "t-shirt", 0, 1, answers(("t-shirt", 9), ("top", 1))),
    Case("vizwiz", "unanswerable", "Unanswerable.", "unanswerable", 1, 1, answers(("unanswerable", 10))),
    # exact rules of CoIN and UCIT
    *(
        case
        for name in ("vizwiz_exact", "vqav2_exact", "ucit_exact")
        for case in (
            Case(name, "case", "RED", "red", 1, 1),
            Case(name, "period", "red.", "red", 0, 1),
            Case(name, "blank", " red", "red", 0, 1),
            Case(name, "blanks in both", " red", " red", 1, 1),
            Case(name, "other word", "dark red", "red", 0, 0),
        )
    ),
    # GQA
    Case("gqa", "period and case", "Yes.", "yes", 1, 1),
    Case("gqa", "all periods go", "yes..", "yes", 1, 1),
    Case("gqa", "a leading space stays", " yes", "yes", 0, 1),
    Case("gqa", "a space in both", " yes", " yes", 1, 1),
    Case("gqa", "trailing space keeps the period", "yes. ", "yes", 0, 1),
    Case("gqa", "reference keeps its case", "Yes", "Yes", 0, 1),
    # ImageNet
    Case("imagenet", "name within", "a tabby cat", "tabby cat", 1, 1),
    Case("imagenet", "part of the name", "tabby", "tabby cat", 1, 1),
    Case("imagenet", "empty", "", "tabby cat", 1, 0),
    Case("imagenet", "case", "Tabby cat", "tabby cat", 0, 1),
    Case("imagenet", "part of a word", "caterpillar", "cat", 1, 0),
    Case("imagenet", "one letter", "a", "tabby", 1, 0),
    Case("imagenet", "several names", "a kitty", "cat", 0, 1, answers(("cat", 1), ("kitty", 1))),
    # Grounding
    Case("grounding", "perfect", "[0.10, 0.20, 0.60, 0.80]", "", 1, 1, box("[0.10, 0.20, 0.60, 0.80]")),
    Case(
        "grounding", "three decimals", "[0.100, 0.200, 0.600, 0.250]", "", 1, 1, box("[0.1, 0.2, 0.6, 0.25]")
    ),
    Case("grounding", "y2 loses a digit", "[0.00, 0.10, 0.50, 0.19]", "", 0, 1, box("[0.0, 0.1, 0.5, 0.19]")),
    Case("grounding", "y2 loses a digit, thin", "[0.00, 0.00, 1.00, 0.09]", "", 0, 1, box("[0, 0, 1, 0.09]")),
    Case(
        "grounding",
        "y2 loses a digit, just enough",
        "[0.0, 0.0, 0.5, 0.19]",
        "",
        1,
        1,
        box("[0, 0, 0.5, 0.19]"),
    ),
    Case("grounding", "1.00 becomes .00", "[1.00, 0.20, 0.60, 0.80]", "", 1, 0, box("[0.0, 0.2, 0.6, 0.8]")),
    Case("grounding", "no brackets", "0.10, 0.20, 0.60, 0.80", "", 1, 1, box("[0.1, 0.2, 0.6, 0.8]")),
    Case(
        "grounding",
        "a leading space saves x1",
        " [1.00, 0.20, 0.60, 0.80]",
        "",
        0,
        0,
        box("[0, 0.2, 0.6, 0.8]"),
    ),
    Case(
        "grounding", "a period saves y2", "[0.00, 0.10, 0.50, 0.19].", "", 1, 1, box("[0.0, 0.1, 0.5, 0.19]")
    ),
    Case("grounding", "half is not enough", "[0.00, 0.00, 1.00, 0.500]", "", 0, 0, box("[0, 0, 1, 1]")),
    Case("grounding", "words around", "It is [0.1, 0.2, 0.6, 0.8]", "", 0, 1, box("[0.1, 0.2, 0.6, 0.8]")),
    Case("grounding", "five numbers", "[0.1, 0.2, 0.6, 0.8, 0.9]", "", 0, 0, box("[0.1, 0.2, 0.6, 0.8]")),
    Case("grounding", "unreadable", "left side", "", 0, 0, box("[0.1, 0.2, 0.6, 0.8]")),
    Case("grounding", "empty", "", "", 0, 0, box("[0.1, 0.2, 0.6, 0.8]")),
    # OCR-VQA
    Case("ocrvqa", "case", "YES", "yes", 1, 1),
    Case("ocrvqa", "period", "yes.", "yes", 0, 1),
    Case("ocrvqa", "refusal that is right", "Unanswerable", "Unanswerable", 0, 1),
    Case("ocrvqa", "refusal without its capital", "unanswerable", "Unanswerable", 1, 1),
    # MLLM-DCL
    *(
        case
        for name in ("mllm_dcl_rs", "mllm_dcl_ad")
        for case in (
            Case(name, "word", "It is a cat.", "Cat", 1, 1),
            Case(name, "one side: start of a word", "a caterpillar", "cat", 1, 0),
            Case(name, "one side: end of a word", "tomcat there", "cat", 1, 0),
            Case(name, "inside a word", "a concatenation", "cat", 0, 0),
            Case(name, "no space: any substring", "catfish", "cat", 1, 0),
            Case(name, "period in the answer", "about 2 cars", "2.", 1, 1),
            Case(name, "before a comma", "xcat, dog", "cat", 1, 0),
            Case(name, "phrase as substring", "a red cart", "red car", 1, 0),
            Case(name, "refusal", "Unanswerable, cat", "cat", 0, 1),
        )
    ),
    Case("mllm_dcl_med", "word", "No, it is not.", "no", 1, 1),
    Case("mllm_dcl_med", "substring", "not known", "no", 1, 0),
    Case("mllm_dcl_med", "refusal", "Unanswerable: no", "no", 0, 1),
    Case("mllm_dcl_sci", "exact set", "b", "B", 1, 1, image("AI2D_12.png")),
    Case("mllm_dcl_sci", "exact set, period", "B.", "B", 0, 1, image("TQA_1.png")),
    Case("mllm_dcl_sci", "exact set, within", "it is B", "B", 0, 0, image("SciVerse_1.png")),
    Case("mllm_dcl_sci", "exact set, refusal", "Unanswerable", "Unanswerable", 0, 1, image("VQA_1.png")),
    Case("mllm_dcl_sci", "map, substring", "below average", "low", 1, 0, MAP),
    Case("mllm_dcl_sci", "states", "Ohio, Texas", "Ohio, Texas", 1, 1, STATES),
    Case("mllm_dcl_sci", "states, half", "Ohio", "Ohio, Texas", 0.5, 0.5, STATES),
    Case("mllm_dcl_sci", "states, other order", "Texas, Ohio", "Ohio, Texas", 0, 1, STATES),
    Case("mllm_dcl_sci", "states without blanks", "Ohio,Texas", "Ohio, Texas", 0.5, 1, STATES),
    Case("mllm_dcl_fin", "spaces and periods", "B. ", "b", 1, 1),
    Case("mllm_dcl_fin", "decimal point", "35", "3.5", 0, 0),
    Case("mllm_dcl_fin", "same number", "3.5", "3.5", 0, 1),
    Case("mllm_dcl_fin", "several periods", "b...", "B", 1, 1),
    Case("mllm_dcl_fin", "space in the answer", "not sure", "not sure", 0, 1),
    Case("mllm_dcl_fin", "refusal", "Unanswerable", "unanswerable", 0, 1),
    # MLLM-ACL
    Case("mllm_acl_ocr", "word", "It says Stop.", "stop", 1, 1, READING),
    Case("mllm_acl_ocr", "part of a word", "nonstop", "stop", 1, 0, READING),
    Case("mllm_acl_ocr", "over a line end", "sto\np", "stop", 1, 0, READING),
    Case("mllm_acl_ocr", "one of several", "halt", "stop", 1, 1, several("stop", "halt")),
    Case("mllm_acl_ocr", "none of several", "go", "stop", 0, 0, several("stop", "halt")),
    Case("mllm_acl_ocr", "formula, blanks", "x ^ 2 + 1", "x^2+1", 1, 1, FORMULA),
    Case("mllm_acl_ocr", "formula, marks around", "$x^2+1$.", "x^2+1", 1, 1, FORMULA),
    Case("mllm_acl_ocr", "formula, part of another", "x^2+1", "2", 1, 0, FORMULA),
    Case("mllm_acl_ocr", "formula, case", "X^2", "x^2", 0, 0, FORMULA),
    Case("mllm_acl_vp", "letter", "(B)", "B", 1, 1),
    Case("mllm_acl_vp", "letter within words", "a cat", "C", 1, 0),
    Case("mllm_acl_vp", "bracketed reference", "B", "(B)", 0, 1),
    Case("mllm_acl_vp", "number", "There are 3.", "3", 1, 1),
    Case("mllm_acl_vp", "digit of another number", "13", "3", 1, 0),
    Case("mllm_acl_vp", "blanks go", "on the left", "on theleft", 1, 0),
    # POLARIS
    Case("contains", "word", "it is no good", "no", 1, 1, {"task": "gqa"}),
    Case("contains", "substring", "I do not know", "no", 1, 0, {"task": "gqa"}),
    Case("contains", "named task is exact", "two cats", "cats", 0, 0, {"task": "iconqa"}),
    Case("contains", "named task, case and blanks", " Cats ", "cats", 1, 1, {"task": "ai2d"}),
    Case("contains", "named task, period", "cats.", "cats", 0, 1, {"task": "imagenet"}),
    # ANLS
    Case("anls", "one letter off", "abcx", "abcd", 0.75, 0.75),
    Case("anls", "half", "abxy", "abcd", 0.5, 0),
    Case("anls", "less than half", "axyz", "abcd", 0, 0),
    Case("anls", "blanks lengthen", "axyz    ", "abcd", 0.625, 0),
    Case("anls", "case and blanks", " ABCD", "abcd", 1, 1),
    Case("anls", "closest answer", "abcx", "zzzz", 0.75, 0.75, answers(("zzzz", 1), ("abcd", 1))),
    Case("anls", "empty", "", "a", 0, 0),
    Case("trigap_anls", "less than half", "axyz", "abcd", 0.25, 0),
    Case("trigap_anls", "half", "abxy", "abcd", 0.5, 0),
    Case("trigap_anls", "nothing shared", "wxyz", "abcd", 0, 0),
    Case("trigap_anls", "inner blanks", "ab  cd", "ab cd", 1 - 1 / 6, 1),
    Case("trigap_anls", "case and blanks", " ABCD", "abcd", 1, 1),
    Case("trigap_anls", "closest answer", "1.0", "zzzz", 0.25, 0, answers(("zzzz", 1), ("0.28", 1))),
    Case("trigap_anls", "empty", "", "a", 0, 0),
    # ChartQA
    Case("relaxed_accuracy", "five per cent", "105", "100", 1, 1),
    Case("relaxed_accuracy", "six per cent", "106", "100", 0, 0),
    Case("relaxed_accuracy", "per cent mark added", "95%", "100", 0, 1),
    Case("relaxed_accuracy", "share for a per cent", "0.5", "50%", 1, 1),
    Case("relaxed_accuracy", "per cent mark left out", "50", "50%", 0, 1),
    Case("relaxed_accuracy", "zero written otherwise", "0.0", "0", 0, 1),
    Case("relaxed_accuracy", "near zero", "0.01", "0", 0, 0),
    Case("relaxed_accuracy", "thousands comma", "1,000", "1000", 0, 1),
    Case("relaxed_accuracy", "underscore read by float()", "1_0", "10", 1, 0),
    Case("relaxed_accuracy", "exponent", "1e2", "100", 1, 1),
    Case("relaxed_accuracy", "words", "Yes", "yes", 1, 1),
    Case("relaxed_accuracy", "words with a period", "yes.", "yes", 0, 1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.scorer}: {case.quirk}")
def test_official_and_native_results(case: Case) -> None:
    scorer = cast(Scorer, load_plugin("scorer", case.scorer))
    reference = Reference("q", case.answer, **case.of)
    assert scorer.in_mode("native")(case.prediction, reference) == pytest.approx(case.native)
    assert scorer.in_mode("compat")(case.prediction, reference) == pytest.approx(case.official)


def test_every_scorer_with_an_official_rule_is_in_the_table() -> None:
    scorers = {name: cast(Scorer, load_plugin("scorer", name)) for name in plugin_names("scorer")}
    elsewhere = {"caption", "mif"}  # test_caption_scorers.py, test_mif.py
    assert {name for name, scorer in scorers.items() if scorer.compat} - elsewhere == {
        c.scorer for c in CASES
    }
    ids = [one.id for scorer in scorers.values() for one in (scorer, scorer.compat) if one]
    assert len(set(ids)) == len(ids)


def test_m4c_takes_exactly_ten_answers_and_the_native_rule_any_number() -> None:
    scorer = cast(Scorer, load_plugin("scorer", "textvqa"))
    for count, native in ((1, 1.0), (2, 1.0), (3, 1.0), (9, 1.0), (11, 1.0)):
        reference = Reference("q", "red", extra={"answers": ["red"] * count})
        assert scorer("red", reference) == native
        with pytest.raises(DeloError, match="exactly 10"):
            scorer.in_mode("compat")("red", reference)


def test_answers_may_be_the_objects_of_the_official_files() -> None:
    rows = [{"answer": "red", "answer_id": i} for i in range(2)] + [{"answer": "blue", "answer_id": 3}] * 8
    scorer = cast(Scorer, load_plugin("scorer", "vqav2"))
    reference = Reference("q", "blue", extra={"answers": rows})
    assert scorer("red", reference) == pytest.approx(0.6)
    assert scorer.in_mode("compat")("red", reference) == pytest.approx(0.6)


def test_a_perfect_box_of_two_decimals_is_sometimes_wrong_officially_and_one_of_three_never() -> None:
    scorer = cast(Scorer, load_plugin("scorer", "grounding"))
    boxes = [
        (x, y, x + 0.3, y + h) for x in (0.0, 0.2, 0.5) for y in (0.05, 0.31, 0.5) for h in (0.06, 0.2, 0.45)
    ]
    for digits, lost in ((2, True), (3, False)):
        texts = ["[" + ", ".join(f"{value:.{digits}f}" for value in each) + "]" for each in boxes]
        references = [Reference(str(i), "", extra={"answer_bbox": text}) for i, text in enumerate(texts)]
        assert scorer.total(texts, references) == 1.0
        assert (scorer.in_mode("compat").total(texts, references) < 1.0) is lost


@pytest.mark.parametrize("given", ["left", "[1, 2, 3]", "", [1, 2], "[a, b, c, d]"])
def test_a_reference_that_is_no_box_is_an_error(given: Any) -> None:
    scorer = cast(Scorer, load_plugin("scorer", "grounding"))
    with pytest.raises(DeloError, match=r"\[x1, y1, x2, y2\]"):
        scorer("[0, 0, 1, 1]", Reference("q", "", extra={"answer_bbox": given}))


def test_a_multiple_choice_reference_that_is_no_letter_is_an_error() -> None:
    scorer = cast(Scorer, load_plugin("scorer", "scienceqa"))
    with pytest.raises(DeloError, match="letter or an index"):
        scorer("A", Reference("q", "iron"))


def test_scorers_that_need_more_of_a_record_say_what_is_lacking() -> None:
    scorer = cast(Scorer, load_plugin("scorer", "textvqa"))
    good = Reference("a", "red", extra={"answers": ["red"] * 10})
    scorer.check([good])
    with pytest.raises(DeloError, match="1 of 2 have none") as told:
        scorer.check([good, Reference("b", "red")])
    assert "answers" in str(told.value) and "given:   b" in str(told.value)


@pytest.mark.parametrize(
    ("said", "answer", "score"),
    [("The answer is 14.", "14", 1), ("114", "14", 0), ("(B)", "B", 1), ("a cat", "C", 0), ("", "yes", 0)],
)
def test_option_or_words_has_no_official_rule(said: str, answer: str, score: float) -> None:
    scorer = cast(Scorer, load_plugin("scorer", "option_or_words"))
    assert scorer(said, Reference("q", answer)) == score
    with pytest.raises(DeloError, match="no official script"):
        scorer.in_mode("compat")
