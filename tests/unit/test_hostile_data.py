"""Hostile data, recipes and images: each is refused with a clear error, and nothing of it is executed."""

import json
import os
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from delo_llava.cli import main
from delo_llava.data import guard
from delo_llava.data.entries import read_entries, read_members
from delo_llava.data.images import MAX_PIXELS, load_image
from delo_llava.data.readers import read_records
from delo_llava.data.recipe import load_sequence, read_recipe
from delo_llava.errors import DeloError, printable
from delo_llava.schema import parse_yaml, read_yaml
from delo_llava.tasks import Record, TaskSpec

RECORD = Record("one", "task", "train", None, None, "what is it", "a cat")
ENTRY = {"id": "a", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELO_LLAVA_CACHE", str(tmp_path / "cache"))


def entries(tmp_path: Path, content: bytes | str, suffix: str = ".json") -> list[Any]:
    file = tmp_path / f"data{suffix}"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_entries(file))


def records(tmp_path: Path, *given: Any, suffix: str = ".json") -> Any:
    file = tmp_path / f"data{suffix}"
    file.write_text(json.dumps(given) if suffix == ".json" else "\n".join(map(json.dumps, given)))
    images = tmp_path / "images"
    images.mkdir(exist_ok=True)
    return read_records(TaskSpec("task", "kind", {"train": file}, images), "train")


# ---- JSON


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 200_000 + "]" * 200_000, "within each other|nested too deeply"),
        ('[{"a":' * 200_000, "within each other|nested too deeply|valid JSON"),
        ('[{"a": %s}]' % ("9" * 10_000), "digits"),
        ('[{"a": -%s}]' % ("9" * 100_000), "digits"),
        ('[{"a": NaN}]', "valid JSON"),
        ('[{"a": Infinity}]', "valid JSON"),
        (b'[{"a": "\xff\xfe"}]', "valid JSON"),
        ('[{"a": 1}] and more', "valid JSON"),
        ('[{"a": "b', "valid JSON"),
        ('[{"a": 1}]'.encode("utf-16"), "valid JSON|should hold"),
        (b"PK\x03\x04 an archive", "valid JSON|should hold"),
    ],
    ids=[
        "deep",
        "deep-objects",
        "digits",
        "negative",
        "nan",
        "infinity",
        "utf8",
        "more",
        "cut",
        "utf16",
        "zip",
    ],
)
def test_json_beyond_reason_is_refused(tmp_path: Path, text: bytes | str, told: str, suffix: str) -> None:
    with pytest.raises(DeloError, match=told):
        entries(tmp_path, text, suffix)


def test_an_exponent_beyond_all_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeloError, match="not valid JSON"):
        entries(tmp_path, '[{"a": 1e999999999999999999999}]')
    for suffix in (".json", ".jsonl"):
        with pytest.raises(DeloError, match="entry 0.*not finite"):
            records(tmp_path, ENTRY | {"width": 10}, suffix=suffix)
            file = tmp_path / f"data{suffix}"
            file.write_text(file.read_text().replace("10", "1e999"))
            read_records(TaskSpec("task", "kind", {"train": file}, tmp_path), "train")


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_text_beyond_the_cap_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    from delo_llava.data import entries as module

    monkeypatch.setattr(guard, "MAX_TEXT", 100_000)
    monkeypatch.setattr(module, "MAX_TEXT", 100_000)
    row = json.dumps({"a": "x" * 300_000})
    with pytest.raises(DeloError, match="100000 bytes"):
        entries(tmp_path, f"[{row}]" if suffix == ".json" else row, suffix)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_the_guard_is_not_fooled_by_where_chunks_end(tmp_path: Path, chunk: int) -> None:
    """Brackets, digits and quotes inside texts count for nothing, wherever reads are cut."""
    text = json.dumps([{"a": '[[["\\' * 40 + "9" * 200, "b": {"c\\\\": ["]", 12345]}}, "\\", '"'])
    file = tmp_path / "x.json"
    file.write_text(text)
    with file.open("rb") as raw:
        guarded = guard.GuardedJson(raw, file)
        assert b"".join(iter(lambda: guarded.read(chunk), b"")) == text.encode()
        assert (guarded._depth, guarded._inside) == (0, False)


def test_a_deep_member_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "side.json"
    file.write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(DeloError, match="within each other"):
        list(read_members(file))
    assert entries(tmp_path, b'\xef\xbb\xbf[{"a": 1}]') == [{"a": 1}]
    assert entries(tmp_path, b'\xef\xbb\xbf{"a": 1}', ".jsonl") == [{"a": 1}]


