"""What a check remembers on disk: verdicts on images between runs, references and faults within one.

SQLite, so that memory does not grow with the data: 100,000 records or millions, and a kill loses at most the
last seconds of decoding.
"""

import hashlib
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from delo_llava.cache import cache_root, writable
from delo_llava.data_tools.decode import VERSION, Verdict
from delo_llava.data_tools.faults import NOTES, Fault
from delo_llava.errors import DeloError
from delo_llava.tasks import TaskSequence

#: Kept between runs.
LASTING = """
CREATE TABLE IF NOT EXISTS image (
    path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, version INTEGER, sha256 TEXT, width INTEGER,
    height INTEGER, code TEXT, reason TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS annotation (path TEXT PRIMARY KEY, sha256 TEXT, checked REAL) WITHOUT ROWID;
"""

#: Of this run only, in a temporary file.
PASSING = """
PRAGMA temp_store = FILE;
PRAGMA synchronous = NORMAL;
CREATE TEMP TABLE ref (path TEXT, task TEXT, split TEXT, file TEXT, entry INTEGER, record TEXT);
CREATE TEMP TABLE seen (
    part TEXT, digest BLOB, entry INTEGER, record TEXT, PRIMARY KEY (part, digest)) WITHOUT ROWID;
CREATE TEMP TABLE fault (
    code TEXT, task TEXT, split TEXT, file TEXT, entry INTEGER, record TEXT, message TEXT);
"""

#: Once every image that is referred to has been judged.
INDEXES = """
CREATE INDEX ref_path ON ref (path);
CREATE TEMP TABLE shown AS
    SELECT ref.*, image.sha256 FROM ref JOIN image USING (path) WHERE image.sha256 <> '';
CREATE INDEX shown_content ON shown (task, sha256);
"""

#: Every entry of another split whose image training shows: the first training record with the same file (or
#: none), and the first one with the same bytes.
OVERLAP = """
SELECT held.path, held.task, held.split, held.file, held.entry, held.record, taught.path, taught.record,
    same.record
FROM shown AS held JOIN (
    SELECT task, sha256, path, record, MIN(entry) FROM shown WHERE split = 'train' GROUP BY task, sha256
) AS taught ON held.task = taught.task AND held.sha256 = taught.sha256
LEFT JOIN (
    SELECT task, path, record, MIN(entry) FROM ref WHERE split = 'train' GROUP BY task, path
) AS same ON held.task = same.task AND held.path = same.path
WHERE held.split <> 'train'
"""

#: Pairs of tasks: images tested in the one that the other trains on.
SHARED = """
SELECT held.task, taught.task, COUNT(*)
FROM (SELECT DISTINCT task, sha256 FROM shown WHERE split = 'test') AS held
JOIN (SELECT DISTINCT task, sha256 FROM shown WHERE split = 'train') AS taught
    ON held.sha256 = taught.sha256 AND held.task <> taught.task
GROUP BY held.task, taught.task
"""


def default_state(sequence: TaskSequence) -> Path:
    """Where a sequence's checks are remembered unless told otherwise: by its name and its files' place."""
    places = "\n".join(sorted(str(path) for task in sequence.tasks for path in task.files.values()))
    folder = writable(cache_root() / "data_check")
    return folder / f"{sequence.name}-{hashlib.sha256(places.encode()).hexdigest()[:8]}.sqlite"


