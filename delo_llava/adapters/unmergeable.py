"""Why some adapters cannot be folded into the weights of their base; no torch is needed to say so."""

from collections.abc import Sequence

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


def cannot_merge(method: str, told: Sequence[str]) -> DeloError:
    """The error for a method whose adapters cannot be folded into the base's weights: why, and what helps."""
    why, fix = told
    return DeloError(f"`{method}` cannot be merged: {why}.", given=method, fix=fix)
