"""The passport of a run: all that makes its numbers besides the method and the training, hashed part by part.

It stands in results.json, in the report and beside every row of a leaderboard. Two rows whose passports are
equal were made and judged alike; where they are not, the part that differs has a name.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from delo_llava.config import RunConfig
from delo_llava.tasks import TaskSpec

#: What each part holds.
PARTS = {
    "weights": "the base's weights and configuration",
    "files": "what lies beside them: tokenizer, processor, template",
    "encoders": "folders whose features route, where a method has any",
    "dialogue": "how a prompt is written around a record",
    "template": "which wording of the instructions",
    "pictures": "bounds of their size, and what stands for a missing one",
    "lengths": "the longest sequence, and the room of each task's answers",
    "data": "files of all splits, and those joined to them",
    "masks": "which records miss a modality",
    "order": "the tasks in the order of training",
    "asked": "split, limit, beams, another wording",
    "scorers": "the rule of each task, and its mode",
}
#: Parts that rows of one table must share and that no other condition of a comparison names.
COMPARED = ("files", "dialogue", "template", "pictures", "lengths", "asked")


def passport(
    config: RunConfig, record: Mapping[str, Any], tasks: Sequence[TaskSpec], scorer_ids: Mapping[str, str]
) -> dict[str, str]:
    """`id` and each part of `PARTS` that is known -> the beginning of a sha256.

    Args:
        record: run.json; what an older run did not record has no part.
        tasks: of the sequence, in order.
    """
    skip = config.eval.on_bad_reference
    base, missing = record.get("base") or {}, config.missing.model_dump(mode="json")
    found = {
        "weights": base.get("sha256") or base.get("revision"),
        "files": base.get("files"),
        "encoders": sorted((record.get("encoders") or {}).values()) or None,
        "dialogue": record.get("dialogue"),
        "template": record.get("template"),
        "pictures": [config.data.limits, missing.pop("image")],
        "lengths": [config.data.max_length, {task.name: task.max_new_tokens for task in tasks}],
        "data": record.get("data_hashes"),
        "masks": missing if config.missing.ratio else 0,
        "order": [task.name for task in tasks],
        # What was evaluated before a setting was there keeps its passport.
        "asked": [
            config.eval.split,
            config.eval.limit,
            config.eval.num_beams,
            *[skip] * (skip == "skip"),
            *([config.eval.wording] if config.eval.wording else []),
        ],
        "scorers": [config.eval.scoring, dict(scorer_ids)],
    }
    parts = {name: _digest(found[name]) for name in PARTS if found[name] is not None}
    return {"id": _digest(parts), **parts}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
