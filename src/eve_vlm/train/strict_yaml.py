"""Load a YAML file into frozen dataclasses and refuse whatever does not fit.

A training run costs hours, so a mistyped key or a number that YAML reads as text has to stop it
in the first second. Every mistake is a `ValueError` of one sentence: where, which dotted key, what
was expected, what was found and how to mend it.

Easy to get wrong: YAML 1.1, which PyYAML speaks, reads `4e-4` as text and `4.0e-4` as a number. A
file is held to that, so that other YAML readers agree with us; on the command line (`key=4e-4`)
the short form is a number.
"""

import dataclasses
import difflib
import enum
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml

Key = tuple[str, ...]
T = TypeVar("T")

_EXPONENT = re.compile(r"([-+]?\d+)(?:\.(\d*))?[eE]([-+]?)(\d+)")
_NAMES = {bool: "true or false (bool)", int: "a whole number (int)", float: "a number (float)"}


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader, made to refuse a repeated key (its own lets the last one win)."""


class _CommandLine(_UniqueKeys):
    """The same for values typed in a shell, where `4e-4` is a number."""


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            raise yaml.MarkedYAMLError(
                problem=f"the key {key.value!r} stands here twice", problem_mark=key.start_mark
            )
        seen.add(key.value if isinstance(key, yaml.ScalarNode) else str(key.start_mark.index))
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_CommandLine.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(rf"^{_EXPONENT.pattern}$"), list("-+0123456789")
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where values came from, so that a message names the file or the command line, as it was."""

    file: str
    overridden: frozenset[Key] = frozenset()

    def fail(self, key: Key, problem: str) -> NoReturn:
        """Raise the one-sentence error about `key`."""
        by_hand = any(  # one of the two keys begins with the other
            key[: len(other)] == other[: len(key)] for other in self.overridden
        )
        place = f"command line (over {self.file})" if by_hand else self.file
        raise ValueError(f"{place}: {'.'.join(key)} {problem}")


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, else all of them."""
    names = sorted(set(known))
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    if not names or len(names) > 20:
        return "see the documentation of this section for the keys it takes"
    return f"the keys here are {', '.join(names)}"


def describe(hint: Any) -> str:
    """The expected type in words, with the Python type where it helps."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if choices := _choices(hint):
        return "one of " + ", ".join(choices)
    if origin in (typing.Union, types.UnionType):
        enums = [arg for arg in args if isinstance(arg, type) and issubclass(arg, enum.Enum)]
        kept = enums or [arg for arg in args if arg is not types.NoneType]
        return " or ".join([describe(arg) for arg in kept] + ["null"] * (types.NoneType in args))
    if origin is list or hint is list:
        return f"a list of {describe(args[0])}" if args else "a list (list)"
    if origin is dict or hint is dict:
        return (
            f"a section of name: {describe(args[1])}"
            if args and args[1] is not Any
            else "a section (dict)"
        )
    if dataclasses.is_dataclass(hint):
        return "a section with " + ", ".join(field.name for field in dataclasses.fields(hint))
    return _NAMES.get(hint, "text (str)" if hint is str else str(hint))


