"""`delo-llava export`: a plain folder, exact but for one rounding, whole or not there at all."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_support import Story, items, story
from transformers import AutoModelForImageTextToText, AutoProcessor

from delo_llava.adapters.merging import adapter_updates, fold
from delo_llava.adapters.unmergeable import PER_SAMPLE, PER_TASK
from delo_llava.backbones.base import Backbone, find_backbone
from delo_llava.cli import main
from delo_llava.config import dump_config
from delo_llava.errors import DeloError
from delo_llava.methods.base import Method
from delo_llava.runs.export import export_stage, merge
from delo_llava.runs.identity import base_facts
from delo_llava.runs.manifest import write_manifest
from delo_llava.runs.publish import verify
from delo_llava.runs.store import BASE, RunStore

ROWS = items("task0")


def run_of(told: Story, folder: Path) -> Path:
    """What a run of a method that was trained in memory has on disk."""
    store = RunStore(folder / "run")
    store.begin(dump_config(told.bench.config), {"base": base_facts(store, told.bench.path)})
    for stage, done in zip(told.stages, told.trained, strict=True):
        with store.publish(stage.name) as draft:
            for file in done.folder.iterdir():
                (draft / file.name).write_bytes(file.read_bytes())
        store.update_stage(stage.name, index=stage.index)
    return store.root


@pytest.mark.parametrize(("kind", "count"), [("llava", 2), ("qwen2_5_vl", 1)])
def test_stock_transformers_opens_what_was_written(kind: str, count: int, tmp_path: Path) -> None:
    told, out = story("dac", kind), tmp_path / "deep" / "merged"
    facts = export_stage(run_of(told, tmp_path), str(count - 1), out, device="cpu")
    verify(out)
    assert json.loads((out / "provenance.json").read_text()) == facts
    assert facts["stage"] == f"task{count - 1}" and len(facts["adapters"]) == count
    known = json.loads((tmp_path / "run" / "run.json").read_text())["base"]["sha256"]
    assert facts["base"]["sha256"] == known and facts["dtype"] == "float32" and facts["onto"] == "original"
    assert facts["rounding"]["largest"] < 1e-5 and facts["rounding"]["linears"] == 16
    model = AutoModelForImageTextToText.from_pretrained(out)
    with torch.no_grad():
        found = model(**told.bench.batch(ROWS).inputs).logits
    assert torch.allclose(found, told.bench.logits(told.bench.loaded(told.past(count)), ROWS), atol=1e-4)
    own, base = {"provenance.json", "manifest.json", "model.safetensors"}, Path(told.bench.path)
    shared = {p.name for p in out.iterdir()} - own
    assert shared == {p.name for p in base.iterdir()} - own
    same = [name for name in shared if "token" in name or "processor" in name]
    assert same and all((out / name).read_bytes() == (base / name).read_bytes() for name in same)
    assert "peft" not in (out / "config.json").read_text()
    if kind == "llava":  # transformers' Qwen processor wants torchvision
        assert AutoProcessor.from_pretrained(out).tokenizer("what color")
    backbone, path = find_backbone(out)
    assert type(backbone) is type(told.bench.backbone) and path == str(out), "a base like any other"


@pytest.mark.parametrize(("quant", "onto"), [("none", "trained"), ("nf4", "trained"), ("nf4", "original")])
def test_every_weight_is_rounded_once(quant: str, onto: Any) -> None:
    """To bfloat16, from float64: W + Σ s·B A, of the weights that 4 bit stands for or of the checkpoint's."""
    told = story("lora", "llava", quant)
    method, past = told.bench.method, told.past(2)
    merged = merge(method, told.bench.path, past, torch.bfloat16, onto, "cpu")
    assert {p.dtype for p in merged.model.parameters()} == {torch.bfloat16}
    live: Any = told.bench.loaded(past)
    plain = told.bench.backbone.load(told.bench.path, quant="none", device="cpu")
    updates = dict(adapter_updates(live))
    assert updates.keys() == merged.rounding.keys() and len(updates) == 16
    for name, update in updates.items():
        layer = live.get_base_model().get_submodule(name)
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        assert torch.allclose(update, layer.scaling["default"] * b @ a)
        weight = plain.get_submodule(name).weight
        if quant == "nf4" and onto == "trained" and "language" in name:
            weight = dequantised(layer.base_layer)
        exact = weight.double() + update
        assert torch.equal(merged.model.get_submodule(name).weight, exact.bfloat16()), name
        assert 0 < merged.rounding[name] < 1
    untouched = merged.model.get_input_embeddings().weight
    assert torch.equal(untouched, plain.get_input_embeddings().weight.bfloat16())


