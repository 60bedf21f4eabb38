"""An encoder beside the base: its features are CLIP's own, a sample's alone, and part of what a run is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import training_support as support
from contract_support import Bench, examples, items, recipe, story
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from delo_llava.adapters.carrier import frozen_queries
from delo_llava.adapters.own import TENSORS
from delo_llava.config import load_config
from delo_llava.errors import DeloError
from delo_llava.features.encoder import Encoder
from delo_llava.methods.base import Past, Stage
from delo_llava.runs.job import make_job
from delo_llava.runs.record import open_run
from delo_llava.runs.store import RunStore

FOLDER = tiny_models.session_clip()


def test_queries_are_clip_s_own_features() -> None:
    """Against the CLIP called by hand, for every view; what is missing is zero."""
    bench, encoder = Bench("hide"), Encoder(FOLDER)
    batch = bench.batch(items("task0"))
    queries = encoder.queries(batch)
    model = CLIPModel.from_pretrained(FOLDER).eval()
    images, words = (kind.from_pretrained(FOLDER) for kind in (AutoImageProcessor, AutoTokenizer))

    def text(said: str) -> Tensor:
        ids = words([said], truncation=True, max_length=24, return_tensors="pt")["input_ids"]
        return F.normalize(model.text_projection(model.text_model(ids).pooler_output)[0], dim=0)

    with torch.no_grad():
        for row, (record, (has_image, has_text)) in enumerate(items("task0")):
            pixels = images([Image.open(record.image)], return_tensors="pt")["pixel_values"]
            seen = F.normalize(model.visual_projection(model.vision_model(pixels).pooler_output)[0], dim=0)
            expected = seen * has_image, text(record.context) * has_text, text(record.instruction)
            for view, wanted in zip(queries, expected, strict=True):
                torch.testing.assert_close(view[row], wanted, rtol=0, atol=1e-6)
    alone = encoder.queries(bench.batch(items("task0")[1:2]))
    assert all(torch.equal(one[0], all_[1]) for one, all_ in zip(alone, queries, strict=True))
    assert encoder.width == queries.image.shape[1] == 48


def test_a_long_text_is_cut_to_what_the_encoder_takes() -> None:
    encoder = Encoder(FOLDER)
    kept = encoder._text("the red circle " * 100)
    assert torch.isfinite(kept).all() and kept.norm() == pytest.approx(1.0, abs=1e-5)


def test_what_is_no_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeloError, match="no encoder of images and texts"):
        Encoder(tiny_models.session("llava"))
    with pytest.raises(DeloError, match="encoder's configuration"):
        Encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "projection_dim": 48}))
    with pytest.raises(DeloError, match="cannot be loaded"):
        Encoder(tmp_path)._text("a")


def test_an_encoder_decides_in_place_of_the_base(tmp_path: Path) -> None:
    """Its queries reach the decision as they are, and the method says whose they were."""
    told = story("hide")
    bench = Bench("hide", encoder=str(FOLDER))
    assert bench.method.capabilities.encoders == (str(FOLDER),)
    assert told.bench.method.capabilities.encoders == ()
    past: dict[str, Past] = {}
    for stage in bench.stages():
        done = bench.train(
            Stage(stage.index, stage.name, stage.tasks, past, stage.seed), tmp_path / stage.name
        )
        same = told.trained[stage.index].hashes[TENSORS]
        assert done.hashes[TENSORS] == same, "in training nothing is decided"
        past[stage.name] = Past(done.folder, stage.tasks)
    model: Any = bench.loaded(past)
    method: Any = bench.method
    batch = bench.batch(items("task0"))
    queries = frozen_queries(model, method.inputs(batch), batch.inputs)
    assert torch.equal(queries.image, method.encoder.queries(batch).image)
    shown = examples("task0")
    seen = method.encoder.queries(bench.batch([shown[i] for i in range(len(shown))])).image
    mean = seen.double().sum(0) / (seen != 0).any(1).sum()
    torch.testing.assert_close(method._anchors.tasks["task0"].means()[0], mean, rtol=0, atol=1e-9)
    own = told.bench.logits(told.bench.loaded(told.past(2)), items("task0"))
    assert not torch.equal(bench.logits(model, items("task0")), own)


def test_the_encoder_is_part_of_what_a_run_is(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "clip"))
    words = support.words(recipe(), tiny_models.session("llava"), tmp_path / "run", "--method=hide")
    config = load_config(None, [*words, f"--hide.encoder={folder}"])
    store = RunStore(tmp_path / "run")
    open_run(store, make_job(config))
    recorded = store.read_run()["encoders"]
    assert list(recorded) == [str(folder)] and len(recorded[str(folder)]) == 64
    open_run(store, make_job(config))
    store.adapter("task0").mkdir()  # a folder in which nothing was trained is free
    settings = folder / "preprocessor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"image_std": [1.0, 1.0, 1.0]}))
    with pytest.raises(DeloError, match="encoders: the run has"):
        open_run(store, make_job(config))
