"""Every key of a run's configuration, as `train --help` shows it: default, what is allowed, meaning."""

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from delo_llava.config import RunConfig
from delo_llava.registry import load_plugin, plugin_names
from delo_llava.schema import section_of

#: Of pydantic's and annotated_types' bounds, how each is written.
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
#: Keys whose allowed words are the names of plug-ins.
PLUGINS = {"method": "method", "zero": "zero"}


@dataclass(frozen=True)
class Key:
    """One key: its dotted name, default, what is allowed (or nothing to say), and meaning."""

    name: str
    default: str
    allowed: str
    meaning: str


def run_keys() -> Iterator[Key]:
    """The keys of every run but those of methods, in the order of the configuration's classes."""
    for key in _keys(RunConfig, "", RunConfig()):
        kind = PLUGINS.get(key.name)
        if kind is not None:
            extra = ["none"] if kind == "zero" else []
            key = Key(key.name, key.default, " | ".join([*plugin_names(kind), *extra]), key.meaning)
        if key.name != "methods":
            yield key


def method_keys(name: str) -> Iterator[Key]:
    """The options of one method."""
    method: Any = load_plugin("method", name)
    yield from _keys(cast(type[BaseModel], method.Config), f"{name}.", method.Config())


def render(keys: Iterator[Key], width: int) -> str:
    """`--key=default  (allowed)` and, indented, the meaning, wrapped to `width` columns."""
    parts = []
    for key in keys:
        head = f"  --{key.name}={key.default}" + (f"  ({key.allowed})" if key.allowed else "")
        parts += textwrap.wrap(head, width, subsequent_indent=" " * 6, break_on_hyphens=False)
        parts += textwrap.wrap(
            key.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
        )
    return "\n".join(parts) + "\n"


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """What the `Attributes:` of a class and of those it comes from say of each attribute."""
    found: dict[str, str] = {}
    for kind in reversed(model.__mro__[: model.__mro__.index(BaseModel)]):
        text = inspect.cleandoc(kind.__dict__.get("__doc__") or "")
        _, _, block = text.partition("Attributes:\n")
        for entry in re.split(r"\n(?= {4}\S)", "\n" + block.partition("\n\n")[0]):
            names, colon, meaning = entry.partition(":")
            if colon:
                found |= dict.fromkeys((n.strip(" `") for n in names.split(",")), " ".join(meaning.split()))
    return found


def _keys(model: type[BaseModel], prefix: str, values: BaseModel) -> Iterator[Key]:
    known = meanings(model)
    for name, field in model.model_fields.items():
        section, value = section_of(field.annotation), getattr(values, name)
        if section is not None and isinstance(value, BaseModel):
            yield from _keys(section, f"{prefix}{name}.", value)
            continue
        shown = values.model_dump(mode="json", include={name})[name]
        text = yaml.safe_dump(shown, default_flow_style=True, width=10_000).split("\n")[0]
        yield Key(prefix + name, text, _allowed(field), known.get(name, ""))


def _allowed(field: FieldInfo) -> str:
    """Words and bounds of a field, as far as its type says them."""
    said = _words(field.annotation)
    for bound in field.metadata:
        said += [f"{sign} {getattr(bound, key)}" for key, sign in BOUNDS.items() if hasattr(bound, key)]
    return ", ".join(said)


def _words(annotation: object) -> list[str]:
    """The words that an annotation allows, of any of its alternatives, and kinds of values beside them."""
    if get_origin(annotation) is Literal:
        return [" | ".join(map(str, get_args(annotation)))]
    if annotation is bool:
        return ["true | false"]
    if isinstance(annotation, type) and not get_args(annotation):
        return []
    parts = [get_args(p)[0] if get_origin(p) is Annotated else p for p in get_args(annotation)]
    found = [words for part in parts for words in _words(part)]
    plain = [part.__name__ for part in parts if part in (int, float)]
    return [" | ".join([*found, *plain])] if found else []
