"""The shipped bases load as stock models; their recipe runs, resumes and sees train entities only."""

import hashlib
import json
import re
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, CLIPImageProcessorPil, LlavaProcessor

from delo_llava.backbones.base import SHIPPED, Backbone, find_backbone
from delo_llava.data.collate import Collator
from delo_llava.errors import DeloError
from delo_llava.mini import build, entities, render
from delo_llava.mini.entities import split_of
from delo_llava.tasks import Record
from tools.mini_base.pretrain import (
    corpus,
    family,
    follow,
    joint,
    language,
    mixture,
    pictures,
    tokenizer_bytes,
    tower,
)
from tools.mini_base.pretrain.loop import Plan, Stage, train
from tools.mini_base.pretrain.talk import Talk

NAMES = {name: name.removeprefix("mini-") for name in SHIPPED}
CARD = Talk("card", (("spell the card.", "TABLE"),))


@dataclass
class Base:
    """A shipped base, opened by the product's own backbone."""

    folder: Path
    family: family.Family
    tongue: family.Tongue
    backbone: Backbone
    model: Any
    processor: Any

    def inputs(self, image: Path | None, context: str | None, answer: str = "") -> dict[str, torch.Tensor]:
        """Stock inputs that spell the card; those of generation when there is no answer."""
        collator = Collator(self.backbone, self.processor, 256, generation=not answer)
        record = Record("r", "ocr", "train", image, context, "spell the card.", answer or "TABLE")
        return collator.collate([(record, (True, True))]).inputs

    def say(self, image: Path | None, context: str | None) -> str:
        """What stock generation answers."""
        inputs = self.inputs(image, context)
        out = self.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        said = out[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.tokenizer.decode(said, skip_special_tokens=True)).strip()


@pytest.fixture(scope="module", params=list(SHIPPED))
def base(request) -> Base:
    backbone, path = find_backbone(request.param)
    made = family.find(NAMES[request.param])
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    processor = backbone.load_processor(path)
    return Base(Path(path), made, made.load_tokenizer(Path(path)), backbone, model, processor)


@pytest.fixture(scope="module", params=family.NAMES)
def tongue(request, tmp_path_factory) -> family.Tongue:
    """mini-llava's tokenizer, and one of the other family, learned on fewer lines."""
    made = family.find(request.param)
    if request.param == "llava":
        return made.load_tokenizer(Path(find_backbone("mini-llava")[1]))
    folder = tmp_path_factory.mktemp("words")
    made.train_tokenizer(corpus.lines(0, talks=300), 2500, folder)
    return made.load_tokenizer(folder)


@pytest.fixture(scope="module")
def card(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("card") / "card.png"
    render.letter_card("TABLE", np.random.default_rng(3)).save(path)
    return path


@pytest.mark.parametrize("name", SHIPPED)
def test_checksums_and_size(name):
    folder = Path(str(files("delo_llava").joinpath(SHIPPED[name])))
    listed = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    present = {p.name for p in folder.iterdir()} - {"SHA256SUMS"}
    assert set(listed) == present
    for file, digest in listed.items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 9_000_000
    assert json.loads((folder / "recipe.json").read_text())["history"]


def test_parameters_and_widths_for_four_bit(base):
    count = sum(p.numel() for p in base.model.parameters())
    assert 1_500_000 <= count <= 5_000_000
    assert json.loads((base.folder / "metrics.json").read_text())["parameters"] == count
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    for name, module in base.model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            assert module.in_features % 64 == 0 and module.out_features % 64 == 0, name


def test_capitals_are_letters_and_words_and_lines_are_pieces(tongue):
    """A word in capitals is the same letters in a context and as an answer, but for the space before it."""
    talk = Talk("card", (("which word?", "MANGO"),), "MANGO")
    text = tongue.render(talk, picture=True)[0]
    pieces = tongue.tokenizer.convert_ids_to_tokens(tongue.tokenizer(text)["input_ids"])
    assert pieces.count(tongue.image) == 16 and tongue.newline in pieces and "which" in pieces
    joined = " ".join(pieces)
    assert joined.count("A N G O") == 2 and f"{tongue.space}M A N G O" in joined
    assert (pieces[0] == "<s>") == bool(tongue.opening)
    ids = tongue.tokenizer("a red circle", add_special_tokens=False)["input_ids"]
    assert tongue.tokenizer.decode(ids) == "a red circle" and len(ids) == 3


def test_every_piece_that_begins_a_word_has_a_twin(tmp_path):
    tokenizer_bytes.train(corpus.lines(0, talks=200), 1200, tmp_path)
    words = family.find("qwen").load_tokenizer(tmp_path)
    for word in ("red", "yes", "africa", "two", "grounding", "MANGO"):
        bare, spaced = (words.tokenizer(text)["input_ids"] for text in (word, f" {word}"))
        assert bare == [words.begun(spaced[0]), *spaced[1:]]


def test_the_stock_chat_template_says_what_the_backbone_says(base):
    content = [{"type": "image"}, {"type": "text", "text": "Context: a note\nspell the card."}]
    told = base.processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=False,
        chat_template=(base.folder / "chat_template.jinja").read_text(),
    )
    assert base.processor.dialogue == base.backbone.default_dialogue
    pieces = base.processor.dialogue.prompt(base.backbone.image_token, "a note", "spell the card.")
    assert told == "".join(text for text, _ in pieces)


def test_a_card_and_a_context_are_read(base, card):
    assert base.say(card, None) == "TABLE"
    assert base.say(None, "a copy: TABLE") == "TABLE"


