"""Building blocks of request schemas: strict models, fields that are refused by name, OpenAI's odder types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_plain_validator_function


class RequestModel(BaseModel):
    """Base of all request schemas: no coercion, no unknown fields, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True, init=False)
class Only:
    """Marks a field that other servers have and this one does not: null and the `harmless` values pass."""

    harmless: tuple[Any, ...]

    def __init__(self, *harmless: Any) -> None:
        object.__setattr__(self, "harmless", harmless)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {
            "enum": [None, *self.harmless],
            "description": "Not supported; only values that change nothing are taken.",
        }

    def _check(self, value: Any) -> Any:
        if value is None or any(type(value) is type(one) and value == one for one in self.harmless):
            return value
        shown = " or ".join(orjson.dumps(one).decode() for one in (None, *self.harmless))
        raise ValueError(f"is not supported by this server; leave it out or send {shown}")


class ConflictingFields(ValueError):
    """A rule over several fields is broken; `param` is the one to change, inside the object."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"'{param}' {message}")
        self.param = param


def _stop(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return tuple(value)
    raise ValueError("must be a string or a list of strings")


def _token_ids(value: Any) -> tuple[int, ...] | None:
    if value is None or (isinstance(value, list) and all(type(one) is int for one in value)):
        return None if value is None else tuple(value)
    raise ValueError("must be a list of token ids")


def _token_biases(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and biases")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise ValueError(f"keys must be token ids, not {key[:40]!r}")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise ValueError(f"the bias of token {key} must be a number")
        biases[int(key)] = bias
    return biases


Stop = Annotated[
    Any,
    BeforeValidator(_stop),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}),
]
LogitBias = Annotated[
    Any,
    BeforeValidator(_token_biases),
    WithJsonSchema({"anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}]}),
]
TokenIds = Annotated[
    Any,
    BeforeValidator(_token_ids),
    WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}]}),
]


class StreamOptions(RequestModel):
    """How a stream ends: `include_usage` asks for one more chunk with the usage of the whole request, and vLLM's
    `continuous_usage_stats` beside it for the usage so far in each chunk.
    """

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Only(False)] = None
    continuous_usage_stats: bool | None = None
