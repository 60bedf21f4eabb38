"""Answer files, ours and others': finding them, joining shards, reading their rows.

A file holds one row a line, or is a JSON array of rows, or one of ScienceQA's two result files, which are
JSON by any name. Which keys of a row count: `columns.py`.
"""

import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delo_eval.answers.columns import Columns, columns_of
from delo_llava.errors import DeloError
from delo_llava.strict import parse_json

#: `{CHUNKS}_{IDX}.jsonl`, as CoIN's scripts name the parts of an answer file.
SHARD = re.compile(r"(\d+)_(\d+)\.jsonl?", re.IGNORECASE)

#: How many ids an error lists.
LISTED = 10


@dataclass(frozen=True)
class FileAnswers:
    """Answers in the order of their files.

    Attributes:
        files: where they were read.
        ids: of the questions, as text; the line's number from 1 where rows are paired by line.
        texts: what was answered.
        prompts: what was asked, where a row says it under `prompt`.
        numbers: places of the rows whose id is a number in the file, which some scripts do not find.
        columns: what was read, in the order of its first use.
    """

    files: list[Path]
    ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    prompts: list[str | None] = field(default_factory=list)
    numbers: set[int] = field(default_factory=set)
    columns: list[Columns] = field(default_factory=list)

    def add(self, row: Mapping[str, Any], columns: Columns, where: str) -> None:
        """Take one row.

        Raises:
            DeloError: its answer is no text.
        """
        text, prompt = row[columns.text], row.get("prompt")
        if isinstance(text, bool) or not isinstance(text, str | int | float):
            raise DeloError(f"{where}: an answer must be text.", given=repr(text)[:80])
        name = None if columns.id is None else row[columns.id]
        if isinstance(name, int | float):
            self.numbers.add(len(self.ids))
        self.ids.append(str(len(self.ids) + 1 if name is None else name))
        self.texts.append(text if isinstance(text, str) else str(text))
        self.prompts.append(prompt if isinstance(prompt, str) else None)
        if columns not in self.columns:
            self.columns.append(columns)


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


def read_answers(files: Sequence[Path], *, key: str | None = None, by_line: bool = False) -> FileAnswers:
    """All answers of the files, one after another.

    Args:
        key: of the answer in every row; without it rows must have one of the known layouts.
        by_line: rows need no id.

    Raises:
        DeloError: a file that cannot be read, a row without id or answer (named), or no rows at all.
    """
    answers = FileAnswers(list(files))
    for file in files:
        keys: set[str] = set()
        columns: Columns | None = None
        for number, row in enumerate(_rows(file), start=1):
            where = f"{file}, row {number}"
            if columns is None or not isinstance(row, dict) or row.keys() != keys:
                found = columns_of(row, where, key=key, by_line=by_line)
                if columns not in (None, found):
                    told = f"{where} has its answer under other keys than the rows before."
                    raise DeloError(told, given=found, allowed=[columns], fix="name the key: --key NAME")
                columns, keys = found, set(row)
            answers.add(row, columns, where)
    if not answers.texts:
        named = ", ".join(str(file) for file in files[:LISTED])
        raise DeloError("There are no answers: the file is empty.", given=named, fix="write them again")
    return answers


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


def _rows(file: Path) -> Iterator[Any]:
    """The rows of a file, whichever of the layouts it has."""
    try:
        yield from _decoded(file)
    except UnicodeDecodeError as error:
        told = f"This file is not UTF-8: {error.reason} at byte {error.start} of what was read"
        raise DeloError(told, given=file, fix="convert it: iconv -t utf-8") from error


def _decoded(file: Path) -> Iterator[Any]:
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
