"""What adapters cost when they answer, beside their base and merged into it: ratios of medians, taken in
interleaved rounds in one process on the same random LLaVA.

    python benchmarks/merged_latency.py --width 384 --layers 4 --batch 8 --text 48 --rounds 15
    python benchmarks/merged_latency.py --device cuda --dtype bfloat16 --width 2048 --layers 16

Prints a table to stderr and JSON to stdout. Times are process CPU time on the CPU, wall time on CUDA. The
unmerged model is that of a method that accumulates its stages (`dac`): one pair for all earlier stages, one
for the last, beside every linear. Merged and unmerged are proven to give the same logits before they are
timed.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from step_time import LANGUAGE, PROJECTOR, batch, build_base, medians

from delo_llava.adapters.lowrank import LowRankConfig, inject, lowrank
from delo_llava.adapters.merging import adapter_updates, fold, without_adapters

#: Ranks of the pair of all earlier stages, and of the last one's.
RANKS = {"earlier": 16, "last": 4}


def beside(base: Any, width: int) -> Any:
    """`base` with both pairs, none of them zero."""

    def config(rank: int) -> LowRankConfig:
        return LowRankConfig(
            r=rank, alpha=2.0 * rank, target_modules=LANGUAGE, projector_modules=PROJECTOR,
            projector="model.multi_modal_projector", hidden_size=width,
        )  # fmt: skip

    model = inject(base, config(RANKS["earlier"]), "earlier")
    model.add_adapter("last", config(RANKS["last"]))
    for name, parameter in model.named_parameters():
        if "lowrank_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    lowrank(model).set_adapter(["earlier", "last"], inference_mode=True)
    return model.eval()


def merged(model: Any) -> Any:
    """A plain copy with the pairs in its weights."""
    model = copy.deepcopy(model)
    for name, update in adapter_updates(model):
        linear = model.get_base_model().get_submodule(name).get_base_layer()
        fold(linear, update, linear.weight.dtype)
    return without_adapters(model).eval()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a forward over a prompt and of decoding, and their ratios to the base's."""
    dtype = getattr(torch, args.dtype)
    models = {"base": build_base(args).to(dtype).eval()}
    torch.manual_seed(1)
    inputs, _ = batch(args)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    models["unmerged"] = beside(copy.deepcopy(models["base"]), args.width)
    models["merged"] = merged(models["unmerged"])

    @torch.inference_mode()
    def prefill(model: Any) -> Any:
        return model(**inputs).logits

    @torch.inference_mode()
    def decode(model: Any) -> Any:
        return model.generate(
            **inputs, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False
        )

    one, two = prefill(models["merged"]).float(), prefill(models["unmerged"]).float()
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    assert (one - two).abs().max() < tolerance, "merged and unmerged answer alike"
    assert (one - prefill(models["base"]).float()).abs().max() > 1e-2, "and not as the base"
    cases: dict[str, Callable[[], Any]] = {}
    for kind, run in (("prompt", prefill), ("decoding", decode)):
        for name, model in models.items():
            cases[f"{kind} {name}"] = lambda run=run, model=model: run(model)  # type: ignore[misc]
    seconds = medians(cases, args.rounds, args.device)
    ratios = {
        f"{kind}: {name} / base": round(seconds[f"{kind} {name}"] / seconds[f"{kind} base"], 3)
        for kind in ("prompt", "decoding")
        for name in ("merged", "unmerged")
    }
    return {
        "arguments": vars(args),
        "seconds": {k: round(v, 5) for k, v in seconds.items()},
        "ratios": ratios,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("width", 384), ("layers", 4), ("batch", 8), ("text", 48), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, default=16, help="decoded for every row")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.set_defaults(quant="none")
    result = measure(parser.parse_args())
    for name, value in result["ratios"].items():
        sys.stderr.write(f"{name:32s} {value:6.3f}\n")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
