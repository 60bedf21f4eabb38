"""The CMML layout (RebQ, DeLo) from the raw folders of UPMC Food-101 and MM-IMDb.

The official class-incremental splits are those of the JSON files that RebQ's authors published. What is
drawn here is reproducible and has the same form, but other items are in other tasks: results on it are not
comparable.
"""

import csv
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from delo_llava.data.faults import short
from delo_llava.data.guard import MAX_TEXT
from delo_llava.data.missing import share_of
from delo_llava.data_tools.prepared import Preparation
from delo_llava.errors import DeloError
from delo_llava.strict import parse_json, read_json

STATEMENT = (
    "This split was drawn here. The official one is defined by the JSON file that RebQ's authors publish, "
    "and is to be preferred: results on this one are not comparable with published tables."
)

#: Classes in all, and in each task, of the CMML protocol.
FOOD_CLASSES, FOOD_PER_TASK = 100, 10
GENRES, GENRES_PER_TASK = 20, 4

#: What counts as a picture.
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}

#: Where training and validation end of MM-IMDb without its split.json (the original has 60, 10, 30 %).
ENDS = (0.6, 0.7)


def food101(raw: Path, made: Preparation, seed: int, val: float) -> bool:
    """`UPMC-Food101-CMML/` from `images/{train,test}/<class>/` and `texts/{train,test}*.csv`.

    Args:
        raw: the folder of the download.
        val: share of the training images of each class that becomes validation data.

    Raises:
        DeloError: a folder or a file that is missing, or too few classes.
    """
    texts = {split: _titles(raw, split, made) for split in ("train", "test")}
    for split in texts:
        names = sorted(str(path.relative_to(raw)) for path in (raw / "images" / split).glob("*/*"))
        made.sources[f"{raw}/images/{split}/*/*"] = hashlib.sha256("\n".join(names).encode()).hexdigest()
    if made.is_done():
        return False
    classes = _food_classes(raw, seed)
    root = made.target / "UPMC-Food101-CMML"
    for split in ("train", "test"):
        made.link(root / "images" / split, raw / "images" / split)
    items = list(_food_items(raw, texts, classes, seed, val, made))
    made.write_entries(root / "UPMC-Food101-CMML.json", items)
    return _finish(made, items)


def _food_classes(raw: Path, seed: int) -> list[str]:
    """The classes in the order in which they are learned."""
    folder = raw / "images" / "train"
    if not folder.is_dir():
        raise DeloError("The folder of training images is missing.", given=folder)
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    if len(names) < FOOD_CLASSES:
        raise DeloError(f"{FOOD_CLASSES} classes are needed.", given=f"{len(names)} folders in {folder}")
    return sorted(names, key=lambda name: rank(seed, name))[:FOOD_CLASSES]


def _titles(raw: Path, split: str, made: Preparation) -> dict[str, str]:
    """Image file name -> text, from the CSV files of a split: (image, text, class) a row.

    Raises:
        DeloError: no such file, or one of which most rows are something else.
    """
    files = sorted((raw / "texts").glob(f"{split}*.csv"))
    if not files:
        raise DeloError("The texts are missing.", given=raw / "texts" / f"{split}_titles.csv")
    texts: dict[str, str] = {}
    for file in files:
        others: list[tuple[int, list[str]]] = []
        count = 0
        for number, row in _csv_rows(made.source(file)):
            count += 1
            if len(row) > 1 and Path(row[0]).suffix.lower() in SUFFIXES:
                texts[row[0]] = row[1].strip()
            else:
                others.append((number, row))
        if 2 * len(others) > count:
            raise DeloError(
                "Most rows of this file are not: image, text, class, parted by commas.",
                given=f"{file}, line {others[0][0]}: {short(others[0][1])}",
            )
        if others:
            made.notes.append(
                f"{file}: {len(others)} of {count} rows hold no image, first line {others[0][0]}"
            )
    return texts