def show(value: Any) -> str:
    """A value of the file in words, short enough for one sentence."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {value if len(value) <= 60 else value[:57] + '...'!r}"
    kind = {dict: "a section", list: "a list", int: "the whole number", float: "the number"}.get(
        type(value), "the value"
    )
    return kind if isinstance(value, (dict, list)) else f"{kind} {value}"


def _remedy(value: Any, hint: Any) -> str:
    """How to write what was probably meant."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    wanted = (
        [arg for arg in typing.get_args(hint) if arg is not types.NoneType] if is_union else [hint]
    )
    origins = [typing.get_origin(arg) or arg for arg in wanted]
    if isinstance(value, str) and (float in wanted or int in wanted):
        if match := _EXPONENT.fullmatch(value.strip()):
            whole, part, sign, power = match.groups()
            return f"write {whole}.{part or '0'}e{sign or '+'}{power} (YAML takes {value} for text)"
        if re.fullmatch(r"[-+]?\d+(\.\d*)?", value.strip()):
            return f"write {value.strip()} without quotes"
    if isinstance(value, str) and bool in wanted:
        return "write true or false without quotes"
    if isinstance(value, float) and int in wanted and value.is_integer():
        return f"write {int(value)}"
    if isinstance(value, (bool, int, float)) and str in wanted:
        return "put it in quotes if you mean text"
    if list in origins:
        return "write it in brackets, as in [first, second]"
    if any(origin is dict or dataclasses.is_dataclass(origin) for origin in origins):
        return "write its keys below it, indented"
    choices = [choice for arg in wanted for choice in _choices(arg)]
    if choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        return f"write {close[0] if close else choices[0]}"
    return (
        "give a value of that type or remove the key"
        if value is None
        else "give a value of that type"
    )


def _choices(hint: Any) -> list[str]:
    """What a closed choice can be; empty for every other type."""
    if typing.get_origin(hint) is Literal:
        return [str(choice) for choice in typing.get_args(hint)]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return [str(member.value) for member in hint]
    return []


def _mismatch(value: Any, hint: Any, key: Key, origin: Origin) -> NoReturn:
    origin.fail(key, f"must be {describe(hint)}, but it is {show(value)}; {_remedy(value, hint)}")


def typed(value: Any, hint: Any, *, key: Key, origin: Origin) -> Any:
    """Return `value` as the type in `hint`, a whole number as a float if asked for, or raise."""
    outer, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if outer in (typing.Union, types.UnionType):
        return _typed_union(value, hint, key=key, origin=origin)
    if outer is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in args)
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        fits = value in [member.value for member in hint]
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, key=key, origin=origin)
    elif hint is list or outer is list:
        fits = isinstance(value, list)
    elif hint is dict or outer is dict:
        fits = isinstance(value, dict)
    elif hint is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        fits = type(value) is hint
    if not fits:
        _mismatch(value, hint, key, origin)
    if hint is float and not math.isfinite(value):
        origin.fail(key, f"must be a finite number (float), but it is {value}; give a real number")
    if isinstance(value, list):
        item = args[0] if args else Any
        return [
            typed(each, item, key=(*key, str(i)), origin=origin) for i, each in enumerate(value)
        ]
    if isinstance(value, dict):
        return _typed_dict(value, args[1] if args else Any, key=key, origin=origin)
    return float(value) if hint is float else value


def _typed_union(value: Any, hint: Any, *, key: Key, origin: Origin) -> Any:
    """The first member that takes the value; beside a choice (enum), free text does not count."""
    args = typing.get_args(hint)
    if value is None and types.NoneType in args:
        return None
    members = [arg for arg in args if arg is not types.NoneType]
    if len(members) == 1 and isinstance(value, (dict, list)):
        return typed(value, members[0], key=key, origin=origin)  # so that the inner key is named
    if any(isinstance(arg, type) and issubclass(arg, enum.Enum) for arg in members):
        members = [arg for arg in members if arg is not str]
    for member in members:
        try:
            return typed(value, member, key=key, origin=origin)
        except ValueError:
            continue
    _mismatch(value, hint, key, origin)


def _typed_dict(value: Mapping[Any, Any], item: Any, *, key: Key, origin: Origin) -> dict[str, Any]:
    for name in value:
        if not isinstance(name, str):
            origin.fail(
                key,
                f"has the key {name!r}, which YAML does not read as text; put this key in quotes",
            )
    return {
        name: typed(each, item, key=(*key, name), origin=origin) for name, each in value.items()
    }


