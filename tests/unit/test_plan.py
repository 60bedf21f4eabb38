"""The planner: simulated memory against measured memory, sizes of known models, advice, refusals."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import tiny_models
import torch

from delo_llava import cli
from delo_llava.cluster.advice import (
    best_choice,
    candidates,
    communication,
    largest_answer_batch,
    measured_throughput,
    refuse_impossible,
    relative_time,
)
from delo_llava.cluster.measure import measure_step
from delo_llava.cluster.memory import MemoryModel, Setup
from delo_llava.cluster.models import planned_model, shipped_names
from delo_llava.cluster.plan import Job, count_text, make_plan, size_text
from delo_llava.cluster.simulate import LiveBytes, meta_model
from delo_llava.config import RunConfig, load_config
from delo_llava.errors import DeloError
from delo_llava.methods.base import Method, Stage
from delo_llava.registry import load_plugin, plugin_names

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def config(*words: str) -> RunConfig:
    return load_config(None, list(words))


def test_live_bytes_follow_what_is_alive() -> None:
    with LiveBytes() as live:
        a = torch.empty(1024, device="meta")
        b = a + 1
        view = b[10:]
        assert live.now == 2 * 4096
        del a, b
        assert live.now == 4096, "a view keeps its storage"
        del view
    assert (live.now, live.peak) == (0, 2 * 4096)


@pytest.mark.parametrize("method", ["delo", "lora"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_planned_step_needs_what_a_real_one_does(method: str, recompute: bool, tmp_path: Path) -> None:
    """Within 10 % of the profiler's peak, on the shipped model in 4 bit."""
    run = config(
        f"--method={method}",
        "--train.micro_batch=6",
        f"--train.gradient_checkpointing={str(recompute).lower()}",
    )
    found = measure_step(run, tmp_path / "picture.png", words=120)
    memory = MemoryModel(planned_model("mini-llava"), run, found.tokens, cuda=False, answers=found.answers)
    planned = memory.step_bytes(Setup("nf4", "none", recompute, 6, 1))
    assert planned == pytest.approx(found.step, rel=0.10)


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_qwen_and_its_weights_are_planned_too(quant: str, tmp_path: Path) -> None:
    folder = tiny_models.session("qwen2_5_vl")
    run = config(f"--model={folder}", "--method=delo", f"--quant={quant}", "--train.micro_batch=8")
    found = measure_step(run, tmp_path / "picture.png", words=200)
    model = planned_model(str(folder), found.image_tokens)
    memory = MemoryModel(model, run, found.tokens, cuda=False, answers=found.answers)
    parts = memory.training(Setup(quant, "none", False, 8, 1))
    assert parts.activations == pytest.approx(found.step, rel=0.10)
    # The state of double quantisation is no parameter, so it is not among the measured weights.
    assert parts.base + parts.adapters == pytest.approx(found.weights, rel=0.02)


