"""What tests of shipped recipes share."""

import pytest
import yaml

from delo_llava.registry import load_plugin, plugin_names


def require_scorers(recipe: str) -> None:
    """Skip where a scorer that the recipe names is not installed, as before the scorers are merged."""
    content = yaml.safe_load(load_plugin("recipe", recipe).read_text(encoding="utf-8"))  # type: ignore[attr-defined]
    if "like" in content:
        require_scorers(content["like"])
    tasks = [task for task in content.get("tasks", []) if isinstance(task, dict)]
    named = {task["scorer"] for task in tasks if "scorer" in task}
    if absent := named - {*plugin_names("scorer")}:
        pytest.skip(f"no scorers {sorted(absent)}")