def test_stock_llava_processor(card):
    folder = find_backbone("mini-llava")[1]
    made = LlavaProcessor.from_pretrained(
        folder, image_processor=CLIPImageProcessorPil.from_pretrained(folder)
    )
    inputs = made(
        images=Image.open(card), text="USER: <image>\nspell the card. ASSISTANT:", return_tensors="pt"
    )
    assert int((inputs["input_ids"] == made.tokenizer.convert_tokens_to_ids("<image>")).sum()) == 16


def test_stock_forward_equals_training_forward(base, card):
    """Pretraining's rows are the product's prompts; kept tower features give the stock model's logits."""
    batch, _ = joint.rows([(CARD, 0)], base.tongue, 0.0)
    stock = base.inputs(card, None, "TABLE")
    assert stock["input_ids"].tolist() == batch.ids.tolist()
    parts = base.model.model
    vision = getattr(parts, "visual", None) or parts.vision_tower
    with torch.no_grad():
        features = base.family.see(vision, np.array(Image.open(card))[None])
        ours = base.model.lm_head(joint.hidden_states(base.family, base.model, batch, features))
        wanted = base.model(**stock).logits
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


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
    for task in set(build.MINI8.tasks) - {"yesno"}:
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


def test_drills_can_be_solved_from_their_rows(tongue):
    twins = getattr(tongue, "twins", {})
    yes_no = tongue.pieces([" yes", " no"])
    yes_no += [tongue.begun(piece) for piece in yes_no]
    for step in range(20):
        batch = language.drill(tongue, 0, step, 4)
        for ids, weights in zip(batch.ids.tolist(), batch.weights.tolist(), strict=True):
            for place in (i for i, weight in enumerate(weights) if weight):
                told = ids[: place - 1] + [twins.get(piece, piece) for piece in ids[: place - 1]]
                assert ids[place] in (yes_no if ids[place] in yes_no else told)


def test_selection_wants_the_letter_before_the_word(tongue):
    first = len(tongue.opening)
    for step in range(5):
        batch = language.selection(tongue, 0, step, 4)
        for ids, weights in zip(batch.ids.tolist(), batch.weights.tolist(), strict=True):
            begin = first + 2
            for place in (i for i, weight in enumerate(weights) if weight):
                letter = ids[ids.index(ids[first], begin) - 2]
                assert ids[place] in (letter, tongue.begun(letter))
                begin = place + 1


def test_answers_and_only_answers_weigh_one(tongue):
    talk = Talk("x", (("name it.", "red circle"), ("again?", "no")), "a note")
    batch, _ = joint.rows([(talk, 0)], tongue, 0.2)
    answers = batch.ids[0][batch.weights[0] == 1].tolist()
    closed = tongue.tokenizer.eos_token
    first, second = tongue.tokenizer.decode(answers).split(closed)[:2]
    assert (first.strip(), second.strip()) == ("red circle", "no")
    assert tongue.tokenizer.convert_ids_to_tokens(answers).count(closed) == 2 and len(answers) == 5
    assert float(batch.weights[0][batch.ids[0] == tongue.image_id].sum()) == 0


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
        patch.setattr("tools.mini_base.pretrain.loop.SAVE_EVERY", 0.0)
        with pytest.raises(KeyboardInterrupt):
            train(Stage(tmp_path / "b"), cut, dies, dict, plan)
    rest, resumed = build(), []
    train(Stage(tmp_path / "b"), rest, stage_loss(rest, resumed), dict, plan)
    assert resumed == list(range(12, 20)) and steps == list(range(20))
    torch.testing.assert_close(rest.weight, whole.weight)


@pytest.mark.parametrize(("name", "start"), [("llava", "scratch"), ("qwen", "mini-llava")])
def test_tiny_recipe_runs_and_a_finished_stage_is_not_run_again(name, start, tmp_path, monkeypatch):
    main = import_module("tools.mini_base.pretrain.__main__")
    command = ["pretrain", "--output", tmp_path, "--family", name, "--start", start, "--scale", "0.0005"]
    monkeypatch.setattr("sys.argv", [str(word) for word in (*command, "--threads", 1)])
    monkeypatch.setattr(main, "PICTURES", 40)
    monkeypatch.setattr(follow, "STEPS", 10)
    main.main()
    folder = tmp_path / f"mini_{name}"
    backbone, path = find_backbone(folder)
    backbone.load(path, quant="nf4", device="cpu")
    assert json.loads((folder / "recipe.json").read_text())["start"] == start
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/done.json")}
    assert len(stamps) == 3
    main.main()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/done.json")} == stamps


def test_language_layers_of_mini_llava_are_taken_over(tongue):
    made = family.find("qwen" if tongue.opening == [] else "llava")
    folder = Path(find_backbone("mini-llava")[1])
    model = made.new_language(tongue)
    if tongue.opening:
        with pytest.raises(DeloError, match="starts at random only"):
            made.start_from_llava(model, tongue, folder)
        return
    made.start_from_llava(model, tongue, folder)
    old = AutoModelForImageTextToText.from_pretrained(folder).model.language_model
    for key, value in old.layers.state_dict().items():
        assert torch.equal(model.model.layers.state_dict()[key], value)
    red = old.embed_tokens.weight[family.find("llava").load_tokenizer(folder).pieces([" red"])]
    torch.testing.assert_close(model.model.embed_tokens.weight[tongue.pieces([" red"])], red)


@pytest.mark.parametrize("name", family.NAMES)
def test_tokenizer_training_is_deterministic(name, tmp_path):
    for folder in ("a", "b"):
        family.find(name).train_tokenizer(corpus.lines(0, talks=200), 1200, tmp_path / folder)
    file = {"llava": "tokenizer.model", "qwen": "tokenizer.json"}[name]
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
