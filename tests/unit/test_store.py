"""The run folder: atomic publishing, manifests that name what changed, tensors that may not be published."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from delo_llava.errors import DeloError
from delo_llava.files import HashCache, combined_hash, sha256_file, write_json_atomic
from delo_llava.runs.manifest import manifest_faults
from delo_llava.runs.steps import StepStore
from delo_llava.runs.store import RunStore, check_tensors, verify

GOOD = {"layer.lora_A.weight": torch.ones(2, 4), "layer.lora_B.weight": torch.full((4, 2), 0.5)}


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    store = RunStore(tmp_path / "run")
    store.create()
    return store


def publish(store: RunStore, task: str, tensors: dict[str, torch.Tensor] = GOOD) -> Path:
    with store.publish(task) as folder:
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "more").mkdir()
        (folder / "more" / "note.json").write_text("{}")
    return store.adapter(task)


def test_a_published_folder_is_whole_and_noted(store: RunStore) -> None:
    folder = publish(store, "one")
    assert store.finished("one") and not store.finished("two")
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(listed) == {"adapter_model.safetensors", "more/note.json"}
    assert listed["more/note.json"] == {"bytes": 2, "sha256": sha256_file(folder / "more" / "note.json")}
    assert store.stage("one")["manifest"] == sha256_file(folder / "manifest.json")
    store.verify_published(["one"])


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_whoever_may_read_the_run_may_read_its_adapters(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        store = RunStore(tmp_path / "run")
        store.create()
        folder = publish(store, "one")
    finally:
        os.umask(before)
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) == 3 and {stat.S_IMODE(p.stat().st_mode) for p in files} == {mode}


def test_a_block_that_fails_leaves_nothing(store: RunStore) -> None:
    with pytest.raises(RuntimeError), store.publish("one") as folder:
        save_file(GOOD, folder / "adapter_model.safetensors")
        raise RuntimeError("disk full")
    assert list(store.adapters.iterdir()) == []
    assert not store.finished("one")


def test_drafts_of_a_killed_process_are_cleared(store: RunStore) -> None:
    draft = store.adapters / ".draft-one"
    draft.mkdir()
    (draft / "half").write_text("x")
    texts = [store.root / ".run.json.712.tmp", store.root / "predictions" / "0" / ".a.jsonl.9.tmp"]
    mine = store.root / "predictions" / ".notes.tmp"
    for path in (*texts, mine):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    store.create()
    assert not draft.exists()
    assert [path for path in (*texts, mine) if path.exists()] == [mine], "only what this program writes"


def test_deleting_checkpoints_is_finished_by_the_next_launch(tmp_path: Path) -> None:
    steps = StepStore(tmp_path / "checkpoints" / "one", keep=2)
    trash = tmp_path / "checkpoints" / ".trash-one"  # a killed launch had renamed it
    (trash / "step-000001").mkdir(parents=True)
    steps.discard()
    assert not trash.exists()


def test_nothing_is_published_twice(store: RunStore) -> None:
    publish(store, "one")
    with pytest.raises(DeloError, match="already published"):
        publish(store, "one")


@pytest.mark.parametrize("damage", ["change", "remove", "add"])
def test_every_damage_is_named(store: RunStore, damage: str) -> None:
    folder = publish(store, "one")
    file = folder / "more" / ("new.json" if damage == "add" else "note.json")
    file.unlink() if damage == "remove" else file.write_text("[]")
    with pytest.raises(DeloError, match=str(file)):
        store.finished("one")
    with pytest.raises(DeloError, match=str(file)):
        verify(folder)
    assert len(manifest_faults(folder)) == 1


def test_a_rewrite_together_with_its_manifest_is_noticed(store: RunStore) -> None:
    from delo_llava.runs.manifest import write_manifest

    folder = publish(store, "one")
    (folder / "more" / "note.json").write_text("[]")
    write_manifest(folder)
    assert store.finished("one"), "the folder alone looks well"
    with pytest.raises(DeloError, match="rewritten"):
        store.verify_published(["one"])


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({}, "without any tensor"),
        ({"a.lora_A.weight": torch.empty(0)}, "is empty: a.lora_A.weight"),
        ({**GOOD, "b.lora_B.weight": torch.tensor([1.0, float("nan")])}, "not finite: b.lora_B.weight"),
        ({"a.lora_A.weight": torch.ones(2), "a.lora_B.weight": torch.zeros(2)}, "still zero"),
        (
            {
                "a.delo_A_image": torch.ones(2),
                "a.delo_B_image": torch.zeros(2),
                "a.delo_B_text": torch.zeros(2),
            },
            "still zero",
        ),
    ],
)
def test_tensors_that_hold_nothing_are_refused(
    store: RunStore, tensors: dict[str, torch.Tensor], fault: str
) -> None:
    with pytest.raises(DeloError, match=fault):
        publish(store, "one", tensors)
    assert not store.adapter("one").exists()


def test_one_modality_may_stay_untrained(tmp_path: Path) -> None:
    save_file({"a.delo_B_image": torch.zeros(2), "a.delo_B_text": torch.ones(2)}, tmp_path / "x.safetensors")
    check_tensors(tmp_path)


def test_the_record_grows_by_entries(store: RunStore) -> None:
    store.update_run(method="lora")
    store.update_stage("one", steps=3)
    store.update_stage("one", evaluated=True)
    assert store.read_run() == {"method": "lora", "stages": {"one": {"steps": 3, "evaluated": True}}}
    store.run.write_text("{")
    with pytest.raises(DeloError, match=r"run\.json cannot be read"):
        store.read_run()


def test_hashes_are_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from delo_llava import files

    file, memory = tmp_path / "data.json", tmp_path / "hashes.json"
    file.write_text("one")
    cache = HashCache(memory)
    first = cache.hash(file)
    cache.save()
    monkeypatch.setattr(files, "sha256_file", lambda path: "computed")
    assert HashCache(memory).hash(file) == first
    file.write_text("other")
    assert HashCache(memory).hash(file) == "computed"
    with pytest.raises(DeloError, match="missing"):
        cache.hash(tmp_path / "nowhere")


def test_the_combined_hash_covers_names_and_contents(tmp_path: Path) -> None:
    one, two = tmp_path / "a.bin", tmp_path / "b.bin"
    one.write_text("x"), two.write_text("y")
    cache = HashCache(tmp_path / "hashes.json")
    both = combined_hash(cache, [two, one])
    assert both == combined_hash(cache, [one, two])
    one.write_text("yy"), two.write_text("xx")
    assert combined_hash(cache, [one, two]) != both


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write_json_atomic(path, {"b": 1, "a": 2})
    assert json.loads(path.read_text()) == {"a": 2, "b": 1}
    with pytest.raises(TypeError):
        write_json_atomic(path, {"bad": object()})
    assert json.loads(path.read_text()) == {"a": 2, "b": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(tmp_path / "run")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("delo_llava.runs.publish.write_manifest", full)
    with pytest.raises(DeloError, match="No space left") as fault, store.publish("one") as folder:
        save_file({"a.delo_B": torch.ones(2)}, folder / "adapter_model.safetensors")
    assert "MiB free" in str(fault.value) and "same command" in str(fault.value)
    assert not list((tmp_path / "run" / "adapters").iterdir())
