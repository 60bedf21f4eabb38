"""A run folder whose every text is hostile to a page, written by the harness's functions without a model."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from delo_eval.answers.predictions import prediction_file
from delo_eval.answers.routing_use import merge_use_parts, use_file, write_use_part
from delo_eval.matrix.accuracy import AccuracyMatrix
from delo_eval.matrix.derived import choice_statistics
from delo_eval.matrix.plan import Plan
from delo_eval.matrix.results import Results, results_json, write_results
from delo_llava.config import RunConfig, dump_config
from delo_llava.files import write_text_atomic

SCRIPT = "<script>document.title='owned'</script>"
EVENT = "<img src=x onerror=\"document.title='owned'\">"
#: No slash, as predictions lie in a file of the task's name.
TASK = "<img src=x onerror=alert(1)>"
TASKS = ("plain", TASK)
COUNT = 6


def hostile_run(folder: Path) -> Path:
    """Two of three stages are evaluated; the third is only announced."""
    data = folder / "data"
    write_data(data)
    recipe = data / "little.yaml"
    files = {"train": "plain.json", "test": "plain.json"}
    entry = {"name": "plain", "kind": "k", "files": files}
    recipe.write_text(json.dumps({"name": "little", "tasks": [entry]}))  # JSON is YAML
    config = RunConfig(task_seq=str(recipe), method="delo", output=folder, data={"root": data})
    write_text_atomic(folder / "config.yaml", dump_config(config))
    tasks = (*TASKS, "later")
    results, rows = Results(AccuracyMatrix(Plan.one_each(tasks))), []
    for stage, task in enumerate(TASKS):
        for asked in TASKS[: stage + 1]:
            found = [_row(asked, i, stage) for i in range(COUNT)]
            file = prediction_file(folder, stage, "run", asked)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in found))
            for mode in ("matched", "oracle"):
                results.matrix.set(mode, stage, asked, 50.0, count=COUNT)
            rows += found
            use = use_file(folder, stage, "run", asked)
            write_use_part(use, 0, _use(asked))
            merge_use_parts(use)
        results.note_choice(stage, "run", choice_statistics(rows, tasks))
        _log(folder / "logs" / "metrics.jsonl", stage, task)
    write_results(folder, results_json(results, config, FACTS))
    write_text_atomic(folder / "run.json", json.dumps({"notes": [SCRIPT], "stages": {}}))
    return folder


def _log(file: Path, stage: int, task: str) -> None:
    """Four steps of a stage, as training logs them."""
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as lines:
        for step in range(4):
            entry = {"stage": stage, "task": task, "step": step, "loss": 2.0 / (step + 1), "grad_norm": 1.0}
            entry |= {"terms": {"answer": 1.0, SCRIPT: 0.5}, "lr": {"language": 0.1, SCRIPT: 0.2}}
            lines.write(json.dumps(entry) + "\n")


GENERAL = {
    "score": 50.0, "standard_error": 1.0, "records": 4, "scorer": SCRIPT, "majority": 10.0,
    "chosen": {TASK: 1.0},
}  # fmt: skip
FACTS: dict[str, Any] = {
    "scorer_ids": dict.fromkeys(TASKS, SCRIPT),
    "general": {
        "pattern": "complete",
        "stages": {"zero_shot": {TASK: GENERAL}, "0": {TASK: GENERAL}},
        "base": 50.0,
        "last": None,
        "change": None,
    },
    "world": 1,
    "zero": "2",
    "passport": {"id": "0" * 12, "files": "f" * 12},
    "start_weights": {"name": SCRIPT, "sha256": "a" * 64},
    "data_hashes": {SCRIPT: {"test": "b" * 64}},
    "versions": {SCRIPT: SCRIPT},
    "changes": [],
    "trainable_parameters_per_task": {"plain": 1234},
    "train_seconds": [1.0, None, None],
    "missing_train": {},
}


def write_data(data: Path) -> None:
    """Records with hostile texts and image paths; only every other image is there."""
    images = data / "images"
    images.mkdir(parents=True)
    entries = []
    for i in range(COUNT):
        name = f"images/{i}<svg onload=alert(1)>.png"
        if i % 2 == 0:
            Image.new("RGB", (640, 480), (200, 40 * i, 0)).save(data / name)
        entries.append(
            {"question_id": f"{i}{EVENT}", "image": name, "context": EVENT, "text": SCRIPT, "answer": "red"}
        )
    (data / "plain.json").write_text(json.dumps(entries))


def _row(task: str, i: int, stage: int) -> dict[str, Any]:
    return {
        "record_id": f"{i}{EVENT}",
        "task": task,
        "stage": stage,
        "pattern": "run",
        "presence": {"image": i % 3 > 0, "text": i % 3 < 2},
        "answer": f"red{EVENT}",
        "prediction": SCRIPT if i % 2 else "",
        "score": (0.0, 1.0, 0.5)[i % 3],
        "oracle_prediction": EVENT,
        "oracle_score": 0.0,
        "task_used": TASKS[i % 2],
        "task_without_instruction": TASKS[0],
        "choice_scores": None,
    }


def _use(task: str) -> dict[str, Any]:
    """Counts of 8 samples with rank 2 over two linears and four factors."""
    pools = [
        {"task": task, "modality": modality, "present": present, "part": part, "rows": 4, "counts": counts}
        for modality in ("image", "text")
        for part in ("A", "B")
        for present, counts in ((True, [[4, 4, 0, 0], [2, 2, 2, 2]]), (False, [[4, 0, 4, 0], [2, 2, 2, 2]]))
    ]
    return {"layers": {"image": [SCRIPT, "b"], "text": ["a", "b"]}, "pools": pools}
