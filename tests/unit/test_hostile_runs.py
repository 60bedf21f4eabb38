"""Hostile checkpoints, models and run folders: refused clearly, nothing executed or overwritten."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
import training_support as support
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file

from delo_eval.cli import main as evaluate
from delo_eval.matrix.results import read_results
from delo_llava.adapters.own import TENSORS, require_own_adapter
from delo_llava.backbones.base import find_backbone
from delo_llava.cli import main, main_train, resolve
from delo_llava.errors import DeloError
from delo_llava.methods.delo.config import DeloConfig
from delo_llava.runs.job import make_job
from delo_llava.runs.manifest import MANIFEST, manifest_faults, write_manifest
from delo_llava.runs.sequence import run_sequence
from delo_llava.runs.step_state import SCHEMA, StepCheckpoints
from delo_llava.runs.steps import StepStore
from delo_llava.runs.store import RunStore
from delo_llava.strict import read_json, read_tensors


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def header(entries: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with a header of one's own."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, kind: str = "F32", shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}


FORGED = {
    "length": header({"a": entry(0, 8)}, b"\0" * 8, 2**40),
    "short": header({"a": entry(0, 8)}, b"\0" * 4),
    "overlap": header({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12),
    "dtype": header({"a": entry(0, 8, "F64")}, b"\0" * 8),
    "unknown": header({"a": entry(0, 8, "PICKLE")}, b"\0" * 8),
    "shape": header({"a": entry(0, 8, shape=(2**62, 8))}, b"\0" * 8),
    "negative": header({"a": entry(0, 8, shape=(-2,))}, b"\0" * 8),
    "trailing": header({"a": entry(0, 8)}, b"\0" * 80),
    "empty": b"",
    "archive": b"PK\x03\x04" + b"\0" * 60,
}


# ---- tensors and adapters


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_safetensors_file_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / TENSORS
    file.write_bytes(FORGED[name])
    with pytest.raises(DeloError, match="cannot be read"):
        read_tensors(file, "The file")
    with pytest.raises(DeloError, match="tensors cannot be read"):
        require_own_adapter(tmp_path, LoraConfig)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder as PEFT writes it for `lora`."""
    folder = tmp_path / "adapter"
    LoraConfig(r=2, target_modules="x").save_pretrained(str(folder))
    save_file({"a": torch.ones(2)}, folder / TENSORS)
    return require_own_adapter(folder, LoraConfig)


@pytest.mark.parametrize("name", [TENSORS, "adapter_config.json", "adapter_model.bin"])
def test_a_pickle_in_an_adapter_is_not_executed(tmp_path: Path, adapter: Path, name: str) -> None:
    if name == "adapter_model.bin":
        (adapter / TENSORS).unlink()  # PEFT would take the .bin now
    (adapter / name).write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    with pytest.raises(DeloError, match="cannot be read"):
        require_own_adapter(adapter, LoraConfig)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "org/name"},
        {"peft_type": "DELO"},
        {"megatron_config": {"a": 1}, "megatron_core": "owned"},
        {"megatron_core": "os"},
        {"task_type": "SEQ_CLS"},
        {"modules_to_save": ["lm_head"]},
        {"layer_replication": [[0, 9]]},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [1]},
        {"revision": "main"},
        {"a_field_of_the_future": "x"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_configuration_that_reaches_further_is_refused(adapter: Path, change: dict[str, Any]) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DeloError, match="another kind|never does"):
        require_own_adapter(adapter, LoraConfig)


def test_where_a_configuration_says_its_base_was_is_of_no_effect(adapter: Path) -> None:
    """The base is the run's; PEFT notes these two and acts on them only in classes that are not used here."""
    file = adapter / "adapter_config.json"
    noted = {"base_model_name_or_path": "/owned", "auto_mapping": {"parent_library": "owned"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | noted))
    assert require_own_adapter(adapter, LoraConfig) == adapter
    with pytest.raises(DeloError, match="another kind"):
        require_own_adapter(adapter, DeloConfig)


@pytest.mark.parametrize(
    "entries",
    [
        {"../secret": {"bytes": 1, "sha256": "0"}},
        {"/etc/passwd": {"bytes": 1, "sha256": "0"}},
        {"a": {"bytes": 1}},
        {"a": "text"},
        ["a"],
        None,
    ],
    ids=["climbs", "absolute", "no-hash", "text", "list", "none"],
)
def test_a_manifest_leads_nowhere(tmp_path: Path, entries: Any) -> None:
    (tmp_path / "secret").write_text("s")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "a").write_text("a")
    (folder / MANIFEST).write_text(json.dumps({"schema": 1, "files": entries}))
    faults = manifest_faults(folder)
    assert faults and all("missing" in fault or "not in the manifest" in fault for fault in faults)


