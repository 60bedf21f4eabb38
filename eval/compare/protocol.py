"""What two runs must share before their numbers stand in one table, and the names of what they do not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from delo_eval.matrix.passport import COMPARED
from delo_eval.matrix.results import ResultsJson

#: Dotted name of a condition of a run -> its value, as JSON.
Protocol = dict[str, Any]

MISSING_SEED = "missing.seed"
#: Conditions that older results do not tell.
NEWER = ("metric_ids.", "passport.")

#: Ids that older results have for a formula that has not changed since.
RENAMED = {
    "forgetting.v1": "forgetting.diag_Tm1.v1",
    "forgetting_max.v1": "forgetting_max.trained_Tm1.v1",
    "fwt.v1": "fwt.polaris_Tm1.v1",
}


@dataclass(frozen=True)
class Difference:
    """One condition that is not the same everywhere.

    Attributes:
        field: its dotted name: `scorer_ids.gqa`, `missing.ratio`, `data_hashes.gqa.test`, ...
        values: name of each run (or row) -> what it has; `None` where it says nothing.
    """

    field: str
    values: Mapping[str, Any]

    def __str__(self) -> str:
        told = (f"{name} has {_short(value)}" for name, value in self.values.items())
        return f"{self.field}: {', '.join(told)}"


def protocol(results: ResultsJson) -> Protocol:
    """How the numbers of a run came about, beside method and training seed.

    A ratio of zero hides nobody's modality, whatever kind and seed say; weights count by their sha256 and,
    where a hub id has none, by their name.
    """
    missing = dict(results["missing"]["spec"])
    if missing.get("ratio") == 0:
        missing = {key: missing[key] for key in ("ratio", "image") if key in missing}
    weights, passport = results["start_weights"], results.get("passport") or {}
    return {
        "tasks": results["tasks"],
        "split": results["split"],
        "limit": results["limit"],
        "wording": results.get("wording"),
        "scoring": results.get("scoring", "native"),
        "start_weights": weights.get("sha256") or weights.get("name"),
        **flat("missing", missing),
        **flat("metric_ids", {name: RENAMED.get(i, i) for name, i in results["metric_ids"].items()}),
        **flat("scorer_ids", results["scorer_ids"]),
        **flat("data_hashes", results["data_hashes"] or {}),
        **{f"passport.{part}": found for part, found in passport.items() if part in COMPARED},
        **({"differs": results["differs"]} if results.get("differs") else {}),
    }


def differences(protocols: Mapping[str, Protocol]) -> list[Difference]:
    """Every condition on which the named protocols do not agree.

    A metric or a part of the passport that only newer results have is no contradiction.
    """
    fields = dict.fromkeys(field for found in protocols.values() for field in found)
    told = []
    for field in fields:
        values = {name: found.get(field) for name, found in protocols.items()}
        judged = [v for v in values.values() if v is not None or not field.startswith(NEWER)]
        if any(value != judged[0] for value in judged):
            told.append(Difference(field, values))
    return told


def without_missing_seed(found: Protocol) -> Protocol:
    """The protocol as runs over several seeds share it: each seed may draw its own missing records."""
    return {key: value for key, value in found.items() if key != MISSING_SEED}


def flat(prefix: str, tree: Mapping[str, Any]) -> Protocol:
    """A nested mapping with dotted names."""
    found: Protocol = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else key
        found.update(flat(name, value) if isinstance(value, Mapping) else {name: value})
    return found


def _short(value: object) -> str:
    """A value as a sentence can carry it; hashes by their first digits."""
    text = str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text