class Memory:
    """The memory of one sequence's checks.

    Args:
        path: SQLite file, made when it is not there.

    Raises:
        DeloError: the file is no such memory, or another check holds it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._saved = path, time.monotonic()
        self._db = sqlite3.connect(path, timeout=2)
        try:
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.executescript(LASTING + PASSING)
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise DeloError(
                f"The memory of earlier checks cannot be used: {error}.",
                given=path,
                fix="end other checks of the same data; if there are none, delete this file",
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.save()
        self._db.close()
        if isinstance(error, sqlite3.OperationalError):
            raise DeloError(
                f"The memory of the check cannot be written: {error}.",
                given=self.path,
                fix="make room there and in the folder for temporary files; the same command goes on",
            ) from error

    def save(self, every: float = 0.0) -> None:
        """Write to the disk, unless that was less than `every` seconds ago."""
        if time.monotonic() - self._saved >= every:
            self._db.commit()
            self._saved = time.monotonic()

    # What a run finds.

    def add(self, fault: Fault) -> None:
        """Remember a fault."""
        row = (fault.code, fault.task, fault.split, fault.file, fault.entry, fault.record, fault.message)
        self._db.execute("INSERT INTO fault VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def accept(self, codes: Iterable[str]) -> None:
        """Turn faults of these kinds into notes that still name each."""
        for code in codes:
            change = "UPDATE fault SET code = 'accepted', message = ? || message WHERE code = ?"
            self._db.execute(change, (f"{code}: ", code))

    def counts(self) -> dict[tuple[str, str, str], int]:
        """How many faults and notes there are: (task, split, code) -> number."""
        rows = self._db.execute("SELECT task, split, code, COUNT(*) FROM fault GROUP BY task, split, code")
        return {(task, split, code): number for task, split, code, number in rows}

    def faults(self, notes: bool = False) -> Iterator[Fault]:
        """Everything found, or the notes instead, by task, split and entry."""
        marks = ", ".join("?" * len(NOTES))
        query = f"SELECT * FROM fault WHERE code {'' if notes else 'NOT '}IN ({marks})"
        order = " ORDER BY task, split, file, entry IS NOT NULL, entry, rowid"
        return (Fault(*row) for row in self._db.execute(query + order, tuple(NOTES)))

    def first_use(self, part: str, digest: bytes, entry: int, record: str) -> tuple[int, str] | None:
        """The (entry, record) that used `digest` before in this file, or None and it is remembered."""
        row = (part, digest, entry, record)
        if self._db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?, ?, ?)", row).rowcount:
            return None
        query = "SELECT entry, record FROM seen WHERE part = ? AND digest = ?"
        found: tuple[int, str] = self._db.execute(query, (part, digest)).fetchone()
        return found

    def forget_uses(self) -> None:
        """Make room when a file has been read."""
        self._db.execute("DELETE FROM seen")

    def refer(self, path: str, task: str, split: str, file: str, entry: int, record: str) -> None:
        """An entry shows an image."""
        row = (path, task, split, file, entry, record)
        self._db.execute("INSERT INTO ref VALUES (?, ?, ?, ?, ?, ?)", row)

    # Images.

    def images(self) -> Iterator[str]:
        """Paths of all images that are referred to, each once, in order."""
        return (path for (path,) in self._db.execute("SELECT DISTINCT path FROM ref ORDER BY path"))

    def knows(self, path: str, size: int, mtime_ns: int) -> bool:
        """Whether a file in this state was judged before, by the same rules."""
        query = "SELECT 1 FROM image WHERE path = ? AND size = ? AND mtime_ns = ? AND version = ?"
        return self._db.execute(query, (path, size, mtime_ns, VERSION)).fetchone() is not None

    def judged(self, verdicts: Iterable[Verdict]) -> None:
        """Remember verdicts."""
        self._db.executemany(
            "INSERT OR REPLACE INTO image VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (v.path, v.size, v.mtime_ns, VERSION, v.sha256, v.width, v.height, v.code, v.reason)
                for v in verdicts
            ],
        )

    def size(self, path: str) -> tuple[int, int] | None:
        """Width and height of an image; zero where it cannot be decoded, None where it was never judged."""
        query = "SELECT width, height FROM image WHERE path = ?"
        found: tuple[int, int] | None = self._db.execute(query, (path,)).fetchone()
        return found

    def index(self) -> None:
        """Prepare what the questions below need, after the last verdict."""
        self._db.executescript(INDEXES)

    def add_bad_images(self) -> None:
        """Remember a fault for every entry whose image was judged bad."""
        columns = "code, task, split, file, entry, record, reason"
        self._db.execute(
            f"INSERT INTO fault SELECT {columns} FROM ref JOIN image USING (path) WHERE code <> ''"
        )

    def add_overlaps(self) -> None:
        """Remember a fault for every entry of another split whose image training shows too."""
        for path, task, split, file, entry, record, other, equal, same in self._db.execute(OVERLAP):
            code = "overlap_content" if same is None else "overlap_path"
            told = f"{equal}, as {other}" if same is None else same
            message = f"{path} is also shown by the training record {told}"
            self.add(Fault(code, task, split, file, entry, record, message))

    def shared(self) -> list[tuple[str, str, int]]:
        """(task that tests, task that trains, number of images) for tasks that share images."""
        return self._db.execute(SHARED).fetchall()

    def image_counts(self) -> dict[tuple[str, str], int]:
        """Distinct images of every (task, split)."""
        rows = self._db.execute("SELECT task, split, COUNT(DISTINCT path) FROM ref GROUP BY task, split")
        return {(task, split): number for task, split, number in rows}

    # Annotation files.

    def annotation(self, path: str, sha256: str) -> float | None:
        """Remember a file's hash; when it differs from the last one, the time of that check."""
        row: Any = self._db.execute(
            "SELECT sha256, checked FROM annotation WHERE path = ?", (path,)
        ).fetchone()
        self._db.execute("INSERT OR REPLACE INTO annotation VALUES (?, ?, ?)", (path, sha256, time.time()))
        return float(row[1]) if row and row[0] != sha256 else None
