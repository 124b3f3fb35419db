"""Tools of one chat request: what the template is told, what the answer must be, and how its calls are told."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import UNSET

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.http_api.schemas.answers import (
    AnswerMessage,
    CalledFunction,
    ChatDelta,
    DeltaFunction,
    DeltaToolCall,
    ToolCall,
)
from adaplex_server.http_api.schemas.chat import ChatCompletionRequest
from adaplex_server.http_api.schemas.tools import NamedTool, Tool
from adaplex_server.service.tool_calls import Argued, Called, Piece, Said, ToolCalls
from adaplex_server.service.tool_formats import UNKNOWN_FORM, ToolFormat
from adaplex_server.vocabulary import Constraint


@dataclass(frozen=True)
class ToolUse:
    """tools: those that may be called. form: how this base writes calls. forced: the answer must be a call."""

    tools: Sequence[Tool]
    form: ToolFormat
    forced: bool
    several: bool

    @staticmethod
    def of(body: ChatCompletionRequest, form: ToolFormat | None) -> ToolUse | None:
        """None where no tool may be called. Raises InvalidRequest where the base knows none."""
        choice = body.tool_choice or "auto"
        if not body.tools or choice == "none":
            return None
        if form is None:
            raise InvalidRequest(UNKNOWN_FORM, param="tools")
        tools: Sequence[Tool] = body.tools
        if isinstance(choice, NamedTool):
            tools = [tool for tool in body.tools if tool.function.name == choice.function.name]
        several = body.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
        return ToolUse(tools, form, choice != "auto", several)

    @property
    def constraint(self) -> Constraint | None:
        """Where a call is asked for, the answer is calls that keep to the tools' schemas, and nothing else."""
        if not self.forced:
            return None
        told = [{"name": tool.function.name, "parameters": tool.parameters} for tool in self.tools]
        return self.form.constraint(told, several=self.several)

    def teller(self) -> ToolTeller:
        """For one choice."""
        return ToolTeller(ToolCalls(self.form, {tool.function.name for tool in self.tools}), self.form)


class ToolTeller:
    """Tells one choice's text and calls, whole or piece by piece. Owns the ids of its calls."""

    def __init__(self, calls: ToolCalls, form: ToolFormat) -> None:
        self._calls = calls
        self._form = form

    @property
    def called(self) -> bool:
        """Whether there has been a call."""
        return self._calls.calls > 0

    def message(self, text: str) -> AnswerMessage:
        """The whole answer."""
        said: list[str] = []
        calls: list[tuple[str, list[str]]] = []
        for piece in [*self._calls.push(text), *self._calls.finish()]:
            if isinstance(piece, Said):
                said.append(piece.text)
            elif isinstance(piece, Called):
                calls.append((piece.name, []))
            else:
                calls[-1][1].append(piece.text)
        told = [
            ToolCall(self._form.call_id(secrets.choice), CalledFunction(name, "".join(parts))) for name, parts in calls
        ]
        content = "".join(said)
        return AnswerMessage(content if content or not told else None, tool_calls=told or UNSET)

    def deltas(self, text: str, *, last: bool = False) -> list[ChatDelta]:
        """What is new in a stream."""
        pieces = self._calls.push(text)
        return [self._delta(piece) for piece in (pieces + self._calls.finish() if last else pieces)]

    def _delta(self, piece: Piece) -> ChatDelta:
        if isinstance(piece, Said):
            return ChatDelta(content=piece.text)
        if isinstance(piece, Argued):
            return ChatDelta(tool_calls=[DeltaToolCall(piece.number, DeltaFunction(arguments=piece.text))])
        begun = DeltaToolCall(
            piece.number, DeltaFunction("", piece.name), self._form.call_id(secrets.choice), "function"
        )
        return ChatDelta(tool_calls=[begun])
