"""YAML and words of a command line against a pydantic model; a fault is told with the closest key."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from delo_llava.errors import DeloError
from delo_llava.files import at_home, name_or_path

Model = TypeVar("Model", bound=BaseModel)

#: Values that a YAML file may stand for.
MAX_VALUES = 100_000

#: Kinds of YAML values that are read.
TAGS = {"str", "int", "float", "bool", "null", "map", "seq", "merge"}

#: What helps where a text was meant and YAML read something else.
QUOTES = "YAML reads an unquoted yes, no, on, off, null or number as such: put the word in quotes"

#: The largest whole number that every JSON reader gets exactly.
MAX_INTEGER = 2**53

#: A path, and a name or a path: as typed, but that `~` is the home folder.
UserPath = Annotated[Path, AfterValidator(at_home)]
NameOrPath = Annotated[str, AfterValidator(name_or_path)]


class Word(str):
    """A value as it was typed on a command line; its key's type decides how it is read."""


class Worded(BaseModel):
    """Base of every section of settings: a `Word` is a text or a path as it is, anything else as YAML."""

    @model_validator(mode="before")
    @classmethod
    def read_words(cls, given: Any) -> Any:
        """`given` with its words read; what cannot be read stays, and is refused with its key."""
        if not isinstance(given, Mapping):
            return given
        types = {name: field.annotation for name, field in cls.model_fields.items()}
        return {key: _read(value, types.get(key)) for key, value in given.items()}


class Section(Worded):
    """Base of every configuration section: immutable, no unknown keys, `zero: 2` accepted for "2"."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False)


def _read(value: object, annotation: object) -> object:
    """One value; a word stands for itself where only text is allowed, and `null` for None where that is."""
    if not isinstance(value, Word):
        return value
    kinds = set(_kinds(annotation))
    if value == "null" and NoneType in kinds:
        return None
    if kinds <= {str, Path, NoneType}:
        return str(value)
    try:
        read = parse_yaml(value) if value else ""
    except (yaml.YAMLError, ValueError):
        return str(value)
    # `Literal["match"] | int`: what YAML makes of a word counts only if it is no text.
    return str(value) if isinstance(read, str) else read


def _kinds(annotation: object) -> Iterator[type]:
    """The plain types that an annotation allows."""
    if get_origin(annotation) is Literal:
        yield from {type(choice) for choice in get_args(annotation)}
    elif get_origin(annotation) is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif isinstance(kind := get_origin(annotation) or annotation, type) and kind is not UnionType:
        yield kind
    else:
        for candidate in get_args(annotation) or (object,):
            yield from _kinds(candidate)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        DeloError: no such file, not YAML, or not a mapping at the top.
    """
    if not path.is_file():
        raise DeloError("There is no such YAML file.", given=path, fix="check the path")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # the latter for text that is not UTF-8 and huge numbers
        raise DeloError(f"This file is not valid YAML: {error}", given=path) from error
    if content is not None and not isinstance(content, dict):
        raise DeloError("A YAML file here holds keys and values.", given=f"{path}: {type(content).__name__}")
    return content or {}


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, without what YAML has beyond texts, numbers, lists and mappings.

    Raises:
        yaml.YAMLError: not YAML, a tag, a repeated key, or a value that holds itself or more than
            `MAX_VALUES` values once aliases are written out (a kilobyte of them can stand for terabytes).
        ValueError: a number of thousands of digits.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for; `known` holds those of other nodes, 0 while they are counted."""
    if id(node) in known:
        if not known[id(node)]:
            raise yaml.YAMLError(f"a value holds itself\n{node.start_mark}")
        return known[id(node)]
    if node.tag.removeprefix("tag:yaml.org,2002:") not in TAGS:
        raise yaml.YAMLError(f"{node.tag} is not accepted here; quote what is text\n{node.start_mark}")
    known[id(node)] = 0
    count = 1
    for child in _children(node):
        count += _count(child, known)
        if count > MAX_VALUES:
            raise yaml.YAMLError(f"it stands for more than {MAX_VALUES} values\n{node.start_mark}")
    known[id(node)] = count
    return count


def _children(node: yaml.Node) -> list[yaml.Node]:
    """Items of a sequence; keys and values of a mapping, whose keys differ."""
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if not isinstance(node, yaml.MappingNode):
        return []
    keys = [str(key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    if repeated := [key for key, count in Counter(keys).items() if count > 1]:
        raise yaml.YAMLError(f"the key {repeated[0]!r} stands there twice\n{node.start_mark}")
    return [part for pair in node.value for part in pair]


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on top, section by section; neither is changed."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as {"a.b": value}."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {key: value for name, sub in tree.items() for key, value in flat(sub, f"{prefix}{name}.").items()}


def checked(
    model: type[Model], data: Mapping[str, Any], *, where: str, prefix: str = "", also: Sequence[str] = ()
) -> Model:
    """`data` as an instance of `model`.

    Args:
        where: what is being read, for the message ("the configuration", a file).
        prefix: dotted path put before every key in messages.
        also: keys that would have been understood at the top besides the model's own.

    Raises:
        DeloError: one paragraph for each fault: the key, what was given, what is allowed.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        faults = [_fault(model, detail, where, prefix, also) for detail in error.errors(include_url=False)]
        raise faults[0] if len(faults) == 1 else DeloError("\n".join(f.render() for f in faults)) from error


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every settable key of a model and its sections, as `a.b`."""
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            yield prefix + name
        else:
            yield from dotted_keys(section, f"{prefix}{name}.")


def section_of(annotation: object) -> type[BaseModel] | None:
    """The model behind an annotation (`X`, `X | None`, `list[X]`), or None for a plain value."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _fault(
    model: type[BaseModel], detail: ErrorDetails, where: str, prefix: str, also: Sequence[str]
) -> DeloError:
    """One pydantic complaint in our words."""
    key = prefix + ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return _unknown_key(model, detail, where, prefix, also)
    if detail["type"] == "missing":
        return DeloError(f"{where} lacks `{key}`.")
    if detail["type"] == "literal_error":
        return DeloError(
            f"Bad value for `{key}` in {where}.", given=detail["input"], allowed=_choices(detail)
        )
    word = detail["type"] in ("string_type", "path_type") and not isinstance(detail["input"], dict | list)
    return DeloError(
        f"Bad value for `{key}` in {where}: {detail['msg']}.",
        given=repr(detail["input"]),
        fix=QUOTES if word else None,
    )


def _choices(detail: ErrorDetails) -> list[str]:
    """The words of a literal, from pydantic's "'a', 'b' or 'c'"."""
    expected = detail.get("ctx", {}).get("expected", "")
    return [word.strip().strip("'") for word in expected.replace(" or ", ", ").split(", ")]


def _unknown_key(
    model: type[BaseModel], detail: ErrorDetails, where: str, prefix: str, also: Sequence[str]
) -> DeloError:
    """An unknown key, with its siblings, or the sections in which a key of that name exists."""
    *path, name = [part for part in detail["loc"] if isinstance(part, str)]
    owner: type[BaseModel] | None = model
    for part in path:
        owner = (
            section_of(owner.model_fields[part].annotation) if owner and part in owner.model_fields else None
        )
    elsewhere = [prefix + key for key in dotted_keys(model) if key.rsplit(".", 1)[-1] == name]
    return DeloError(
        f"Unknown key `{prefix}{'.'.join([*path, name])}` in {where}.",
        given=name,
        allowed=[*owner.model_fields, *(() if path else also)] if owner and not elsewhere else None,
        fix=f"did you mean {' or '.join(elsewhere)}?" if elsewhere else None,
    )
