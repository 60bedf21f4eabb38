"""A tiny LLaVA with DeLo experts, and batches whose every token kind is written by hand."""

import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_models

from delo_llava.adapters.carrier import routing
from delo_llava.features.inputs import RouteInputs
from delo_llava.methods.delo.config import DeloConfig
from delo_llava.methods.delo.plan import RoutePlan
from delo_llava.methods.delo.tuner import set_trainable

LANGUAGE = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
PROJECTORS = {
    "llava": ("model.multi_modal_projector", r"model\.multi_modal_projector\.linear_[12]", 64),
    "qwen2_vl": ("model.visual.merger", r"model\.visual\.merger\.mlp\.[02]", 128),
    "qwen2_5_vl": ("model.visual.merger", r"model\.visual\.merger\.mlp\.[02]", 128),
}
IMAGE_TOKENS = 16


def config(kind: str = "llava", **changes: Any) -> DeloConfig:
    """Small pools that still leave something to choose."""
    projector, pattern, hidden = PROJECTORS[kind]
    options = {"r": 2, "pool_size": 6, "alpha": 4.0, "latent": 8} | changes
    return DeloConfig(
        target_modules=LANGUAGE, projector_modules=pattern, projector=projector, hidden_size=hidden, **options
    )


def base(kind: str = "llava", **options: Any) -> Any:
    """The frozen base, fresh from disk."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_models.session(kind), **options)
    return model.requires_grad_(False).eval()


def experts(
    tasks: tuple[str, ...] = ("one",),
    *,
    kind: str = "llava",
    live: bool = True,
    seed: int = 0,
    **changes: Any,
) -> PeftModel:
    """A model with an adapter per task, the first one active; `live` gives B values, so that experts have an
    effect."""
    torch.manual_seed(seed)
    model = get_peft_model(base(kind), config(kind, **changes), adapter_name=tasks[0])
    for task in tasks[1:]:
        model.add_adapter(task, config(kind, **changes))
    if live:
        enliven(model)
    set_trainable(model, tasks[0])
    return model


def enliven(model: PeftModel) -> None:
    """Draw all B factors, and the up-projections of learned maps."""
    for name, parameter in model.named_parameters():
        if "delo_B" in name or name.endswith("_up"):
            torch.nn.init.normal_(parameter, std=0.1)


#: Rows of a batch: what each has.
COMPLETE, NO_IMAGE, NO_TEXT = (True, True), (False, True), (True, False)


def batch(
    model: Any,
    rows: list[tuple[bool, bool]],
    *,
    seed: int = 0,
    pad: int = 0,
    left: bool = False,
    answer: bool = True,
) -> tuple[dict[str, Tensor], RouteInputs]:
    """Sequences [bos, image, context, instruction, answer], padded by `pad` beyond the longest; row i
    depends on
    (seed, i) only."""
    ids, kinds, pixels = [], [], []
    for i, (has_image, has_text) in enumerate(rows):
        draw = torch.Generator().manual_seed(1000 * seed + i)
        words = torch.randint(270, 500, (15,), generator=draw).tolist()
        picture = torch.randn(3, 64, 64, generator=draw)
        image = [model.config.image_token_id] * IMAGE_TOKENS if has_image else []
        context, instruction, reply = words[:5] if has_text else [], words[5:11], words[11:] if answer else []
        ids.append([1, *image, *context, *instruction, *reply])
        kinds.append([0] + [1] * len(image) + [2] * len(context) + [3] * len(instruction) + [0] * len(reply))
        if has_image:
            pixels.append(picture)
    width = max(map(len, ids)) + pad

    def fill(seq, value):
        return ([value] * (width - len(seq)) + seq) if left else (seq + [value] * (width - len(seq)))

    input_ids = torch.tensor([fill(s, 0) for s in ids])
    mask = torch.tensor([fill([1] * len(s), 0) for s in ids])
    segments = torch.tensor([fill(s, 0) for s in kinds], dtype=torch.uint8)
    images = torch.tensor([i for i, row in enumerate(rows) if row[0]], dtype=torch.int64)
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if pixels:
        inputs["pixel_values"] = torch.stack(pixels)
    route = RouteInputs(
        input_ids, segments, torch.tensor(rows), images, torch.ones(len(images), dtype=torch.int64), None
    )
    return inputs, route


def changed(route: RouteInputs, **fields: Any) -> RouteInputs:
    """The same with some fields replaced."""
    return RouteInputs(**{**route.__dict__, **fields})


def run(model: Any, inputs: dict[str, Tensor], route: RouteInputs, **options: Any) -> tuple[Any, RoutePlan]:
    """Output and plan of one forward."""
    with routing(model, route) as entered:
        output = model(**inputs, **options)
    assert entered.plan is not None
    return output, entered.plan


def loss_of(model: Any, inputs: dict[str, Tensor], route: RouteInputs) -> Tensor:
    """Next-token loss over everything that is not padding."""
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return run(model, inputs, route, labels=labels)[0].loss


def same_routes(a: RoutePlan, b: RoutePlan, rows: Any = slice(None)) -> bool:
    """Whether two plans choose the same factors, comparing all of `a` to `rows` of `b`."""
    return all(
        torch.equal(getattr(a.selection, f), getattr(b.selection, f)[rows])
        for f in ("image_a", "image_b", "text_a", "text_b")
    )
