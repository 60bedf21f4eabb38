"""mini-llava: the weights load as stock classes; the recipe runs, resumes and sees train entities only."""

import hashlib
import json
import re
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessorPil, LlamaTokenizer, LlavaForConditionalGeneration, LlavaProcessor

from delo_llava.mini import entities, render
from delo_llava.mini.entities import split_of
from delo_llava.mini.pretrain import corpus, joint, language, mixture, pictures, tokenizer, tower
from delo_llava.mini.pretrain.loop import Plan, Stage, train
from delo_llava.mini.pretrain.talk import Talk, render_prompt

ASSETS = Path(str(files("delo_llava.mini").joinpath("assets", "mini_llava")))


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(ASSETS).eval()


@pytest.fixture(scope="module")
def words() -> LlamaTokenizer:
    return LlamaTokenizer.from_pretrained(ASSETS, add_bos_token=True)


@pytest.fixture(scope="module")
def processor(words: LlamaTokenizer) -> LlavaProcessor:
    made = LlavaProcessor.from_pretrained(
        ASSETS, image_processor=CLIPImageProcessorPil.from_pretrained(ASSETS)
    )
    made.tokenizer = words
    return made


def test_checksums_and_size():
    listed = dict(reversed(line.split("  ")) for line in (ASSETS / "SHA256SUMS").read_text().splitlines())
    present = {p.name for p in ASSETS.iterdir()} - {"SHA256SUMS"}
    assert set(listed) == present
    for name, digest in listed.items():
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest
    assert sum(p.stat().st_size for p in ASSETS.iterdir()) <= 9_000_000


def test_parameters_and_widths_for_four_bit(model):
    assert 1_500_000 <= sum(p.numel() for p in model.parameters()) <= 5_000_000
    assert json.loads((ASSETS / "metrics.json").read_text())["parameters"] == sum(
        p.numel() for p in model.parameters()
    )
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            assert module.in_features % 64 == 0 and module.out_features % 64 == 0, name


def test_bos_capitals_and_newline(words):
    pieces = words.convert_ids_to_tokens(
        words("USER: <image>\nContext: MANGO\nwhich ASSISTANT: MANGO</s>")["input_ids"]
    )
    assert pieces[0] == "<s>" and pieces[-1] == "</s>" and pieces.count("<image>") == 1
    assert pieces.count("<0x0A>") == 2 and "which" in pieces and "Context:" in pieces
    assert pieces.count("\u2581M") == 2 and pieces[-6:-1] == ["\u2581M", "A", "N", "G", "O"]
    assert words.decode(words("a red circle", add_special_tokens=False)["input_ids"]) == "a red circle"


