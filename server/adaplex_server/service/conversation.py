"""Checks a conversation before it meets a chat template: roles, contents, text that can be encoded.

What passes is a list of plain dicts with `content` as one string (or None), as templates expect it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adaplex_adapters.errors import InvalidRequest, RequestTooLarge
from adaplex_server.service.limits import MAX_MESSAGES, MAX_PROMPT_CHARS

MAX_LEVELS = 64
"""Of lists and objects inside each other, in tools and calls."""
ROLES = ("system", "developer", "user", "assistant", "tool")
# What a template may look at beside role and content.
_PASSED_ON = ("name", "tool_calls", "tool_call_id")


def check_text(text: Any, param: str) -> str:
    """A string that UTF-8 can carry and that is not absurdly long. Raises InvalidRequest, RequestTooLarge."""
    if not isinstance(text, str):
        raise InvalidRequest(f"{param} must be a string, got {type(text).__name__}", param=param)
    if len(text) > MAX_PROMPT_CHARS:
        raise RequestTooLarge(
            f"{param} has {len(text)} characters, at most {MAX_PROMPT_CHARS} are taken; shorten it", param=param
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{param} holds half of a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start}: "
            "it is not valid Unicode",
            param=param,
        ) from None
    return text


def _content(content: Any, where: str) -> str:
    """A string, or the texts of a list of text parts, joined as they are."""
    if isinstance(content, str):
        return check_text(content, where)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InvalidRequest(f"{where} must be a string or a list of text parts", param=where)
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise InvalidRequest(
                f"{where}[{number}] is of type {kind!r:.40}; this model takes parts of type 'text'", param=where
            )
        texts.append(check_text(part.get("text"), f"{where}[{number}].text"))
    return "".join(texts)


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{where} must be an object with role and content", param=where)
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(ROLES)}, got {role!r:.40}", param=f"{where}.role")
    # OpenAI's newer name for the same thing; templates know only the older one.
    checked: dict[str, Any] = {"role": "system" if role == "developer" else role}
    content = message.get("content")
    if content is None and not (role == "assistant" and message.get("tool_calls")):
        raise InvalidRequest(f"{where}.content is missing", param=f"{where}.content")
    checked["content"] = "" if content is None else _content(content, f"{where}.content")
    checked |= {key: message[key] for key in _PASSED_ON if message.get(key) is not None}
    for value in _strings([checked.get(key) for key in _PASSED_ON], where):
        check_text(value, where)
    return checked


def _strings(value: Any, param: str, levels: int = MAX_LEVELS) -> list[str]:
    """Every string inside lists and mappings, keys included. Raises InvalidRequest for what is nested so deeply that
    templates could not walk through it.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Mapping | list | tuple):
        return []
    if not levels:
        raise InvalidRequest(f"{param} is nested more than {MAX_LEVELS} levels deep", param=param)
    items = [item for pair in value.items() for item in pair] if isinstance(value, Mapping) else value
    return [text for item in items for text in _strings(item, param, levels - 1)]


def check_messages(messages: Any, tools: Any = None) -> list[dict[str, Any]]:
    """The conversation in the form that templates take. Raises InvalidRequest with the place in `param`."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise InvalidRequest("messages must be a list with at least one message", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise RequestTooLarge(f"{len(messages)} messages, at most {MAX_MESSAGES} are taken", param="messages")
    checked = [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]
    for text in _strings(tools, "tools"):
        check_text(text, "tools")
    return checked