@pytest.mark.parametrize("method", plugin_names("method"))
def test_a_method_s_footprint_is_what_it_trains(method: str) -> None:
    run = config(f"--method={method}", "--quant=none", "--device=cpu")
    model = planned_model("mini-llava")
    kind = cast(type[Method], load_plugin("method", method))
    here = kind(kind.Config(**run.methods[method]), run, model.backbone)
    said = here.footprint(meta_model(model.backbone, model.config, torch.float32))
    base = model.backbone.load(str(Path(cli.__file__).parent / "mini/assets/mini_llava"), quant="none")
    injected: Any = here.begin(base, Stage(0, "a"))
    trained = sum(p.numel() for p in injected.parameters() if p.requires_grad)
    assert said.parameters == trained
    maps = [b for name, b in injected.named_buffers() if ".delo_cross." in name]
    assert said.untrained == sum(b.numel() for b in maps) and bool(maps) == (method == "delo")


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llava-1.5-7b-hf", 7.06), ("llava-1.5-13b-hf", 13.35), ("Qwen2.5-VL-7B-Instruct", 8.29),
     ("Qwen2.5-VL-72B-Instruct", 73.41)],
)  # fmt: skip
def test_shipped_configurations_have_the_models_sizes(name: str, billions: float) -> None:
    planned = planned_model(name)
    model = meta_model(planned.backbone, planned.config, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert name in shipped_names()


def test_an_unknown_model_is_told_with_what_is_known() -> None:
    with pytest.raises(DeloError, match=r"did you mean llava-1\.5-7b-hf"):
        planned_model("llava-1.5-8b-hf")


@pytest.mark.parametrize(
    ("words", "world", "nearest"),
    [
        (["--zero=none"], 4, "--zero 2"),
        (["--train.global_batch=30"], 4, "train.micro_batch"),
        (["--attn=flash_attention_2", "--dtype=float32"], 1, "--attn sdpa"),
    ],
)
def test_impossible_combinations_name_the_nearest_that_works(
    words: list[str], world: int, nearest: str
) -> None:
    with pytest.raises(DeloError) as told:
        refuse_impossible(config(*words), world)
    assert nearest in told.value.render()


def test_missing_images_and_further_views_are_planned_under_zero_3() -> None:
    run = config("--zero=3", "--missing.ratio=0.5", "--delo.consistency=1", "--train.global_batch=64")
    refuse_impossible(run, 4)
    assert "3" in {setup.zero for setup in candidates(run, 4)}


def test_the_best_choice_is_the_fastest_that_fits() -> None:
    run = config("--train.global_batch=16", "--missing.ratio=0")
    memory = MemoryModel(planned_model("mini-llava"), run, tokens=256)
    everything = {setup: memory.training(setup).needed for setup in candidates(run, 2)}
    for gib in (1.3, 1.5, 24):
        fitting = [setup for setup, size in everything.items() if size <= gib * 2**30]
        chosen = best_choice(memory, run, 2, gib)
        assert (chosen is None) == (not fitting)
        if chosen is not None:
            assert chosen.parts.needed == everything[chosen.setup] <= gib * 2**30
            assert relative_time(chosen.setup) == min(map(relative_time, fitting))
    assert best_choice(memory, run, 2, 0.5) is None
    batch = largest_answer_batch(memory, "nf4", 6, 8, 2)
    assert memory.evaluation("nf4", batch, 6, 8).total <= 2 * 2**30
    assert memory.evaluation("nf4", batch + 1, 6, 8).total > 2 * 2**30


def test_evaluation_counts_weights_once() -> None:
    """The bare forward needs far less than the weights, and grows with the rows by the KV cache and more."""
    run = config("--eval.batch_size=1")
    memory = MemoryModel(planned_model("mini-llava"), run, tokens=64)
    one, two = (memory.evaluation("none", rows, 6, 8) for rows in (1, 2))
    text = memory.model.config.get_text_config()
    cache_bytes = 2 * text.num_hidden_layers * text.hidden_size * (64 + 8) * 2
    assert one.activations < 0.5 * one.base
    assert two.activations - one.activations > cache_bytes
    said = memory.footprint
    assert one.adapters == 6 * 4 * (said.parameters + said.untrained) and said.untrained == 2 * 128 * 129
    training = memory.training(Setup("none", "3", False, 1, 2))
    assert training.adapters == 4 * (said.parameters / 2 + said.untrained), "ZeRO-3 shares out no buffers"


def test_sharding_and_traffic_follow_the_stage() -> None:
    run = config()
    memory = MemoryModel(planned_model("mini-llava"), run, tokens=64)
    p = memory.footprint.parameters
    one, two, three = (memory.training(Setup("nf4", zero, False, 1, 4)) for zero in "123")
    assert (one.gradients, two.gradients) == (4 * p, p)
    assert one.optimizer == two.optimizer == 12 * p / 4
    assert three.base == two.base / 4 and three.quant_state == two.quant_state
    assert three.loading == two.base + two.quant_state + two.overhead, "every rank loads all of the base"
    offloaded = memory.training(Setup("nf4", "2_offload", False, 1, 4))
    assert (offloaded.optimizer, offloaded.host) == (0, two.optimizer)
    assert communication(memory, Setup("nf4", "2", False, 1, 1), 1) == 0
    assert communication(memory, Setup("nf4", "2", False, 1, 4), 1) == 2 * 4 * p * 3 / 4
    more = communication(memory, Setup("nf4", "3", False, 1, 4), 2) - 2 * 4 * p * 3 / 4
    assert more == 4 * memory.base_bytes("nf4")[0] * 3 / 4


def test_records_are_given_or_counted_and_never_assumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DELO_LLAVA_DATA", str(tmp_path / "nowhere"))
    run = config(
        "--task_seq=coin6", "--model=mini-llava", "--train.global_batch=100", "--train.micro_batch=10"
    )
    assert make_plan(run, Job(tokens=64))["steps"] == {}
    given = make_plan(run, Job(tokens=64, records="gqa=950,vqav2=10", samples_per_second=2.0))
    assert given["steps"] == {"gqa": 10, "vqav2": 1}
    assert given["time"]["hours"] == pytest.approx(11 * 100 / 2 / 3600)
    for wrong in ("gqa=x", "gpa=5"):
        with pytest.raises(DeloError):
            make_plan(run, Job(tokens=64, records=wrong))


def test_throughput_is_read_from_a_run(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    lines = [{"stage": 0, "samples_per_second": rate} for rate in (1.0, 3.0, 9.0)]
    (tmp_path / "logs" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run.json").write_text(json.dumps({"stages": {"a": {"world": 2}}}))
    assert measured_throughput(tmp_path) == (3.0, 2)
    with pytest.raises(DeloError, match="no log of steps"):
        measured_throughput(tmp_path / "none")


def test_the_command_prints_tables_and_writes_json(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "plan.json"
    words = ["plan", "--model", "mini-llava", "--task_seq", "mini6", "--gpus", "2", "--tokens", "128"]
    assert cli.main([*words, "--records", "1600", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert "quantisation state" in said and "24 GB" in said and "science 100" in said
    assert "2.1 M parameters" in said and "--train.micro_batch" in said and "micro_bat\n" not in said
    assert max(map(len, said.splitlines())) <= 80
    plan = json.loads(file.read_text())
    assert plan["fits"] == [24, 40, 80] and plan["ranks"] == 2
    with pytest.raises(SystemExit, match="2"):
        cli.main([*words, "--train.micro_batsh=3"])
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize(("method", "steps"), [("joint", {"joint": 300}), ("zero_shot", {})])
def test_the_method_says_how_many_stages_there_are(method: str, steps: dict[str, int]) -> None:
    config = load_config(None, ["--model=mini-llava", "--task_seq=mini6", f"--method={method}"])
    plan = make_plan(config, Job(1, 1, tokens=64, records="1600", samples_per_second=10.0))
    assert plan["steps"] == steps
    one = 4 * plan["trainable"]
    assert plan["disk"]["adapters"] == one * len(steps)
    assert plan["time"]["hours"] == (pytest.approx(9600 / 10 / 3600) if steps else None)


def test_sizes_are_told_in_the_unit_that_shows_them() -> None:
    assert [size_text(size) for size in (0, 2048, 3 << 20, 13.2 * 2**30)] == [
        "0", "2.0 KiB", "3.0 MiB", "13.20 GiB",
    ]  # fmt: skip
    assert [count_text(count) for count in (7.06e9, 2.1e6, 850e3)] == ["7.06 B", "2.1 M", "850 K"]


def test_what_trains_but_cannot_be_evaluated_is_no_fit(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    plan = {"fits": [24, 40, 80], "evaluation_fits": []}
    monkeypatch.setattr("delo_llava.cluster.plan.make_plan", lambda *_: plan)
    monkeypatch.setattr("delo_llava.cluster.plan.tables", lambda _: [])
    assert cli.main(["plan", "--model", "mini-llava", "--task_seq", "mini6"]) == 1


def test_help_says_what_other_words_are(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["plan", "--help"])
    assert "--records" in capsys.readouterr().out
