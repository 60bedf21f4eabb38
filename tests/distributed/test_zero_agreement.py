"""Two ranks under ZeRO 1, 2, 3 and the one-process engine agree on loss curve, norms and adapters."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import training_support as support
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.long]

DELO = [
    "--method=delo",
    "--delo.pool_size=4",
    "--delo.rank=2",
    "--delo.latent=8",
    "--delo.align=0.1",
    "--quant=nf4",
    "--missing.ratio=0.4",
]
#: Run name -> what it changes. `sparse_*` leaves most passes of one rank without an image.
RUNS = {
    "zero1": ["--zero=1"],
    "zero2": ["--zero=2"],
    "zero2_offload": ["--zero=2_offload"],
    "zero3": ["--zero=3"],
    "sparse_zero2": ["--zero=2", "--missing.ratio=0.9", "--missing.kind=image"],
    "left": ["--zero=2"],
    "delo_zero1": [*DELO, "--zero=1"],
    "delo_zero2": [*DELO, "--zero=2"],
    "delo_zero3": [*DELO, "--zero=3", "--train.gradient_checkpointing=true"],
}
ALONE = {"single": [], "delo_single": DELO, "sparse_single": ["--missing.ratio=0.9", "--missing.kind=image"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("agreement")
    recipe, model = support.write_sequence(folder), tiny_models.session("llava")
    outputs = {name: folder / name for name in {**RUNS, **ALONE}}
    jobs: dict[str, dict[str, Any]] = {
        name: {"words": support.words(recipe, model, outputs[name], *more)}
        for name, more in {**RUNS, **ALONE}.items()
    }
    several = [jobs[name] for name in RUNS if name != "left"]
    several += [{**jobs["left"], "stop": 0}, jobs["left"]]
    assert support.launch(several, folder, ranks=2) == [0, 0]
    assert support.launch([jobs[name] for name in ALONE], folder) == [0]
    return outputs


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload", "zero3"])
def test_the_loss_curve_is_that_of_one_process(runs: dict[str, Path], name: str) -> None:
    assert_same_curve(support.metrics(runs["single"]), support.metrics(runs[name]))


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload", "zero3"])
def test_the_adapters_are_those_of_one_process(runs: dict[str, Path], name: str) -> None:
    for task in ("task0", "task1"):
        file = f"adapters/{task}/adapter_model.safetensors"
        expected, found = load_file(runs["single"] / file), load_file(runs[name] / file)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert float((tensor - found[key]).abs().max()) < 1e-4, key


def test_a_rank_without_images_does_not_disturb_the_others(runs: dict[str, Path]) -> None:
    assert_same_curve(support.metrics(runs["sparse_single"]), support.metrics(runs["sparse_zero2"]))


@pytest.mark.parametrize("name", ["delo_zero1", "delo_zero2", "delo_zero3"])
def test_delo_over_nf4_learns_alike(runs: dict[str, Path], name: str) -> None:
    """Also with recomputed activations; and the keys are exact sums over ranks and accumulation."""
    assert_same_curve(support.metrics(runs["delo_single"]), support.metrics(runs[name]))
    for task in ("task0", "task1"):
        file = f"adapters/{task}/task_keys.safetensors"
        expected, found = load_file(runs["delo_single"] / file), load_file(runs[name] / file)
        assert expected["count"].tolist() == found["count"].tolist() and expected["count"].min() > 0
        assert float((expected["sums"] - found["sums"]).abs().max()) < 1e-5


def test_a_run_left_between_stages_goes_on_to_the_same_bits(runs: dict[str, Path]) -> None:
    assert support.bits(runs["left"]) == support.bits(runs["zero2"])


def test_training_changed_something(runs: dict[str, Path]) -> None:
    losses = [entry["loss"] for entry in support.metrics(runs["single"]) if entry["stage"] == 0]
    assert losses[-1] < 0.9 * losses[0], "a curve that does not move would agree trivially"


def assert_same_curve(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    assert [(e["stage"], e["step"]) for e in expected] == [(f["stage"], f["step"]) for f in found]
    for one, other in zip(expected, found, strict=True):
        assert abs(one["loss"] - other["loss"]) < 1e-4
        assert abs(one["grad_norm"] - other["grad_norm"]) < 1e-3 * max(1.0, one["grad_norm"])
        assert one["lr"] == other["lr"]
        assert one["answer_tokens"] == other["answer_tokens"]
