"""Answer files, ours and others': reading them, joining shards, matching them with the questions.

Rows have an id (`question_id`, `record_id`, …) and a text (`text`, `prediction`, …). A file holds one row a
line, or is a JSON array of rows, or one of ScienceQA's two result files, which are JSON by any name.
"""

import glob
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delo_eval.scorers.base import Reference
from delo_llava.errors import DeloError
from delo_llava.strict import parse_json

ID_KEYS = ("question_id", "record_id", "questionId", "id", "image_id", "image")
TEXT_KEYS = ("text", "prediction", "pred", "answer", "caption")

#: `{CHUNKS}_{IDX}.jsonl`, as CoIN's scripts name the parts of an answer file.
SHARD = re.compile(r"(\d+)_(\d+)\.jsonl?")

#: How many ids an error lists.
LISTED = 10


@dataclass(frozen=True)
class FileAnswers:
    """Answers in the order of their files.

    Attributes:
        files: where they were read.
        ids: of the questions, as text.
        texts: what was answered.
    """

    files: list[Path]
    ids: list[str]
    texts: list[str]


@dataclass(frozen=True)
class Matched:
    """Answers laid beside the questions.

    Attributes:
        texts: by question; None where there is no answer.
        in_order: the answers that exist, in the order of the file.
        missing: ids of questions without answer.
    """

    texts: list[str | None]
    in_order: list[str]
    missing: list[str]


def answer_files(given: Sequence[str]) -> list[Path]:
    """The files that the words name: files, folders and patterns; shards in the order of their indices.

    A folder means the shards in it, or else its `merge.jsonl`.

    Raises:
        DeloError: nothing there, a shard missing, or shards of several runs mixed.
    """
    files = [file for word in given for file in _named(word)]
    shards = {file: found for file in files if (found := SHARD.fullmatch(file.name))}
    if not shards:
        return files
    if len(shards) < len(files):
        others = [str(file) for file in files if file not in shards]
        raise DeloError(
            "Shards and whole answer files are mixed.", given=", ".join(others[:LISTED]), fix="name one kind"
        )
    return _in_index_order({file: (int(found[1]), int(found[2])) for file, found in shards.items()})


def read_answers(files: Sequence[Path]) -> FileAnswers:
    """All answers of the files, one after another.

    Raises:
        DeloError: a file that cannot be read, or a row without id or text (named).
    """
    answers = FileAnswers(list(files), [], [])
    for file in files:
        keys: tuple[str, str] | None = None
        for number, row in enumerate(_rows(file), start=1):
            if keys is None or keys[0] not in row or keys[1] not in row:
                keys = _keys(row, f"{file}, row {number}")
            text = row[keys[1]]
            if isinstance(text, bool) or not isinstance(text, str | int | float):
                raise DeloError(f"{file}, row {number}: an answer must be text.", given=repr(text)[:80])
            answers.ids.append(str(row[keys[0]]))
            answers.texts.append(text if isinstance(text, str) else str(text))
    return answers


def match(answers: FileAnswers, references: Sequence[Reference], *, allow_missing: bool) -> Matched:
    """Lay the answers beside the questions by id.

    Questions whose ids repeat in their file are called `<id>`, `<id>~2` … and so are their answers.

    Raises:
        DeloError: answers to unknown questions, several to one, or questions without answer that are not
            allowed; all of it in one error, with counts and ids.
    """
    wanted = {reference.id for reference in references}
    said: dict[str, str] = {}
    unknown, repeated = [], Counter[str]()
    count = Counter[str]()
    for given, text in zip(answers.ids, answers.texts, strict=True):
        count[given] += 1
        name = given if count[given] == 1 else f"{given}~{count[given]}"
        if name in wanted:
            said[name] = text
        elif given in wanted:
            repeated[given] += 1
        else:
            unknown.append(given)
    missing = [reference.id for reference in references if reference.id not in said]
    faults = [_fault("answers to unknown questions", unknown), _fault("questions answered twice", repeated)]
    if not allow_missing:
        faults.append(_fault("questions without answer", missing))
    if found := [fault for fault in faults if fault]:
        raise DeloError(
            f"{len(answers.ids)} answers do not fit {len(references)} questions:\n" + "\n".join(found),
            given=", ".join(str(file) for file in answers.files[:LISTED]),
            fix="score the answers against the file of questions they were made from"
            + ("" if allow_missing or any(faults[:2]) else ", or count missing ones wrong: --allow-missing"),
        )
    if not said:
        raise DeloError("No question has an answer.", given=", ".join(map(str, answers.files[:LISTED])))
    return Matched([said.get(reference.id) for reference in references], answers.texts, missing)


