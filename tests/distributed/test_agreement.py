"""What a method's hooks give does not depend on the engine; nor do batches with images on some ranks only."""

import json
import sys
from pathlib import Path

import pytest
import training_support as support
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import agreement

pytestmark = [pytest.mark.distributed, pytest.mark.long]

STAGES = ("1", "2", "3_split")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELO_LLAVA_PLUGINS", str(agreement.PLUGINS))
        agreement.run_methods(folder, list(agreement.METHODS), STAGES, [2])
    return folder


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("method", agreement.METHODS)
def test_two_ranks_are_one_process(runs: Path, method: str, zero: str) -> None:
    losses, weights = agreement.differences(runs, method, zero, 2)
    assert losses < 1e-5 and weights < 1e-4


@pytest.mark.parametrize("zero", ("none", *STAGES))
def test_a_projected_update_leaks_nothing(runs: Path, zero: str) -> None:
    """Over a whole stage: what each A moved within the subspace, relative to what it moved."""
    sys.path.insert(0, str(agreement.PLUGINS / "methods"))
    from projected import subspace

    micro = 8 if zero == "none" else 2
    first, second = (
        load_file(runs / f"projected-{zero}-{micro}" / "adapters" / task / "adapter_model.safetensors")
        for task in ("task0", "task1")
    )
    for name, before in first.items():
        if "lora_A" in name:
            basis = subspace(name.replace("lora_A", "lora_A.default"), before.shape[1])
            moved = (second[name] - before).double()
            assert moved.norm() > 1e-4
            assert float((moved @ basis).norm() / moved.norm()) < 1e-6


@pytest.mark.parametrize("zero", STAGES)
def test_a_penalty_is_reported_and_begins_with_the_second_stage(runs: Path, zero: str) -> None:
    terms = [
        (entry["stage"], entry["terms"]["ewc"]) for entry in support.metrics(runs / f"ewc_small-{zero}-2")
    ]
    assert all(value == 0 for stage, value in terms if stage == 0)
    later = [value for stage, value in terms if stage == 1]
    assert later[0] == 0 and later[-1] > 0, "it is zero where the stage begins, at its anchor"


def test_a_replayed_stage_has_more_examples(runs: Path) -> None:
    steps = [
        stage["steps"]
        for stage in json.loads((runs / "replay_small-2-2/run.json").read_text())["stages"].values()
    ]
    assert steps == [4, 5], "13 examples, then 13 and 4 remembered ones, twice, in batches of 8"


@pytest.mark.parametrize("method", ["lora", "delo"])
def test_images_on_some_ranks_only(method: str, tmp_path: Path) -> None:
    """All pairs of patterns of a pass, with fillers; nobody hangs and nothing is left of the step before."""
    row = agreement.pairs_in_a_row(["0000", "1000", "0100", "1101", "0x10"])
    found = agreement.run_images(tmp_path, row, method, STAGES)
    for zero in STAGES:
        for (loss, norm), (other, its) in zip(found["none"], found[zero], strict=True):
            assert abs(loss - other) < 1e-5 * max(1.0, loss)
            assert abs(norm - its) < 1e-4 * max(1.0, norm)


def test_every_pair_of_patterns_comes() -> None:
    row = agreement.pairs_in_a_row(agreement.PATTERNS)
    assert len(set(zip(row, row[1:], strict=False))) == len(agreement.PATTERNS) ** 2
