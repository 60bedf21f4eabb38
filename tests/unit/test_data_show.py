"""Records are shown with the tokens that the collator makes, their modality, and what is trained."""

import re
from pathlib import Path

import pytest
import tiny_models
from data_support import Sequence, checked_data  # noqa: F401
from PIL import Image
from rich.console import Console

from delo_llava import cli
from delo_llava.backbones.base import find_backbone
from delo_llava.data.collate import SEGMENT_IMAGE, Collator
from delo_llava.data.readers import read_records
from delo_llava.data.recipe import load_sequence
from delo_llava.data_tools.prompts import Prompts, local_model
from delo_llava.data_tools.show_text import half_blocks, show
from delo_llava.data_tools.shown import MissingSpec, shown


@pytest.mark.parametrize("kind", tiny_models.BUILDERS)
@pytest.mark.parametrize("mode", ["absent", "dummy"])
def test_segments_are_the_collator_s(data: Sequence, kind: str, mode: str) -> None:
    """Token for token, for every family, with and without modalities."""
    model = str(tiny_models.session(kind))
    [task] = load_sequence(str(data.recipe), data.folder).tasks
    records = read_records(task, "train")
    missing = MissingSpec(ratio=0.7, image=mode)  # type: ignore[arg-type]
    backbone, path = find_backbone(model)
    collator = Collator(backbone, backbone.load_processor(path), 2048, mode)  # type: ignore[arg-type]
    items = shown(task, records, range(len(records)), missing, Prompts(model, 2048))
    assert {item.presence for item in items} >= {(True, False), (False, True)}
    for item in items:
        batch = collator([(item.record, item.presence)])
        sizes = [segment.size for segment in item.segments]
        assert sum(sizes) == batch.segments.shape[1]
        assert batch.labels is not None
        trained = sum(segment.size for segment in item.segments if segment.trained)
        assert trained == int((batch.labels >= 0).sum())
        images = sum(segment.size for segment in item.segments if segment.kind == "image")
        assert images == int((batch.segments == SEGMENT_IMAGE).sum())
        assert item.prompt.endswith(collator.dialogue.answer(item.record.answer))


def command(data: Sequence, *more: str) -> list[str]:
    return ["data", "show", str(data.recipe), "--root", str(data.folder), *more]


def test_plain_output_marks_what_is_trained(data: Sequence, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(data, "-n", "1", "--tokens")) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "8x6, PNG RGB" in text
    assert "hint 0" in text
    assert re.search(r"other +│ TRAINED │ 2 +│ \S*blue\|</s>", text)
    assert re.search(r"instruction +│ - ", text)
    assert "image: yes, context: yes" in text


def test_a_missing_pattern_and_a_cut_are_told(data: Sequence, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(data, "-n", "1", "--missing.ratio", "1", "--missing.kind", "image")) == 0
    text = capsys.readouterr().out
    assert "image: left out by the missing pattern, context: yes" in text
    assert "│ image " not in text
    assert cli.main(command(data, "--id", "text", "--data.max_length", "16")) == 0
    text = capsys.readouterr().out
    assert "image: not in the data, context: not in the data" in text
    assert cli.main(command(data, "-n", "1", "--data.max_length", "36")) == 0
    assert "context" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("cut"))


def test_test_records_end_where_the_answer_begins(data: Sequence, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(data, "--split", "test", "-n", "1")) == 0
    text = capsys.readouterr().out
    assert "TRAINED" not in text
    assert "ASSISTANT:'" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--task", "two"], "no such task"),
        (["--id", "a99"], "no such record"),
        (["--start", "99"], "No record"),
        (["--missing.kind", "txt"], "did you mean text?"),
        (["--model", "nowhere"], "no such model"),
    ],
)
def test_mistakes_are_told(
    data: Sequence, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(command(data, *words))
    assert told in capsys.readouterr().err


def test_pages_and_sheets_are_whole(data: Sequence) -> None:
    data.train[1]["context"] = "<script>alert(1)</script> & co"
    (data.images / "2.png").write_text("no picture")
    data.write()
    page, sheet = data.folder / "a.html", data.folder / "a.png"
    assert cli.main(command(data, "-n", "6", "--html", str(page), "--png", str(sheet))) == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("<article>") == 6
    assert text.count("data:image/png;base64,") == 5
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "cannot be used" in text
    with Image.open(sheet) as picture:
        assert picture.size == (4 * 256, 2 * (256 + 48))


def test_a_terminal_gets_colours_and_a_preview(data: Sequence) -> None:
    [task] = load_sequence(str(data.recipe), data.folder).tasks
    [item] = shown(task, read_records(task, "train"), [0], MissingSpec(), Prompts("mini-llava", 256))
    console = Console(force_terminal=True, color_system="truecolor", width=100, record=True)
    with console.capture() as captured:
        show(console, item, preview=True, tokens=False)
    assert "▀" in captured.get()
    assert "\x1b[1;4;33m" in captured.get()
    assert half_blocks(Image.new("RGB", (64, 64), "red")).plain.count("\n") == 16


def test_models_that_are_not_here_are_not_fetched(tmp_path: Path) -> None:
    assert local_model("mini-llava") == "mini-llava"
    assert local_model(str(tmp_path)) == str(tmp_path)
    assert local_model("nobody/has-this-model") is None
