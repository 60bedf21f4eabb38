"""Answered test records to look at: right and wrong ones of every task and missing modality, with image."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from delo_eval.answers.predictions import Prediction, prediction_file, read_predictions
from delo_eval.matrix.accuracy import RUN_PATTERN
from delo_eval.report.content import RunContent
from delo_llava.backbones.base import find_backbone
from delo_llava.data.dialogue import Dialogue
from delo_llava.data.images import load_image
from delo_llava.data.missing import hash_rank
from delo_llava.data.readers import read_records
from delo_llava.data.recipe import load_sequence
from delo_llava.errors import DeloError
from delo_llava.tasks import Record, Split, TaskSequence

#: Samples of each task.
PER_TASK = 6
#: Stands for a picture where the family's own token is not known any more.
PICTURE = "<image>"
#: Longest side of a thumbnail in pixels; bytes that all thumbnails of a page may take.
SIDE, BUDGET = 192, 1_000_000


@dataclass(frozen=True)
class Sample:
    """One answered record as the page shows it.

    Attributes:
        row: its line of the predictions.
        verdict: `right`, `wrong`, or `partly` for scores in between.
        record: the record itself; None when the data is no longer there.
        prompt: what the model read, without the image's tokens.
        image: data URI of a thumbnail, or empty; fault: why there is none.
    """

    row: Prediction
    verdict: str
    record: Record | None = None
    prompt: str = ""
    image: str = ""
    fault: str = ""

    @property
    def seen(self) -> str:
        """What of the record the model saw."""
        here = [("image", "image"), ("text", "context")]
        missing = [word for key, word in here if not self.row["presence"][key]]
        return f"no {' and no '.join(missing)}" if missing else "complete"


@dataclass
class _Source:
    """The run's data and its prompts' format, as far as they are still there."""

    sequence: TaskSequence | None
    dialogue: Dialogue | None
    image: str
    split: Split
    spent: int = field(default=0)


def samples(content: RunContent) -> list[Sample]:
    """Samples of the latest stage under the run's own missing pattern, those answered wrongly first."""
    stage = content.latest
    if stage is None:
        return []
    source = _source(content)
    found: list[Sample] = []
    for task in content.plan.judged(stage):
        file = prediction_file(content.folder, stage, RUN_PATTERN, task)
        if not file.is_file():
            continue
        chosen = gallery(read_predictions(file))
        records = _records(source, task, [row["record_id"] for row in chosen])
        found += [_sample(row, records.get(row["record_id"]), source) for row in chosen]
    return found


def samples_of(content: RunContent, stage: int, wanted: Mapping[str, Sequence[str]]) -> list[Sample]:
    """Certain records, task -> ids, as they were answered after `stage`."""
    source = _source(content)
    found: list[Sample] = []
    for task, ids in wanted.items():
        rows = {
            str(row["record_id"]): row
            for row in read_predictions(prediction_file(content.folder, stage, RUN_PATTERN, task))
        }
        records = {str(name): record for name, record in _records(source, task, ids).items()}
        found += [_sample(rows[name], records.get(name), source) for name in ids]
    return found


def gallery(rows: Sequence[Prediction], count: int = PER_TASK) -> list[Prediction]:
    """`count` rows, in turn from each verdict and missing pattern that occurs; the same ones every time."""
    groups: dict[tuple[str, bool, bool], list[Prediction]] = {}
    for row in sorted(rows, key=lambda r: hash_rank(0, r["task"], "report", r["record_id"])):
        key = (verdict(row["score"]), row["presence"]["image"], row["presence"]["text"])
        groups.setdefault(key, []).append(row)
    ordered = [groups[key] for key in sorted(groups, key=lambda key: (key[0] != "wrong", key))]
    picked: list[Prediction] = []
    while len(picked) < count and any(ordered):
        picked += [group.pop(0) for group in ordered if group]
    picked = picked[:count]
    return sorted(picked, key=lambda row: ("wrong", "partly", "right").index(verdict(row["score"])))


def verdict(score: float) -> str:
    """`right` for a full score, `wrong` for none, else `partly`."""
    return "right" if score >= 1 else "wrong" if score <= 0 else "partly"


def _source(content: RunContent) -> _Source:
    """The recipe and the prompt's format; what is gone is left out, the predictions stand by themselves."""
    config = content.config
    sequence, backbone = None, None
    try:
        data = config.get("data") or {}
        sequence = load_sequence(config.get("task_seq", ""), data.get("root"), data.get("template"))
        backbone = find_backbone(config.get("model", ""))[0]
    except DeloError:
        pass
    dialogue = None if backbone is None else backbone.default_dialogue
    if "dialogue" in content.record:
        dialogue = Dialogue(**content.record["dialogue"])
    image = PICTURE if backbone is None else backbone.image_token
    return _Source(sequence, dialogue, image, content.results["split"])


def _records(source: _Source, task: str, ids: Sequence[str]) -> dict[str, Record]:
    """The records of these ids, as far as the data is there."""
    specs = source.sequence.tasks if source.sequence else ()
    spec = next((spec for spec in specs if spec.name == task), None)
    if spec is None:
        return {}
    try:
        records = read_records(spec, source.split)
    except DeloError:
        return {}
    wanted = set(ids)
    return {name: records[i] for i, name in enumerate(records.ids) if name in wanted}


def _sample(row: Prediction, record: Record | None, source: _Source) -> Sample:
    """One sample with its thumbnail and prompt."""
    if record is None:
        return Sample(row, verdict(row["score"]), fault="the data is not where the run found it")
    prompt = ""
    if source.dialogue is not None:
        seen = row["presence"]
        image, context = source.image if seen["image"] else None, record.context if seen["text"] else None
        pieces = source.dialogue.prompt(image, context, record.instruction)
        prompt = "".join(text for text, _ in pieces)
    shown, fault = "", ""
    if record.image is not None and source.spent < BUDGET:
        try:
            shown = thumbnail(record)
            source.spent += len(shown)
        except DeloError as error:
            fault = str(error)
    elif record.image is not None:
        fault = "left out to keep this page small"
    return Sample(row, verdict(row["score"]), record, prompt, shown, fault)


def thumbnail(record: Record) -> str:
    """The record's image as a small WebP data URI.

    Raises:
        DeloError: the image cannot be used.
    """
    assert record.image is not None
    picture = load_image(record.image, record)
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=75, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