def test_what_follows_a_link_out_of_a_published_folder_is_told_when_it_changes(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (tmp_path / "outside").write_text("a")
    (folder / "a").symlink_to(tmp_path / "outside")
    write_manifest(folder)
    (tmp_path / "outside").write_text("b")
    assert "differ" in manifest_faults(folder)[0]


# ---- step checkpoints


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "rank-00000.safetensors"])
def test_a_pickle_in_a_checkpoint_is_not_executed(tmp_path: Path, name: str) -> None:
    """Also where the manifest vouches for it: who can write the folder can write its manifest."""
    folder = tmp_path / "step-000001"
    folder.mkdir()
    facts = {"task": "a"}
    state = {"schema": SCHEMA, **facts, "step": 1, "world": 1, "optimizer": {"scalars": {}, "groups": []}}
    (folder / "state.json").write_text(json.dumps(state))
    for file in ("weights.safetensors", "optimizer.safetensors", "rank-00000.safetensors"):
        save_file({"a": torch.ones(1)}, folder / file)
    (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    write_manifest(folder)
    ranks: Any = SimpleNamespace(run_first=lambda call: call(), same=lambda value: value, world=1, rank=0)
    checkpoints = StepCheckpoints(StepStore(tmp_path, keep=1), ranks, SimpleNamespace(), facts)  # type: ignore[arg-type]
    with pytest.raises(DeloError, match="file of a checkpoint cannot be read"):
        found = checkpoints.find()
        assert found is not None
        if name == "weights.safetensors":
            found.load_weights(torch.nn.Linear(1, 1))
        found.load_engine(SimpleNamespace())  # type: ignore[arg-type]
    (folder / "state.json").write_text("[" * 100_000)
    write_manifest(folder)
    with pytest.raises(DeloError, match="state of a checkpoint cannot be read"):
        checkpoints.find()
    assert not (tmp_path / "owned").exists()


# ---- models


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models.session("llava"), tmp_path / "model"))


def test_a_model_of_pickles_is_refused(tmp_path: Path, model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    backbone, path = find_backbone(model)
    with pytest.raises(DeloError, match="weights cannot be loaded"):
        backbone.load(path, quant="none", device="cpu")
    (model / "model.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    with pytest.raises(DeloError, match="weights cannot be loaded"):
        backbone.load(path, quant="none", device="cpu")
    assert not (tmp_path / "owned").exists()


def test_code_that_a_model_brings_is_not_imported(tmp_path: Path, model: Path) -> None:
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'owned')!r})\nclass C: pass\n")
    brought = {"auto_map": dict.fromkeys(("AutoConfig", "AutoProcessor", "AutoTokenizer"), "evil.C")}
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        file = model / name
        if file.is_file():
            file.write_text(json.dumps(json.loads(file.read_text()) | brought))
    backbone, path = find_backbone(model)
    backbone.load_processor(path)
    backbone.load(path, quant="none", device="cpu")
    assert not (tmp_path / "owned").exists()


def test_an_adapter_in_a_models_folder_cannot_change_the_base(model: Path) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/other"}))
    with pytest.raises(DeloError, match="holds an adapter too"):
        find_backbone(model)


def test_the_state_of_pretraining_comes_back_bit_by_bit_and_is_no_pickle(tmp_path: Path) -> None:
    from tools.mini_base.pretrain.loop import STATE, Stage

    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, betas=(0.9, 0.98))
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    stage = Stage(tmp_path)
    saved = {"model": layer.state_dict(), "optimizer": optimizer.state_dict()}
    stage.save(saved | {"step": 1, "spent": 0.1, "loss": 2.5})
    found = stage.load()
    assert found is not None and (found["step"], found["spent"], found["loss"]) == (1, 0.1, 2.5)
    again = torch.nn.Linear(3, 2)
    other = torch.optim.AdamW(again.parameters(), lr=0.5)
    again.load_state_dict(found["model"])
    other.load_state_dict(found["optimizer"])
    for model, rule in ((layer, optimizer), (again, other)):
        model.zero_grad()
        model(torch.full((1, 3), 0.5)).sum().backward()
        rule.step()
    assert torch.equal(layer.weight, again.weight)
    (tmp_path / STATE).write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    with pytest.raises(SafetensorError):
        stage.load()
    assert not (tmp_path / "owned").exists()


# ---- run folders


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one task, evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    support.write_sequence(folder, tasks=1, records=8)
    assert main_train(command(folder)) == 0
    return folder


def command(folder: Path) -> list[str]:
    return support.words(
        folder / "tiny.yaml", tiny_models.session("llava"), folder / "run", "--train.epochs=1"
    )