def build(cls: type[T], data: Any, *, key: Key = (), origin: Origin) -> T:
    """Make the dataclass `cls` from a mapping: no unknown key, no missing key, no wrong type."""
    if not isinstance(data, dict):
        _mismatch(data, cls, key or ("the file",), origin)
    assert dataclasses.is_dataclass(cls)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in data:
        if name not in fields:
            origin.fail(
                (*key, str(name)), f"is not a key that is known here; {nearest(str(name), fields)}"
            )
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = typed(data[name], hints[name], key=(*key, name), origin=origin)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            origin.fail((*key, name), f"is missing; add this key with {describe(hints[name])}")
    return cls(**values)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read one YAML file whose top level is a section; syntax errors come with their line."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: is not UTF-8 text (byte {error.start}); save it as a UTF-8 YAML file"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        raise ValueError(
            f"{path}: is not valid YAML at {place} ({error.problem}); correct that line"
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(
            f"{path}: is not valid YAML ({' '.join(str(error).split())}); correct that value"
        ) from error
    if data is None:
        raise ValueError(f"{path}: is empty; start from a copy of a shipped recipe")
    if not isinstance(data, dict):
        raise ValueError(
            f"{path}: must be a section of key: value lines at the top, "
            f"but it is {show(data)}; give it keys"
        )
    return data


def parse_override(text: str) -> tuple[str, Any]:
    """Split `key.path=value`; the value follows YAML's rules, but `4e-4` is a number here."""
    dotted, equals, value = text.partition("=")
    if not equals or not dotted.strip() or "" in dotted.strip().split("."):
        raise ValueError(
            f"command line: {text!r} is not an override; "
            "write key.path=value, as in training.max_steps=100"
        )
    try:
        return dotted.strip(), yaml.load(value, Loader=_CommandLine)
    except (yaml.YAMLError, ValueError) as error:
        reason = error.problem if isinstance(error, yaml.MarkedYAMLError) else error
        fix = f"put the value in quotes, as in '{dotted.strip()}=\"...\"'"
        raise ValueError(
            f"command line: the value in {text!r} is not valid YAML ({reason}); {fix}"
        ) from error


def apply_overrides(
    data: dict[str, Any], overrides: Sequence[str], *, cls: type, file: str
) -> Origin:
    """Write `key.path=value` overrides into `data`, in order; `data.sources.0.weight=2` counts."""
    overridden: set[Key] = set()
    for text in overrides:
        dotted, value = parse_override(text)
        key = _set(
            data,
            cls,
            dotted.split("."),
            value,
            origin=Origin(file=file, overridden=frozenset([()])),
        )
        overridden.add(key)
    return Origin(file=file, overridden=frozenset(overridden))


def _set(data: dict[str, Any], cls: type, parts: list[str], value: Any, *, origin: Origin) -> Key:
    """Put `value` at the end of the path, whose last step keeps its dots in a section of globs."""
    node: Any = data
    hint: Any = cls
    key: Key = ()
    while True:
        flat = typing.get_origin(hint) is dict and typing.get_args(hint)[1] is not Any
        step, parts = (".".join(parts), []) if flat else (parts[0], parts[1:])
        key = (*key, step)
        if isinstance(node, list):
            if not step.isdecimal() or int(step) >= len(node):
                origin.fail(
                    key, f"is not in a list of {len(node)}; give a number from 0 to {len(node) - 1}"
                )
            place: Any = int(step)
        elif isinstance(node, dict):
            place = step
        else:
            origin.fail(
                key,
                f"cannot be set, because {'.'.join(key[:-1])} is {show(node)} and not a section; "
                "override that key instead",
            )
        if not parts:
            node[place] = value
            return key
        hint = _hint_below(hint, step)
        if isinstance(node, dict) and node.get(place) is None:
            node[place] = {}
        node = node[place]


def _hint_below(hint: Any, step: str) -> Any:
    """The declared type one key further down; `Any` where the declaration ends."""
    if dataclasses.is_dataclass(hint):
        hint = typing.get_type_hints(hint).get(step, Any)
        members = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        return members[0] if is_union and len(members) == 1 else hint
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0]
    return Any