def _fault(what: str, ids: Iterable[str]) -> str:
    """One line of the error; empty when there are none."""
    listed = list(ids)
    more = f", … ({len(listed) - LISTED} more)" if len(listed) > LISTED else ""
    return f"  {len(listed)} {what}: {', '.join(listed[:LISTED])}{more}" if listed else ""


def _named(word: str) -> list[Path]:
    """Files that one word names."""
    path = Path(word).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        shards = sorted(file for file in path.iterdir() if SHARD.fullmatch(file.name))
        whole = path / "merge.jsonl"
        if shards or whole.is_file():
            return shards or [whole]
        raise DeloError(
            "There are no answers in this folder.",
            given=path,
            allowed=["<CHUNKS>_<IDX>.jsonl", "merge.jsonl"],
        )
    found = sorted(Path(name) for name in glob.glob(str(path)))
    if not found:
        raise DeloError("There is no such answer file.", given=word)
    return found


def _in_index_order(shards: Mapping[Path, tuple[int, int]]) -> list[Path]:
    """The shards of one run by index, all of them.

    Raises:
        DeloError: several numbers of chunks, an index twice, or one missing.
    """
    chunks = {count for count, _ in shards.values()}
    by_index = {index: file for file, (_, index) in shards.items()}
    if len(chunks) > 1 or len(by_index) < len(shards):
        raise DeloError(
            "These shards are of several runs.",
            given=", ".join(sorted(file.name for file in shards)[:LISTED]),
            fix="name the shards of one run, e.g. 'answers/4_*.jsonl'",
        )
    absent = [index for index in range(max(chunks)) if index not in by_index]
    if absent or len(by_index) > max(chunks):
        raise DeloError(
            f"Of {max(chunks)} shards {len(absent)} are missing: {', '.join(map(str, absent[:LISTED]))}.",
            given=", ".join(file.name for file in by_index.values()),
            fix="run the missing part again; a part without questions needs an empty file",
        )
    return [by_index[index] for index in sorted(by_index)]


def _keys(row: Any, where: str) -> tuple[str, str]:
    """The keys of a row's id and text."""
    if not isinstance(row, dict):
        raise DeloError(f"{where} is not an object.", given=repr(row)[:80])
    found = [next((key for key in keys if key in row), None) for keys in (ID_KEYS, TEXT_KEYS)]
    if None in found:
        what, allowed = ("id", ID_KEYS) if found[0] is None else ("text", TEXT_KEYS)
        raise DeloError(f"{where} has no {what}.", given=", ".join(row), allowed=allowed)
    return str(found[0]), str(found[1])


def _rows(file: Path) -> Iterator[Any]:
    """The rows of a file, whichever of the layouts it has."""
    with file.open(encoding="utf-8-sig") as handle:
        first = next((line for line in handle if line.strip()), "")
        handle.seek(0)
        if _is_row(first):
            yield from _lines(handle, file)
            return
        try:
            content = parse_json(handle.read()) if first else []
        except ValueError as error:
            raise DeloError(
                f"This is neither JSON lines nor JSON: {error}", given=file, fix="fetch or write it again"
            ) from error
    yield from _unwrapped(content, file)


def _is_row(line: str) -> bool:
    """Whether a first line is a whole object, and not a whole result file of ScienceQA."""
    try:
        row = parse_json(line)
    except ValueError:
        return False
    return isinstance(row, dict) and not _wrapping(row)


def _lines(handle: Iterable[str], file: Path) -> Iterator[Any]:
    for number, line in enumerate(handle, start=1):
        if line.strip():
            try:
                yield parse_json(line)
            except ValueError as error:
                raise DeloError(f"{file}, line {number} is not JSON: {error}", given=line[:80]) from error


def _wrapping(content: Mapping[str, Any]) -> bool:
    return {"correct", "incorrect"} <= content.keys() or "outputs" in content


def _unwrapped(content: Any, file: Path) -> list[Any]:
    """The rows of a JSON array, of ScienceQA's output (right and wrong apart), or of its result (by id)."""
    if isinstance(content, list):
        return content
    if isinstance(content, dict) and isinstance(content.get("outputs"), dict):
        return [{"question_id": name, "text": text} for name, text in content["outputs"].items()]
    if isinstance(content, dict) and _wrapping(content):
        return [*content["correct"], *content["incorrect"]]
    raise DeloError(
        "This JSON holds no answers.",
        given=f"{file}: {type(content).__name__}",
        allowed=["an array of rows", "an object with `correct` and `incorrect`", "an object with `outputs`"],
    )