def _csv_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of a CSV file, with fields of any length that data may have.

    Raises:
        DeloError: no UTF-8, a quote that does not end where its field does, or a field that is too long.
    """
    usual = csv.field_size_limit(MAX_TEXT)  # the module's own limit holds for the whole process
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            try:
                for row in reader:
                    if row:
                        yield reader.line_num, row
            except (csv.Error, UnicodeDecodeError) as error:
                told = f"This CSV file cannot be read: {error}."
                fix = "correct the line; the file must be UTF-8, with a quote in a quoted field doubled"
                raise DeloError(told, given=f"{file}, after line {reader.line_num}", fix=fix) from error
    finally:
        csv.field_size_limit(usual)


def _food_items(
    raw: Path,
    texts: dict[str, dict[str, str]],
    classes: Sequence[str],
    seed: int,
    val: float,
    made: Preparation,
) -> Iterator[dict[str, Any]]:
    without = count = 0
    for index, name in enumerate(classes):
        for split in ("train", "test"):
            images = _pictures(raw / "images" / split / name)
            ranked = sorted(images, key=lambda image: rank(seed, image)) if split == "train" else []
            held = set(ranked[: share_of(val, len(images))])
            for image in images:
                text = texts[split].get(image, "")
                count, without = count + 1, without + (not text)
                part = "val" if image in held else split
                place = f"{split}/{name}/{image}"
                task = index // FOOD_PER_TASK
                yield {"task_id": task, "split": part, "image": place, "text": text, "label": index}
    made.counts["without_text"] = without
    if 2 * without > count:
        raise DeloError(
            "Most images have no text.",
            given=f"{without} of {count}",
            fix="look whether the names of images in texts/*.csv are those of the files",
        )


def _pictures(folder: Path) -> list[str]:
    """Names of the pictures in a folder, in order."""
    if not folder.is_dir():
        raise DeloError("A class has no folder of images.", given=folder)
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def mm_imdb(raw: Path, made: Preparation, seed: int) -> bool:
    """`MM-IMDB-CMML/` from `dataset/<id>.{jpeg,json}` and, where it is there, `split.json`.

    The most frequent genres of the training films are drawn into tasks. A film is in one task, drawn among
    those that one of its genres belongs to; its label is the 0/1 vector over all genres.

    Raises:
        DeloError: a folder or file that is missing or malformed, or too few genres.
    """
    films = _films(raw / "dataset", made)
    split_of = _film_splits(raw, films, seed, made)
    if made.is_done():
        return False
    counts = Counter(genre for name, film in films.items() if split_of[name] == "train" for genre in film[0])
    common = sorted(counts, key=lambda genre: (-counts[genre], genre))[:GENRES]
    if len(common) < GENRES:
        raise DeloError(f"{GENRES} genres are needed.", given=f"{len(common)} in {raw / 'dataset'}")
    order = sorted(common, key=lambda genre: rank(seed, genre))
    root = made.target / "MM-IMDB-CMML"
    made.link(root / "images", raw / "dataset")
    items = []
    for name, (genres, plot, image) in films.items():
        places = [order.index(genre) for genre in genres if genre in order]
        if not places:
            continue
        tasks = sorted({place // GENRES_PER_TASK for place in places})
        task = min(tasks, key=lambda number: rank(seed, f"{name}/{number}"))
        label = [int(place in places) for place in range(GENRES)]
        items.append({"task_id": task, "split": split_of[name], "image": image, "text": plot, "label": label})
    made.counts["without_these_genres"] = len(films) - len(items)
    made.write_value(root / "classes.json", order)
    made.write_entries(root / "MM-IMDB-CMML.json", items)
    return _finish(made, items)


def _films(folder: Path, made: Preparation) -> dict[str, tuple[list[str], list[str], str]]:
    """Film -> (genres, plot, image); films without a poster are left out and counted."""
    found: dict[str, tuple[list[str], list[str], str]] = {}
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.json")):
        content = file.read_bytes()
        digest.update(file.name.encode() + b"\0" + content)
        try:
            film = parse_json(content)
            genres, plot = list(film["genres"]), film["plot"]
        except (ValueError, KeyError, TypeError) as error:
            raise DeloError(f"A film cannot be read: it lacks {error}.", given=file) from error
        image = next((name for s in SUFFIXES if (folder / (name := f"{file.stem}{s}")).is_file()), None)
        digest.update(str(image).encode())
        if image is not None:
            found[file.stem] = (genres, [plot] if isinstance(plot, str) else list(plot), image)
    if not found:
        raise DeloError("No film with a poster was found.", given=folder / "<id>.json, <id>.jpeg")
    made.sources[f"{folder.absolute()}/*.json"] = digest.hexdigest()
    return found


def _film_splits(raw: Path, films: dict[str, Any], seed: int, made: Preparation) -> dict[str, str]:
    """Film -> split: of split.json, else drawn."""
    file = raw / "split.json"
    if not file.is_file():
        made.notes.append(f"{file.name} is not there: training, validation and test films were drawn.")
        ranked = sorted(films, key=lambda name: rank(seed, name))
        ends = [share_of(end, len(films)) for end in ENDS]
        return {
            name: "train" if i < ends[0] else "val" if i < ends[1] else "test"
            for i, name in enumerate(ranked)
        }
    given = read_json(made.source(file), "The file of splits", "fetch it again")
    names = {"train": "train", "dev": "val", "val": "val", "test": "test"}
    found = {name: names[split] for split, members in given.items() if split in names for name in members}
    if unknown := set(films) - set(found):
        raise DeloError("A film is in no split of split.json.", given=min(unknown))
    return found


def _finish(made: Preparation, items: Sequence[dict[str, Any]]) -> bool:
    """Counts, the statement, the manifest."""
    counts = Counter(f"{item['task_id']}/{item['split']}" for item in items)
    made.counts |= {"items": len(items), "parts": dict(sorted(counts.items()))}
    made.notes.append(STATEMENT)
    return made.publish()


def rank(seed: int, name: str) -> bytes:
    """The key of every draw here: sha256 of seed and name."""
    return hashlib.sha256(f"{seed}|{name}".encode()).digest()
