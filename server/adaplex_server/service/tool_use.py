"""Which tools of a chat may be called, and what its answer must then be: the same over HTTP and gRPC. Owns nothing."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.service.tool_calls import ToolCalls
from adaplex_server.service.tool_formats import UNKNOWN_FORM, ToolFormat
from adaplex_server.vocabulary import Constraint

NAME = r"^[a-zA-Z0-9_.-]{1,64}$"
"""Of a tool."""
MAX_TOOLS = 128


@dataclass(frozen=True)
class ToolUse:
    """form: how this base writes calls. told: the tools as chat templates expect them. names: of those that may be
    called. constraint: of the answer, where it must be calls and nothing else.
    """

    form: ToolFormat
    told: Sequence[dict[str, Any]]
    names: frozenset[str]
    constraint: Constraint | None

    @staticmethod
    def of(
        functions: Sequence[Mapping[str, Any]],
        form: ToolFormat | None,
        *,
        only: str | None = None,
        required: bool = False,
        several: bool = True,
    ) -> ToolUse:
        """functions: OpenAI's, with name, description and parameters. only: the one that must be called. required: any
        of them must be. several: in one answer. Raises InvalidRequest where the base knows no tools.
        """
        if form is None:
            raise InvalidRequest(UNKNOWN_FORM, param="tools")
        callable_ones = [one for one in functions if only in (None, one["name"])]
        forced = required or only is not None
        return ToolUse(
            form,
            [{"type": "function", "function": dict(one)} for one in functions],
            frozenset(one["name"] for one in callable_ones),
            form.constraint(callable_ones, several=several and only is None) if forced else None,
        )

    def calls(self) -> ToolCalls:
        """Those of one choice, as they come."""
        return ToolCalls(self.form, self.names)


class Teller:
    """What the tellers of one choice's calls share, whatever they write. Owns the calls as they come."""

    def __init__(self, use: ToolUse) -> None:
        self._calls = use.calls()
        self._form = use.form

    @property
    def called(self) -> bool:
        """Whether there has been a call."""
        return self._calls.calls > 0

    def _new_id(self) -> str:
        return self._form.call_id(secrets.choice)


def templated_arguments(text: str) -> Any:
    """A call's arguments as an object, which templates write in their own way; what is no object stays text."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = None
    return value if isinstance(value, dict) else text
