"""Tools of one chat request: what the template is told, what the answer must be, and how its calls are told."""

from __future__ import annotations

from msgspec import UNSET

from adaplex_server.http_api.schemas.answers import (
    AnswerMessage,
    CalledFunction,
    ChatDelta,
    DeltaFunction,
    DeltaToolCall,
    ToolCall,
)
from adaplex_server.http_api.schemas.chat import ChatCompletionRequest
from adaplex_server.http_api.schemas.tools import NamedTool
from adaplex_server.service.tool_calls import Argued, Called, Piece, Said
from adaplex_server.service.tool_formats import ToolFormat
from adaplex_server.service.tool_use import Teller, ToolUse


def tool_use(body: ChatCompletionRequest, form: ToolFormat | None) -> ToolUse | None:
    """None where no tool may be called. Raises InvalidRequest where the base knows none."""
    choice = body.tool_choice or "auto"
    if not body.tools or choice == "none":
        return None
    return ToolUse.of(
        [tool.described() for tool in body.tools],
        form,
        only=choice.function.name if isinstance(choice, NamedTool) else None,
        required=choice == "required",
        several=body.parallel_tool_calls is not False,
    )


class ToolTeller(Teller):
    """Tells one choice's text and calls, whole or piece by piece."""

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
        told = [ToolCall(self._new_id(), CalledFunction(name, "".join(parts))) for name, parts in calls]
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
        begun = DeltaToolCall(piece.number, DeltaFunction("", piece.name), self._new_id(), "function")
        return ChatDelta(tool_calls=[begun])