@pytest.fixture
def run(finished: Path) -> Any:
    """The run, put back as it was afterwards."""
    kept = finished / "kept"
    if not kept.exists():
        shutil.copytree(finished / "run", kept)
    yield finished / "run"
    shutil.rmtree(finished / "run")
    shutil.copytree(kept, finished / "run")


def code(call: Any, *words: Any) -> int:
    """Exit code of a command line."""
    try:
        return int(call(*words))
    except SystemExit as left:
        return int(left.code or 0)


GARBAGE = [b"\x80\x04\x95", b"[1, 2]", b"{}", b"null", b'{"a": ' + b"[" * 100_000, b"\xff", b""]
KINDS = ["pickle", "list", "object", "null", "deep", "bytes", "empty"]


@pytest.mark.parametrize("content", GARBAGE, ids=KINDS)
@pytest.mark.parametrize("name", ["run.json", "config.yaml", "results.json", "logs/hashes.json"])
def test_garbage_in_a_run_folder_is_told_and_kept(
    run: Path, name: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training goes on with code 2 or, where the file says nothing wrong (an empty object), as before."""
    (run / name).write_bytes(content)
    adapters = support.bits(run)
    left = code(main_train, command(run.parent))
    told = capsys.readouterr().err
    harmless = content == b"{}" and name in ("logs/hashes.json", "run.json")
    assert left == 2 or harmless, told
    assert "Traceback" not in told
    if left == 2:
        assert "error: " in told and (run / name).read_bytes() == content
    assert support.bits(run) == adapters


@pytest.mark.parametrize("content", GARBAGE, ids=KINDS)
def test_garbage_instead_of_results_is_told_by_the_harness(run: Path, content: bytes) -> None:
    (run / "results.json").write_bytes(content)
    assert code(evaluate, ["report", "--run", str(run)]) == 2
    with pytest.raises(DeloError):
        read_results(run)
    assert (run / "results.json").read_bytes() == content


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": ["../../etc"]},
        {"tasks": 5},
        {"matrix": {}},
        {"matrix": {"matched": [["a", {}]], "oracle": []}},
        {"patterns": {"..": {"matched": [[None]], "oracle": [[None]]}}},
        {"records": []},
        {"zero_shot": 3},
    ],
)  # fmt: skip
def test_results_of_another_shape_are_told(run: Path, change: dict[str, Any]) -> None:
    file = run / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DeloError, match=r"results\.json"):
        read_results(run)


def test_a_run_folder_may_be_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    words = [word for word in command(run.parent) if not word.startswith("--output")]
    before = support.bits(run)
    assert main_train([*words, f"--output={tmp_path / 'link'}"]) == 0
    assert support.bits(run) == before and (tmp_path / "link").is_symlink()


def test_a_draft_that_is_a_link_takes_nothing_along(run: Path, tmp_path: Path) -> None:
    """What an interrupted launch left is cleared; what a link there leads to is not."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    (run / "adapters" / ".draft-x").symlink_to(precious)
    assert code(main_train, command(run.parent)) == 2
    assert (precious / "file").read_text() == "kept"


def test_names_of_folders_come_from_the_recipe_alone(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run")
    (tmp_path / "run/adapters/task0").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"stages": {"../../owned": {}}, "tasks": ["../x"]}))
    assert read_json(store.run, "run.json")["tasks"] == ["../x"]
    folder = tmp_path / "data"
    support.write_sequence(folder, tasks=1, records=8)
    with pytest.raises(DeloError, match="made of something else"):
        run_sequence(make_job(resolve([*command(folder)[:3], f"--output={tmp_path / 'run'}", "--zero=none"])))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run"]


# ---- scripts


def test_words_reach_the_batch_script_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = f"x'; mkdir {tmp_path}/owned; $(mkdir {tmp_path}/owned) `mkdir {tmp_path}/owned` \""
    recipe = support.write_sequence(tmp_path / "data", tasks=1)
    script = tmp_path / "job.sbatch"
    words = [f"--task_seq={recipe}", f"--data.root={recipe.parent}", "--model=mini-llava", f"--output={evil}"]
    common = ["--gpus", "0", "--cpus", "1", "--time", "10", "--script", str(script)]
    assert main(["slurm", *common, "--logs", str(tmp_path / "logs"), *words]) == 0
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("srun", "scontrol", "getent", "sleep", "deepspeed"):
        (tools / name).write_text("#!/bin/sh\nexit 0\n")
        (tools / name).chmod(0o755)
    env = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n", "HOME": "/"}
    import subprocess

    subprocess.run(["bash", str(script)], env=env, cwd=tmp_path, check=False, capture_output=True, timeout=60)
    assert script.is_file() and not (tmp_path / "owned").exists()
