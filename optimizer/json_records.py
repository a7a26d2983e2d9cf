"""Frozen dataclasses to JSON and back, strictly: every key present, none unknown, every type as declared."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

JsonValue = None | bool | int | float | str | Sequence["JsonValue"] | Mapping[str, "JsonValue"]
Record = TypeVar("Record")

MAX_INTEGER = 2**63 - 1


class RecordError(ValueError):
    """Text is not the JSON of a record; the message says where and what."""


def encode(record: object) -> JsonValue:
    """Return the JSON value of a dataclass record: objects in field order, tuples as arrays."""
    match record:
        case None | bool() | int() | float() | str():
            return record
        case tuple():
            return [encode(item) for item in record]
        case dict():
            return {str(key): encode(value) for key, value in record.items()}
        case _ if dataclasses.is_dataclass(record):
            return {field.name: encode(getattr(record, field.name)) for field in dataclasses.fields(record)}
    raise TypeError(f"{type(record).__name__} has no JSON form")


def parse(text: bytes, what: str) -> JsonValue:
    """Return the JSON value of UTF-8 `text`; refuses duplicate keys, NaN, and nesting that exhausts the stack.

    Raises RecordError naming `what`.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{what} is not valid JSON ({error})") from error


def _unique_keys(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def decode(kind: type[Record], value: JsonValue, where: str) -> Record:
    """Return `value` as an instance of the dataclass `kind`; raises RecordError naming the offending field."""
    try:
        return cast("Record", _decoder(kind)(value))
    except _MisfitError as misfit:
        raise RecordError(f"{where}{misfit.path} {misfit.problem}") from None


class _MisfitError(Exception):
    """A value inside of another does not fit; `path` leads there, and grows on the way out."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.path = ""


_Decoder = Callable[[JsonValue], object]


@functools.cache
def _decoder(hint: object) -> _Decoder:
    """Return a function from JSON values to values of a type, which raises _MisfitError.

    It is made once for each type: a manifest has thousands of values, which are decoded at each start of a process.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple:
        return _array_decoder(_decoder(arguments[0]))
    if origin is dict:
        return _mapping_decoder(_decoder(arguments[1]))
    if origin is Literal:
        return _choice_decoder(arguments)
    if origin in (Union, types.UnionType):
        return _union_decoder([_decoder(alternative) for alternative in arguments])
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _record_decoder(hint)
    return _SCALARS.get(cast("type", hint)) or _refusing(getattr(hint, "__name__", str(hint)))


def _array_decoder(item: _Decoder) -> _Decoder:
    def array(value: JsonValue) -> object:
        if not isinstance(value, list):
            raise _mismatch("an array", value)
        items: list[object] = []
        try:
            for each in value:
                items.append(item(each))  # noqa: PERF401 - their number says which one it is that does not fit
        except _MisfitError as misfit:
            misfit.path = f"[{len(items)}]{misfit.path}"
            raise
        return tuple(items)

    return array


def _mapping_decoder(item: _Decoder) -> _Decoder:
    def mapping(value: JsonValue) -> object:
        if not isinstance(value, dict):
            raise _mismatch("an object", value)
        found: dict[object, object] = {}
        for key, each in value.items():
            try:
                found[_text(key)] = item(each)
            except _MisfitError as misfit:
                misfit.path = f"[{key!r}]{misfit.path}"
                raise
        return found

    return mapping


def _record_decoder(kind: type) -> _Decoder:
    fields = {name: _decoder(hint) for name, hint in get_type_hints(kind).items()}

    def record(value: JsonValue) -> object:
        if not isinstance(value, dict):
            raise _mismatch("an object", value)
        if value.keys() != fields.keys():
            for name in value.keys() - fields.keys():
                raise _MisfitError(f"has the unknown field {name!r:.80}, of another version")
            for name in fields.keys() - value.keys():
                raise _MisfitError(f"lacks the field '{name}'")
        found: dict[str, object] = {}
        name = ""
        try:
            for name, decoded in fields.items():
                found[name] = decoded(value[name])
        except _MisfitError as misfit:
            misfit.path = f".{name}{misfit.path}"
            raise
        return kind(**found)

    return record


def _choice_decoder(choices: tuple[object, ...]) -> _Decoder:
    def choice(value: JsonValue) -> object:
        if value not in choices:
            raise _mismatch(" or ".join(map(repr, choices)), value)
        return value

    return choice


def _union_decoder(alternatives: Sequence[_Decoder]) -> _Decoder:
    """Return one that tries the alternatives in turn; no two of ours accept the same value, but int before float."""

    def union(value: JsonValue) -> object:
        failure: _MisfitError | None = None
        for alternative in alternatives:
            try:
                return alternative(value)
            except _MisfitError as misfit:
                failure = misfit
        assert failure is not None
        raise failure

    return union


def _text(value: JsonValue) -> object:
    if not isinstance(value, str):
        raise _mismatch("of type str", value)
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise _mismatch("text without lone surrogates", value)
    return value


def _integer(value: JsonValue) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_INTEGER:
        return value
    raise _mismatch("of type int", value)


def _number(value: JsonValue) -> object:
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise _mismatch("of type float", value)


def _truth(value: JsonValue) -> object:
    if isinstance(value, bool):
        return value
    raise _mismatch("of type bool", value)


def _nothing(value: JsonValue) -> object:
    if value is not None:
        raise _mismatch("of type NoneType", value)
    return None


_SCALARS: dict[type, _Decoder] = {str: _text, int: _integer, float: _number, bool: _truth, type(None): _nothing}


def _refusing(name: str) -> _Decoder:
    def refuse(value: JsonValue) -> object:
        raise _mismatch(f"of type {name}", value)

    return refuse


def _mismatch(expected: str, value: JsonValue) -> _MisfitError:
    found = type(value).__name__ if isinstance(value, list | dict) else f"{value!r:.80}"
    return _MisfitError(f"should be {expected} but is {found}")