def dequantised(linear: Any) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    found: torch.Tensor = bnb.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return found


def test_a_weight_that_overflows_is_refused() -> None:
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(DeloError, match="not finite"):
        fold(linear, torch.full((2, 2), 1e6, dtype=torch.float64), torch.float16)


def test_what_cannot_be_merged_says_why_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {name: run_of(story(name), tmp_path / name) for name in ("delo", "individual")}
    monkeypatch.setattr(Backbone, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    for name, why in (
        ("delo", "another matrix for every sample"),
        ("individual", "the true task says which"),
    ):
        with pytest.raises(DeloError, match=f"`{name}` cannot be merged: .*{why}") as refusal:
            export_stage(runs[name], "last", tmp_path / "out")
        assert "adapters" in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "unmerged", "words", "told"),
    [
        ("delo", PER_SAMPLE, [], "another matrix for every sample"),
        ("individual", PER_TASK, [], "the true task says which"),
        ("lora", None, ["--stage=7"], "does not exist or is not trained"),
    ],
)
def test_the_command_refuses_by_the_run_s_record_without_torch(
    method: str, unmerged: tuple[str, str] | None, words: list[str], told: str, tmp_path: Path
) -> None:
    store = RunStore(tmp_path / "run")
    store.begin("method: x\n", {"method": method, "unmerged": unmerged, "stages": {}})
    code = (
        "import sys, delo_llava.cli as cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as end: sys.exit(end.code if 'torch' not in sys.modules else 'torch')"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "export",
        f"--run={store.root}",
        f"--out={tmp_path / 'out'}",
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr and "Traceback" not in done.stderr


def test_another_base_than_the_run_s_is_refused(tmp_path: Path) -> None:
    run = run_of(story("dac"), tmp_path)
    record = json.loads((run / "run.json").read_text())
    record["base"]["sha256"] = "0" * 64
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(DeloError, match=r"trained over another base than the run.s(.|\n)*sha256 (?!0000)"):
        export_stage(run, "last", tmp_path / "out")
    for folder in (run / "adapters").iterdir():  # as if an older version had published them
        (folder / BASE).unlink()
        write_manifest(folder)
    record["stages"] = {name: {"index": stage["index"]} for name, stage in record["stages"].items()}
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(DeloError, match=r"not the one that the adapters were trained over(.|\n)*0000"):
        export_stage(run, "last", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_that_route_are_never_taken_for_a_fixed_matrix() -> None:
    """Also where a method says by mistake that it can be merged."""
    told = story("dac")
    inside = told.bench.begin(told.stages[0])
    with pytest.raises(DeloError, match="no fixed|not add a fixed"):
        next(adapter_updates(inside))
    method: Method = story("delo").bench.method
    model: Any = story("delo").bench.loaded(story("delo").past(2))
    with pytest.raises(DeloError, match="not add a fixed"):
        next(adapter_updates(model))
    with pytest.raises(DeloError, match="cannot be merged"):
        method.updates(model)


def test_a_folder_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = run_of(story("lora"), tmp_path), tmp_path / "out"

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("delo_llava.runs.export.copy_processor", full)
        with pytest.raises(DeloError, match=r"(?s)exported model cannot be written: no space.*MiB free"):
            export_stage(run, "last", out, device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    export_stage(run, "task0", out, device="cpu")
    with pytest.raises(DeloError, match="there already"):
        export_stage(run, "task1", out, device="cpu")


def test_only_what_was_published_is_exported(tmp_path: Path) -> None:
    run, out = run_of(story("lora"), tmp_path), tmp_path / "out"
    for stage in ("2", "task7", "-1"):
        with pytest.raises(DeloError, match=r"(?s)does not exist.*task0.*task1.*last"):
            export_stage(run, stage, out)
    with pytest.raises(DeloError, match="no run in this folder"):
        export_stage(tmp_path, "last", out)
    file = run / "adapters" / "task0" / "adapter_config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(DeloError, match="its bytes differ"):
        export_stage(run, "last", out)


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = run_of(story("lora"), tmp_path), tmp_path / "out"
    words = ["export", "--run", str(run), "--out", str(out), "--dtype", "bfloat16", "--device", "cpu"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "lora after task1, bfloat16" in told and "16 weights merged; rounding took at most" in told
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
