"""Why some adapters cannot be folded into the weights of their base; no torch is needed to say so."""

from delo_llava.errors import DeloError

#: Why, and what helps: what is decided for every sample, and what only the true task decides.
PER_SAMPLE = (
    "what it adds to a weight is another matrix for every sample or token, chosen from it",
    "keep the adapters beside their base (`delo_llava.register()`, then PEFT opens them), or train a method "
    "that can be merged, such as lora or dac",
)
PER_TASK = (
    "every task has an adapter of its own, and the true task says which one answers",
    "merge one task's adapter (adapters/<task>) with PEFT, or evaluate the run as it is",
)


def unmergeable(method: str, needs_task: bool) -> DeloError:
    """Why a method's adapters cannot be folded into the base's weights, and what to do instead."""
    why, fix = PER_TASK if needs_task else PER_SAMPLE
    return DeloError(f"`{method}` cannot be merged: {why}.", given=method, fix=fix)