def _ask(model, processor, image, prompt):
    inputs = (
        processor(images=image, text=prompt, return_tensors="pt")
        if image
        else processor(text=prompt, return_tensors="pt")
    )
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.tokenizer.decode(
        out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()


def test_stock_round_trip_reads_a_card_and_a_context(model, processor):
    card = render.letter_card("TABLE", np.random.default_rng(3))
    inputs = processor(images=card, text="USER: <image>\nspell the card. ASSISTANT:", return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 16
    assert _ask(model, processor, card, "USER: <image>\nspell the card. ASSISTANT:") == "TABLE"
    assert _ask(model, processor, None, "USER: Context: a copy: TABLE\nspell the card. ASSISTANT:") == "TABLE"


def test_stock_forward_equals_training_forward(model, processor, words):
    """Kept tower features give the logits that the stock model computes from the picture."""
    image = render.letter_card("TABLE", np.random.default_rng(3))
    batch, _ = joint.rows([(Talk("card", (("spell the card.", "TABLE"),)), 0)], words, 0.0)
    pixels = tower.pixel_values(np.array(image)[None])
    with torch.no_grad():
        features = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        ours = model.lm_head(joint.hidden_states(model, batch, features))
        text = render_prompt(Talk("card", (("spell the card.", "TABLE"),)), picture=True)[0]
        stock = model(**processor(images=image, text=text, return_tensors="pt")).logits
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-4)


def test_fold_is_exact():
    torch.manual_seed(0)
    norm, linear = torch.nn.BatchNorm1d(8, affine=False), torch.nn.Linear(8, 5)
    for _ in range(50):
        norm(torch.randn(64, 8) * 3 + 2)
    norm.eval()
    x = torch.randn(7, 8) * 3 + 2
    wanted = linear(norm(x))
    tower.fold(norm, linear)
    torch.testing.assert_close(linear(x), wanted, atol=1e-5, rtol=1e-5)


def test_rows_are_deterministic_and_know_train_entities_only():
    first, second = pictures.pool(7, 100), pictures.pool(7, 100)
    assert np.array_equal(first.pixels, second.pixels) and first.truths == second.truths
    rng, again = np.random.default_rng(5), np.random.default_rng(5)
    talks = [mixture.picture_talk(rng, t) for t in first.truths] + [
        mixture.text_talk(rng) for _ in range(1500)
    ]
    repeated = [mixture.picture_talk(again, t) for t in second.truths] + [
        mixture.text_talk(again) for _ in range(1500)
    ]
    assert talks == repeated
    used = {row.entity for row in (*talks, *first.truths) if row.entity}
    assert {kind for kind, _ in used} >= {"emoji", "country", "digit", "word", "scene"}
    for kind, key in used:
        assert (
            key.split("/")[0] == "train" and split_of(kind, key) != "val"
            if kind == "scene"
            else _allowed(kind, key)
        ), (kind, key)


def _allowed(kind: str, key: str) -> bool:
    """Whether a row may use the entity: a train one, or letters that spell no word of the tasks at all."""
    return split_of(kind, key) == "train" or (kind == "word" and key not in entities.words())


def test_no_row_spells_or_names_a_held_out_entity():
    rng = np.random.default_rng(11)
    spelled = {w.upper() for w in entities.words() if split_of("word", w) != "train"}
    names = {e.name for e in entities.emoji() if split_of("emoji", e.name) != "train"}
    lands = {c.name for c in entities.countries() if split_of("country", c.name) != "train"}
    for _ in range(4000):
        talk = mixture.text_talk(rng)
        assert not {a for _, a in talk.turns} & (spelled | names | lands)


def test_instructions_are_not_those_of_the_tasks():
    wanted = set()
    for task in ("ocr", "attribute", "geography", "naming", "science"):
        found = import_module(f"delo_llava.mini.tasks.{task}").INSTRUCTIONS
        wanted |= {
            _plain(i) for part in (found.values() if isinstance(found, dict) else [found]) for i in part
        }
    rng, pool = np.random.default_rng(2), pictures.pool(2, 300)
    talks = [mixture.picture_talk(rng, t) for t in pool.truths] + [
        mixture.text_talk(rng) for _ in range(3000)
    ]
    asked = {_plain(instruction) for talk in talks for instruction, _ in talk.turns}
    assert len(asked) > 100 and not asked & wanted


def _plain(instruction: str) -> str:
    """An instruction without its options."""
    return re.sub(r"\{options\}|[A-E]\. [a-z]+( [a-z]+)? ?", "", instruction).strip()


def test_drills_can_be_solved_from_their_rows(words):
    yes, no = language.pieces(words, ["\u2581yes", "\u2581no"])
    for step in range(20):
        batch = language.drill(words, 0, step, 4)
        for ids, weights in zip(batch.ids.tolist(), batch.weights.tolist(), strict=True):
            for place in (i for i, weight in enumerate(weights) if weight):
                told = ids[: place - 1] if ids[place] not in (yes, no) else [yes, no]
                assert ids[place] in told


def test_selection_wants_the_letter_before_the_word(words):
    for step in range(5):
        batch = language.selection(words, 0, step, 4)
        for ids, weights in zip(batch.ids.tolist(), batch.weights.tolist(), strict=True):
            begin = 3
            for place in (i for i, weight in enumerate(weights) if weight):
                assert ids[ids.index(ids[1], begin) - 2] == ids[place]
                begin = place + 1


def test_answers_and_only_answers_weigh_one(words):
    talk = Talk("x", (("name it.", "red circle"), ("again?", "no")), "a note")
    batch, _ = joint.rows([(talk, 0)], words, 0.2)
    answers = batch.ids[0][batch.weights[0] == 1].tolist()
    assert words.convert_ids_to_tokens(answers) == ["\u2581red", "\u2581circle", "</s>", "\u2581no", "</s>"]
    assert float(batch.weights[0][batch.ids[0] == language.pieces(words, ["<image>"])[0]].sum()) == 0


def test_loop_resumes_where_it_was_killed(tmp_path):
    def stage_loss(model, log):
        def loss(step: int) -> torch.Tensor:
            log.append(step)
            return (model.weight - step % 3).square().sum()

        return loss

    def build():
        torch.manual_seed(0)
        return torch.nn.Linear(2, 2)

    plan, whole, steps = Plan(20, 60.0, 1e-2), build(), []
    train(Stage(tmp_path / "a"), whole, stage_loss(whole, steps), dict, plan)
    cut, seen = build(), []

    def dies(step: int) -> torch.Tensor:
        if step == 12:
            raise KeyboardInterrupt
        return stage_loss(cut, seen)(step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("delo_llava.mini.pretrain.loop.SAVE_EVERY", 0.0)
        with pytest.raises(KeyboardInterrupt):
            train(Stage(tmp_path / "b"), cut, dies, dict, plan)
    rest, resumed = build(), []
    train(Stage(tmp_path / "b"), rest, stage_loss(rest, resumed), dict, plan)
    assert resumed == list(range(12, 20)) and steps == list(range(20))
    torch.testing.assert_close(rest.weight, whole.weight)


def test_tiny_recipe_runs_and_a_finished_stage_is_not_run_again(tmp_path, monkeypatch):
    main = import_module("delo_llava.mini.pretrain.__main__")
    command = ["pretrain", "--output", str(tmp_path), "--scale", "0.0005", "--threads", "1"]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr(main, "PICTURES", 40)
    main.main()
    made = tmp_path / "mini_llava"
    LlavaForConditionalGeneration.from_pretrained(made)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/done.json")}
    assert len(stamps) == 3
    main.main()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/done.json")} == stamps


def test_tokenizer_training_is_deterministic(tmp_path):
    for name in ("a", "b"):
        tokenizer.train(corpus.lines(0, talks=200), 1200, tmp_path / name)
    assert (tmp_path / "a/tokenizer.model").read_bytes() == (tmp_path / "b/tokenizer.model").read_bytes()
