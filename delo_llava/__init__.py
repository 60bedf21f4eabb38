"""DeLo experts for vision-language models: continual learning of task sequences with missing modalities.

Importing this package costs next to nothing.
"""

__version__ = "0.1.0"


def register() -> None:
    """Make PEFT know every method's adapters: `PeftModel.from_pretrained(base, folder)` then opens them."""
    from delo_llava.registry import load_plugin, plugin_names

    for name in plugin_names("method"):
        load_plugin("method", name)
