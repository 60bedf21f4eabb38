"""Cost of DeLo against PEFT LoRA on the same random LLaVA: ratios of medians, taken in interleaved rounds in
one process.

    python benchmarks/step_time.py --width 384 --layers 4 --batch 8 --text 48 --rounds 15 --quant none
    python benchmarks/step_time.py --width 4096 --layers 2 --text 624 --rank 16 --quant nf4 --dtype bfloat16 \
        --device cuda

Prints a table to stderr and JSON to stdout. Times are process CPU time on the CPU, wall time on CUDA, where
the peak memory of each step above what lay there before it is given too. LoRA has rank 2r: a DeLo linear
computes r image and r text factors for each token, so that is the equal active rank. `frozen` is the base
without adapters and with gradient to its word embeddings: no method can be faster.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from delo_llava.adapters.carrier import routing
from delo_llava.features.inputs import RouteInputs
from delo_llava.methods.delo.config import DeloConfig
from delo_llava.methods.delo.tuner import set_trainable

LANGUAGE = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
PROJECTOR = r".*multi_modal_projector\.linear_[12]"
IMAGE_ID, IMAGE_TOKENS = 5, 16


def build_base(args: argparse.Namespace) -> Any:
    """A frozen random LLaVA of the given width; 4-bit through a round trip to disk when asked for."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
    )
    text = LlamaConfig(
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3 // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 64,
        vocab_size=512,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID)
    )
    dtype = getattr(torch, args.dtype)
    model = model.to(dtype)
    if args.quant == "nf4":
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            skip = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
            quant = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=skip,
            )
            model = LlavaForConditionalGeneration.from_pretrained(
                folder, quantization_config=quant, dtype=dtype, device_map={"": args.device}
            )
    return model.requires_grad_(False).to(args.device)


def build_delo(args: argparse.Namespace, pool: int, tasks: int) -> Any:
    """The base with `tasks` adapters, the first one trainable, with factors that are not zero."""
    config = DeloConfig(
        r=args.rank,
        pool_size=pool,
        alpha=2.0 * args.rank,
        target_modules=LANGUAGE,
        projector_modules=PROJECTOR,
        projector="model.multi_modal_projector",
        hidden_size=args.width,
    )
    model = get_peft_model(build_base(args), config, adapter_name="task0")
    for i in range(1, tasks):
        model.add_adapter(f"task{i}", config)
    for name, parameter in model.named_parameters():
        if "delo_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    set_trainable(model, "task0")
    return model.train()


def batch(args: argparse.Namespace) -> tuple[dict[str, Any], RouteInputs]:
    """Half of the rows complete, a quarter without image (its tokens are then words), a quarter without
    text."""
    rows, length = args.batch, IMAGE_TOKENS + args.text
    ids = torch.randint(10, 500, (rows, length))
    segments = torch.zeros(rows, length, dtype=torch.uint8)
    segments[:, -args.text :] = 3
    segments[:, -args.text : -args.text // 2] = 2
    presence = torch.ones(rows, 2, dtype=torch.bool)
    presence[::4, 0] = presence[1::4, 1] = False
    images = presence[:, 0].nonzero().squeeze(1)
    ids[images, :IMAGE_TOKENS] = IMAGE_ID
    segments[images, :IMAGE_TOKENS] = 1
    units = torch.ones(len(images), dtype=torch.int64)
    device = args.device
    route = RouteInputs(
        ids.to(device), segments.to(device), presence.to(device), images.to(device), units.to(device), None
    )
    pixels = torch.randn(len(images), 3, 64, 64, device=args.device, dtype=getattr(torch, args.dtype))
    return {
        "input_ids": route.input_ids,
        "pixel_values": pixels,
        "attention_mask": torch.ones_like(route.input_ids),
    }, route


def train_step(model: Any, inputs: dict[str, Any], route: RouteInputs | None) -> None:
    """Forward and backward of the next-token loss."""
    model.zero_grad(set_to_none=True)
    if route is None:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return
    with routing(model, route):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()


def forward(model: Any, inputs: dict[str, Any], route: RouteInputs) -> None:
    """A forward without gradient."""
    with torch.no_grad(), routing(model, route):
        model(**inputs)


def build_frozen(args: argparse.Namespace) -> Any:
    """The base alone, with gradient down to its word embeddings."""
    model = build_base(args)
    model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))
    return model.train()


def peaks(cases: dict[str, Callable[[], None]]) -> dict[str, int]:
    """Bytes that each case needs on the GPU above what lay there before it."""
    found = {}
    for name, case in cases.items():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case()
        torch.cuda.synchronize()
        found[name] = torch.cuda.max_memory_allocated() - before
    return found


def medians(cases: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each case over interleaved rounds, after two warm-up rounds."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    seen: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(rounds + 2):
        for name, case in cases.items():
            start = clock()
            case()
            if device != "cpu":
                torch.cuda.synchronize()
            if round_ >= 2:
                seen[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seen.items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All cases and the ratios that `performance.md` names."""
    torch.manual_seed(1)
    inputs, route = batch(args)
    lora = LoraConfig(
        r=2 * args.rank,
        lora_alpha=4 * args.rank,
        lora_dropout=0.0,
        target_modules=f"(?:{LANGUAGE})|(?:{PROJECTOR})",
    )
    lora_model = get_peft_model(build_base(args), lora).train()
    frozen = build_frozen(args)
    one, eight, large = (build_delo(args, *pool_and_tasks) for pool_and_tasks in ((16, 1), (16, 8), (64, 1)))
    names = [f"task{i % 4}" for i in range(args.batch)]
    with_tasks = {
        key: RouteInputs(**{**route.__dict__, "tasks": tasks})
        for key, tasks in (("single", "task0"), ("mixed", names))
    }
    cases = {
        "frozen_step": lambda: train_step(frozen, inputs, None),
        "lora_step": lambda: train_step(lora_model, inputs, None),
        "delo_step": lambda: train_step(one, inputs, route),
        "delo_step_8_tasks": lambda: train_step(eight, inputs, route),
        "delo_step_pool_64": lambda: train_step(large, inputs, route),
        "single_task_forward": lambda: forward(eight, inputs, with_tasks["single"]),
        "mixed_task_forward": lambda: forward(eight, inputs, with_tasks["mixed"]),
    }
    seconds = medians(cases, args.rounds, args.device)
    pairs = {
        "delo / lora step": ("delo_step", "lora_step"),
        "lora / frozen step": ("lora_step", "frozen_step"),
        "delo / frozen step": ("delo_step", "frozen_step"),
        "8 tasks stored / 1": ("delo_step_8_tasks", "delo_step"),
        "pool 64 / pool 16": ("delo_step_pool_64", "delo_step"),
        "mixed / single-task forward": ("mixed_task_forward", "single_task_forward"),
    }
    ratios = {name: round(seconds[a] / seconds[b], 3) for name, (a, b) in pairs.items()}
    return {
        "arguments": vars(args),
        "seconds": {k: round(v, 5) for k, v in seconds.items()},
        "ratios": ratios,
        "peak_bytes": peaks(cases) if args.device.startswith("cuda") else None,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("width", 384),
        ("layers", 4),
        ("batch", 8),
        ("text", 48),
        ("rank", 4),
        ("rounds", 15),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--quant", choices=("none", "nf4"), default="none")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    result = measure(parser.parse_args())
    for name, value in result["ratios"].items():
        sys.stderr.write(f"{name:32s} {value:6.3f}\n")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