def test_of_repeated_keys_the_last_one_counts(tmp_path: Path) -> None:
    assert entries(tmp_path, '[{"a": 1, "a": 2}]') == entries(tmp_path, '{"a": 1, "a": 2}', ".jsonl")


def test_half_a_surrogate_pair_is_told_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(DeloError, match="line 1: .*surrogates"):
        entries(tmp_path, '{"a": "\\ud800"}', ".jsonl")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_pickle_by_another_name_is_not_executed(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DeloError, match="valid|should hold"):
        entries(tmp_path, pickle.dumps(Payload(tmp_path / "owned")), suffix)
    assert not (tmp_path / "owned").exists()


def test_a_forged_parquet_footer_is_refused(tmp_path: Path) -> None:
    for length in (0, 50, 2**31 - 1):
        with pytest.raises(DeloError, match="not valid parquet"):
            entries(tmp_path, b"PAR1" + b"\x80" * 100 + struct.pack("<I", length) + b"PAR1", ".parquet")


def test_a_class_index_of_a_billion_makes_no_list(tmp_path: Path) -> None:
    from delo_llava.data.cmml import _names_from_images

    file = tmp_path / "cmml.json"
    item = {"task_id": 0, "split": "train", "image": "a/1.jpg", "text": "t", "label": 10**15}
    file.write_text(json.dumps([item]))
    with pytest.raises(DeloError, match="one name for every class"):
        _names_from_images(file)


# ---- paths


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png", "a/../../secret.png", "/etc/passwd", ".", "a/..", "../images", "a\0b.png",
        "./../images/../secret.png", "//etc/passwd",
    ],
)  # fmt: skip
def test_an_annotation_cannot_name_what_lies_outside(tmp_path: Path, name: str) -> None:
    for suffix in (".json", ".jsonl"):
        with pytest.raises(DeloError, match="outside the image folder"):
            records(tmp_path, ENTRY | {"image": name}, suffix=suffix)


