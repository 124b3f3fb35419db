"""Turns a schema violation into one sentence: which field, which value, what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.http_api.schemas.fields import ConflictingFields

_PRIVATE = frozenset({"messages", "prompt", "stop", "suffix", "user"})  # never quoted back or logged: a user's own text


def refusal(error: ValidationError, schema: type[BaseModel]) -> InvalidRequest:
    """InvalidRequest for the first violation; `param` is the field's path, as in messages[0].content."""
    first = error.errors(include_url=False)[0]
    path = field_path(first["loc"])
    if first["type"] == "missing":
        return InvalidRequest(f"'{path}' is missing.", param=path)
    if first["type"] == "extra_forbidden":
        return InvalidRequest(_unknown_field(first["loc"], path, schema), param=path)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConflictingFields):
        return InvalidRequest(f"{cause}.", param=f"{path}.{cause.param}" if path else cause.param)
    private = first["loc"][:1] and first["loc"][0] in _PRIVATE
    said = first["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"'{path}': {said} (got {_shown(first['input'], private=bool(private))}).", param=path)


def field_path(loc: Sequence[int | str]) -> str:
    """('messages', 0, 'content') → messages[0].content"""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part[:100]}" if path else part[:100]
    return path


def _unknown_field(loc: Sequence[int | str], path: str, schema: type[BaseModel]) -> str:
    near = get_close_matches(str(loc[-1])[:100], schema.model_fields, n=1) if len(loc) == 1 else []
    hint = f"did you mean '{near[0]}'?" if near else "leave it out; fields that would be ignored are refused."
    return f"Unknown field '{path}': {hint}"


def _shown(value: Any, *, private: bool) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str) and private:
        return f"a string of {len(value)} characters"
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
