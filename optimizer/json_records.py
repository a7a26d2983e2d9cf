"""Frozen dataclasses to JSON and back, strictly: every key present, none unknown, every type as declared."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
from collections.abc import Mapping, Sequence
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
    if not isinstance(value, dict):
        raise _mismatch(where, "an object", value)
    hints = _hints(kind)
    for name in value.keys() - hints.keys():
        raise RecordError(f"{where} has the unknown field {name!r:.80}, of another version")
    for name in hints.keys() - value.keys():
        raise RecordError(f"{where} lacks the field '{name}'")
    return kind(**{name: _decode(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})


@functools.cache
def _hints(kind: type) -> dict[str, object]:
    return get_type_hints(kind)


@functools.cache
def _form(hint: object) -> tuple[object, tuple[object, ...], bool]:
    """Return origin and arguments of a type, and whether it is a record; asked for each of thousands of values."""
    return get_origin(hint), get_args(hint), isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _decode(hint: object, value: JsonValue, where: str) -> object:
    origin, arguments, is_record = _form(hint)
    if origin is tuple:
        if not isinstance(value, list):
            raise _mismatch(where, "an array", value)
        return tuple(_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _mismatch(where, "an object", value)
        return {
            _decode(str, key, where): _decode(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()
        }
    if origin is Literal:
        if value not in arguments:
            raise _mismatch(where, " or ".join(map(repr, arguments)), value)
        return value
    if origin in (Union, types.UnionType):
        return _decode_union(arguments, value, where)
    if is_record:
        return decode(cast("type[object]", hint), value, where)
    return _decode_scalar(hint, value, where)


def _decode_union(alternatives: tuple[object, ...], value: JsonValue, where: str) -> object:
    """Try the alternatives in turn; no two of ours accept the same JSON value, except int before float."""
    failure: RecordError | None = None
    for alternative in alternatives:
        try:
            return _decode(alternative, value, where)
        except RecordError as error:
            failure = error
    assert failure is not None
    raise failure


def _decode_scalar(hint: object, value: JsonValue, where: str) -> object:
    if hint is type(None) and value is None:
        return None
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise _mismatch(where, "text without lone surrogates", value)
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_INTEGER:
        return value
    if hint is float and isinstance(value, float) and math.isfinite(value):
        return value
    expected = getattr(hint, "__name__", str(hint))
    raise _mismatch(where, f"of type {expected}", value)


def _mismatch(where: str, expected: str, value: JsonValue) -> RecordError:
    found = type(value).__name__ if isinstance(value, list | dict) else f"{value!r:.80}"
    return RecordError(f"{where} should be {expected} but is {found}")