def test_a_link_out_of_the_folder_works_and_the_check_tells_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The policy of SECURITY.md: links are made by whoever owns the folder, names come from the data."""
    disk = tmp_path / "disk"
    disk.mkdir()
    Image.new("RGB", (8, 8), "red").save(disk / "a.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "more").symlink_to(disk)
    (found,) = records(tmp_path, ENTRY | {"image": "more/a.png"})
    assert load_image(found.image, found).getpixel((0, 0)) == (255, 0, 0)
    entry = {"name": "task", "kind": "k", "files": {"train": "data.json", "test": "data.json"}}
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps({"name": "mine", "tasks": [entry | {"image_root": "images"}]}))
    main(["data", "check", str(recipe), "--root", str(tmp_path), "--no-tokens", "--workers=1"])
    told = capsys.readouterr().out
    assert "link_outside" in told and str(disk) in told


def test_an_id_stays_a_text_and_names_no_file(tmp_path: Path) -> None:
    (found,) = records(tmp_path, ENTRY | {"id": "../../owned\0\x1b[2J"})
    assert found.id == "../../owned\0\x1b[2J"
    assert {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()} <= {".arrow", ".lock"}
    assert not list(tmp_path.parent.glob("owned*"))


# ---- recipes


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BOMB, "more than 100000 values"),
        ("a: &a [*a]", "holds itself"),
        ("a: " + "[" * 50_000, "too deeply|valid YAML"),
        ("a: !!python/object/apply:os.mkdir [owned]", "not accepted"),
        ("a: !!python/name:os.system x", "not accepted"),
        ("a: !!binary aGk=", "not accepted"),
        ("a: 1\nb: 2\na: 3", "'a' stands there twice"),
        ("a: " + "9" * 10_000, "valid YAML"),
        ("a: b\0c", "valid YAML"),
        ("- a", "keys and values"),
    ],
    ids=["bomb", "self", "deep", "object", "name", "binary", "twice", "digits", "nul", "list"],
)  # fmt: skip
def test_yaml_beyond_settings_is_refused(
    tmp_path: Path, text: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(DeloError, match=told):
        read_yaml(tmp_path / "x.yaml")
    assert not (tmp_path / "owned").exists()


def test_aliases_and_merges_that_people_write_are_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a") == {
        "a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1},
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"train": "../x.json", "test": "x.json"}},
        {"files": {"train": "/etc/passwd", "test": "x.json"}},
        {"image_root": "../.."},
        {"name": "../owned"},
        {"name": "a/b"},
        {"name": "-rf"},
        {"images": ["../x"]},
        {"sides": [{"name": "s", "file": "../s.json", "key": "id", "context": "."}]},
    ],
)
def test_a_recipe_stays_below_its_root(tmp_path: Path, change: dict[str, Any]) -> None:
    task = {"name": "task", "kind": "k", "files": {"train": "x.json", "test": "x.json"}} | change
    file = tmp_path / "x.yaml"
    file.write_text(json.dumps({"name": "x", "tasks": [task]}))
    with pytest.raises(DeloError, match="root|name"):
        load_sequence(str(file), tmp_path)


@pytest.mark.parametrize("tasks", [5, [5], None, {"a": 1}])
def test_tasks_that_are_no_list_are_refused(tmp_path: Path, tasks: Any) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(json.dumps({"name": "x", "like": "mini6", "tasks": tasks}))
    with pytest.raises(DeloError, match="tasks"):
        read_recipe(str(file))


# ---- images


def png(width: int, height: int, data: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG of grey pixels with whatever data, whose checksums are right."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), *more, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(owned) (w) file closefile\n%%EOF\n"
TEXT_BOMB = (b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 100_000_000))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (png(60_000, 60_000, b"\0" * 100), "pixels|bomb"),
        (png(8_200, 8_200, b"\0" * 100), f"8200x8200 is more than {MAX_PIXELS} pixels"),
        (png(8, 8, b"\0" * 20), "cannot be used"),
        (png(8, 8, b"\0" * 72, TEXT_BOMB), "cannot be used"),
        (png(8, 8, b"\0" * 72)[:45], "cannot be used"),
        (EPS, "no image in one of the formats PNG, JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image in one of the formats"),
        (b"II*\0\x08\0\0\0\0\0", "cannot be used"),
        (b"", "no image in one of the formats"),
    ],
    ids=["bomb", "large", "short", "text-bomb", "cut", "eps", "svg", "tiff", "empty"],
)
def test_an_image_that_is_none_or_too_much_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(content)
    with pytest.raises(DeloError, match=told):
        load_image(file, RECORD)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png", "."):
        with pytest.raises(DeloError, match="no file"):
            load_image(tmp_path / name, RECORD)
    with pytest.raises(DeloError, match="cannot be used"):
        load_image(Path(f"{tmp_path}/a\0b.png"), RECORD)
    from delo_llava.data import images

    monkeypatch.setattr(images, "MAX_BYTES", 10)
    (tmp_path / "x.png").write_bytes(png(8, 8, b"\0" * 72))
    with pytest.raises(DeloError, match="more than 10"):
        load_image(tmp_path / "x.png", RECORD)


# ---- answers and references


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": NaN}', "9" * 10_000, '{"text": ', "\x80\x04"])
def test_answers_and_references_beyond_json_are_told(tmp_path: Path, text: str) -> None:
    from delo_eval.answers.files import read_answers
    from delo_eval.answers.references import read_references

    for suffix in (".json", ".jsonl"):
        file = tmp_path / f"x{suffix}"
        file.write_text(text)
        for read in (lambda given: read_answers([given]), read_references):
            with pytest.raises(DeloError):
                read(file)


def test_captions_of_another_shape_are_told(tmp_path: Path) -> None:
    from delo_eval.answers.references import read_references

    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"annotations": [{"caption": "a", "image_id": "../x"}]}))
    with pytest.raises(DeloError, match="no image number"):
        read_references(file)


# ---- terminals


def test_nothing_from_data_reaches_the_terminal_as_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"
    rows = [ENTRY | {"id": f"a{evil}", "image": f"x{evil}.png", "context": f"c{evil}"}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    entry = {"name": "task", "kind": "k", "files": {"train": "data.json", "test": "data.json"}}
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps({"name": "mine", "tasks": [entry]}))
    common = [str(recipe), "--root", str(tmp_path)]
    assert main(["data", "check", *common, "--no-tokens", "--workers=1"]) == 1
    try:
        main(["data", "show", *common, "--task", "task", "-n", "1"])
    except SystemExit as left:
        assert left.code == 2  # its image is not there
    told = capsys.readouterr()
    for control in "\x1b\x07\x9b\u202e":
        assert control not in told.out + told.err
    assert "\\x1b" in told.out
    assert printable("a\tb\nc äöü 漢\u00a0") == "a\tb\nc äöü 漢\u00a0"
