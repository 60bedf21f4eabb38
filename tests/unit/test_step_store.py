"""Step checkpoints on disk: which one is found, which ones stay, what a damaged manifest says."""

from pathlib import Path

import pytest

from delo_llava.runs.manifest import MANIFEST, manifest_faults, write_manifest
from delo_llava.runs.steps import StepStore


def publish(store: StepStore, step: int, text: str = "weights") -> Path:
    draft = store.draft(step, "launch")
    draft.mkdir(parents=True)
    (draft / "file").write_text(text)
    return store.publish(draft, step)


def steps(store: StepStore) -> list[int]:
    return [step for step, _ in store.published()]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_ones_stay(tmp_path: Path, keep: int) -> None:
    store = StepStore(tmp_path / "task", keep)
    for step in (1, 2, 3, 4):
        publish(store, step)
    assert steps(store) == [4, 3, 2, 1][:keep]
    assert store.newest_valid() == (store.folder / "step-000004", [])


def test_a_bad_newer_one_never_pushes_a_good_one_out(tmp_path: Path) -> None:
    store = StepStore(tmp_path / "task", 1)
    (publish(store, 4) / "file").write_text("damaged")
    good = publish(store, 2)
    found, faults = store.newest_valid()
    assert found == good and "step-000004/file: its bytes differ" in faults[0]
    better = publish(store, 4, "new")
    assert (better / "file").read_text() == "new"
    assert (store.folder / "step-000004.bad" / "file").read_text() == "damaged", "kept to be looked at"
    assert store.newest_valid() == (better, []) and steps(store) == [4]


def test_what_a_killed_launch_left_is_removed(tmp_path: Path) -> None:
    store = StepStore(tmp_path / "task", 1)
    publish(store, 1)
    (store.draft(2, "dead") / "part").mkdir(parents=True)
    (store.folder / ".trash-step-000000").mkdir()
    assert steps(store) == [1]
    store.clear()
    assert [path.name for path in store.folder.iterdir()] == ["step-000001"]
    store.discard()
    assert not list(tmp_path.iterdir())


def test_no_bit_of_a_manifest_can_flip_without_a_word(tmp_path: Path) -> None:
    """Those of a name or a hash are told; no bit raises anything else."""
    folder = publish(StepStore(tmp_path / "task", 1), 1)
    content = (folder / MANIFEST).read_bytes()
    start = content.index(b'"sha256"')
    told = {
        *range(start, start + len('"sha256": ""') + 64),
        *range(content.index(b'"file"'), content.index(b'"file"') + 6),
    }
    for place in range(len(content)):
        for bit in (0, 6):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            (folder / MANIFEST).write_bytes(bytes(changed))
            assert manifest_faults(folder) or place not in told


@pytest.mark.parametrize(
    "text", ["null", "[]", '{"files": []}', '{"files": {"file": {}}}', '{"files": {"file": 3}}']
)
def test_a_manifest_of_another_form_is_told(tmp_path: Path, text: str) -> None:
    folder = publish(StepStore(tmp_path / "task", 1), 1)
    (folder / MANIFEST).write_text(text)
    assert "missing or unreadable" in manifest_faults(folder)[0]
    (folder / MANIFEST).unlink()
    write_manifest(folder)
    assert manifest_faults(folder) == []
