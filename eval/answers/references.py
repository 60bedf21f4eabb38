"""References for scoring without a recipe: test files and the benchmarks' own annotation files.

| layout | files |
|---|---|
| array of entries with `question_id`, `text`, `answer` | CoIN's, UCIT's, MLLM-DCL's test files; VizWiz |
| `{"data": [...]}` | TextVQA_0.5.1_val.json, DocVQA |
| `{"annotations": [...]}` with `answers` | VQAv2's annotations |
| `{"annotations": [...]}` with `caption` | COCO-style captions, grouped by `image_id` in numerical order |
| `{id: entry}` | GQA's questions, ScienceQA's problems.json with pid_splits.json beside it |
| rows of `pred` and `ground_truth`, paired by line | ans_gt.json of MCITlib's scripts |

Answers are kept as they are written: what blanks mean is for the rules to say.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from delo_eval.scorers.base import Reference
from delo_llava.errors import DeloError
from delo_llava.strict import parse_json

ID_KEYS = ("question_id", "questionId", "id", "record_id", "image_id", "image")
ANSWER_KEYS = ("answer", "multiple_choice_answer", "answer_bbox", "label", "ground_truth", "reference")
FIELDS = {"question_id", "image", "text", "question", "answer", "conversations", "ground_truth", "reference"}

#: Beside ScienceQA's problems.json: which of them are of which split.
SPLITS_FILE = "pid_splits.json"

Entry = Mapping[str, Any]


def read_references(
    path: Path, task: str = "", *, split: str = "test", by_line: bool = False
) -> list[Reference]:
    """The references of a file, in its order.

    Args:
        task: name of the task, for rules that differ between tasks.
        split: which part counts of a file that holds several and says so, as problems.json does.
        by_line: entries need no id; their number from 1 is it.

    Raises:
        DeloError: no such file, no JSON, no known layout, or an entry without id or answer (named).
    """
    references, seen = [], Counter[str]()
    for number, (name, entry) in enumerate(_entries(_content(path), path, split)):
        where = f"{path}, entry {number}"
        if not isinstance(entry, dict):
            raise DeloError(f"{where} is not an object.", given=repr(entry)[:80])
        given = name or next((str(entry[key]) for key in ID_KEYS if entry.get(key) is not None), None)
        if given is None and by_line:
            given = str(number + 1)
        if given is None:
            raise DeloError(
                f"{where} has no id.",
                given=", ".join(entry),
                allowed=ID_KEYS,
                fix="where the n-th answer belongs to the n-th question, say --by-line",
            )
        seen[given] += 1
        unique = given if seen[given] == 1 else f"{given}~{seen[given]}"
        references.append(_reference(unique, entry, where, task))
    if not references:
        raise DeloError("This file holds no references.", given=path)
    return references


def _content(path: Path) -> Any:
    try:
        with path.open(encoding="utf-8-sig") as file:
            if path.suffix.lower() == ".jsonl":
                return [parse_json(line) for line in file if line.strip()]
            return parse_json(file.read())
    except FileNotFoundError:
        raise DeloError("There is no such file of references.", given=path) from None
    except IsADirectoryError:
        found = sorted(file.name for file in path.iterdir() if file.suffix.lower() in (".json", ".jsonl"))
        told = "This is a folder; references are one file."
        raise DeloError(told, given=path, allowed=found, fix="name the file in it") from None
    except ValueError as error:
        raise DeloError(f"This file is not valid JSON: {error}", given=path) from error


def _entries(content: Any, path: Path, split: str) -> Iterable[tuple[str | None, Any]]:
    """(id where the layout gives it, entry) for every entry."""
    if isinstance(content, dict):
        inner = content.get("annotations") or content.get("data")
        if isinstance(inner, list) and inner and isinstance(inner[0], dict) and "caption" in inner[0]:
            return _captions(inner)
        if inner is None and all(isinstance(entry, dict) for entry in content.values()):
            return _of_split(content, path, split)
        content = inner
    if not isinstance(content, list):
        raise DeloError(
            "This file has none of the known layouts of references.",
            given=path,
            allowed=["an array of entries", "`data`", "`annotations`", "entries by id"],
        )
    return ((None, entry) for entry in content)


def _of_split(problems: Mapping[str, Entry], path: Path, split: str) -> Iterable[tuple[str, Entry]]:
    """Entries by id; where they are of several splits, those of one, in the order in which the splits' file
    beside them lists them.

    Raises:
        DeloError: no entry is of the split, or the splits' file is of other entries.
    """
    said = {entry["split"] for entry in problems.values() if isinstance(entry.get("split"), str)}
    listed = path.with_name(SPLITS_FILE)
    if not said:
        return problems.items()
    if not listed.is_file():
        chosen = [name for name, entry in problems.items() if entry.get("split") == split]
        allowed: Iterable[str] = said
    else:
        by_split = _content(listed)
        chosen, allowed = by_split.get(split, []), by_split
    absent = [name for name in chosen if name not in problems]
    if absent or not chosen:
        told = (
            f"{len(absent)} ids of {SPLITS_FILE} are not in this file." if absent else f"No {split} entries."
        )
        raise DeloError(told, given=path, allowed=absent[:5] or sorted(allowed), fix="name another --split")
    return [(name, problems[name]) for name in chosen]


def _captions(rows: Iterable[Entry]) -> Iterable[tuple[str, Any]]:
    """One entry an image, by number."""
    by_image: dict[int, list[str]] = {}
    for row in rows:
        try:
            by_image.setdefault(int(row["image_id"]), []).append(str(row["caption"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DeloError("A caption has no image number or no text.", given=repr(row)[:80]) from error
    return ((str(image), {"captions": by_image[image]}) for image in sorted(by_image))


def _reference(name: str, entry: Entry, where: str, task: str) -> Reference:
    extra = {key: value for key, value in entry.items() if key not in FIELDS and value is not None}
    answer, several = _answer(entry, where)
    if several:
        extra.setdefault("answers", several)
    image = entry.get("image")
    instruction = entry.get("text", entry.get("question")) or _turn(entry, "human") or ""
    file = PurePosixPath(image).name if isinstance(image, str) else ""
    return Reference(name, answer, str(instruction).replace("<image>", "").strip(), extra, task, file)


def _answer(entry: Entry, where: str) -> tuple[str, list[Any]]:
    """The one answer, and all of them where the entry gives a list as its answer."""
    given = next((entry[key] for key in ANSWER_KEYS if entry.get(key) is not None), None)
    if given is None:
        given = _turn(entry, "gpt")
    if given is None and entry.get("captions"):
        given = entry["captions"][0]
    if given is None and isinstance(entry.get("answers"), list) and entry["answers"]:
        said = [item["answer"] if isinstance(item, dict) else item for item in entry["answers"]]
        given = Counter(map(str, said)).most_common(1)[0][0]
    if isinstance(given, list) and given and "answer_bbox" not in entry:
        return str(given[0]), given
    if given is None or isinstance(given, dict | bool):
        raise DeloError(f"{where} has no answer.", given=", ".join(entry), allowed=ANSWER_KEYS)
    return str(given), []


def _turn(entry: Entry, role: str) -> str | None:
    """What one side says in a conversation of one turn pair; longer ones have no one answer."""
    turns = entry.get("conversations")
    if not isinstance(turns, list) or len(turns) != 2:
        return None
    return next((str(turn.get("value")) for turn in turns if turn.get("from") == role), None)
