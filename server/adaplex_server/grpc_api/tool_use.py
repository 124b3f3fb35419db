"""Tools of a chat over gRPC: what the template is told, what the answer must be, and how its calls are told."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from adaplex_adapters.errors import InvalidRequest
from adaplex_proto.v1 import adaplex_pb2 as pb
from adaplex_server.service.tool_calls import Called, Piece, Said
from adaplex_server.service.tool_formats import ToolFormat
from adaplex_server.service.tool_use import MAX_TOOLS, NAME, Teller, ToolUse, templated_arguments


def tool_use(chat: pb.Chat, form: ToolFormat | None) -> ToolUse | None:
    """None where no tool may be called. Raises InvalidRequest."""
    tools = {tool.name: _function(number, tool) for number, tool in enumerate(chat.tools)}
    if len(tools) < len(chat.tools):
        raise _bad("tools hold two functions of one name", "tools")
    if len(tools) > MAX_TOOLS:
        raise _bad(f"there are {len(tools)} tools, at most {MAX_TOOLS} are allowed", "tools")
    mode, only = chat.tool_choice.mode, chat.tool_choice.function or None
    if mode not in pb.ToolChoice.Mode.values():
        raise _bad(f"tool_choice has the mode {mode}; known are {', '.join(pb.ToolChoice.Mode.keys())}", "tool_choice")
    required = mode == pb.ToolChoice.MODE_REQUIRED
    if (required and not tools) or (only and only not in tools):
        raise _bad("tool_choice asks for a function that is not among the tools", "tool_choice")
    if not tools or (not only and mode == pb.ToolChoice.MODE_NONE):
        return None
    several = chat.parallel_tool_calls or not chat.HasField("parallel_tool_calls")
    try:
        return ToolUse.of(list(tools.values()), form, only=only, required=required, several=several)
    except InvalidRequest as error:
        error.param = f"chat.{error.param}"
        raise


class ToolTeller(Teller):
    """Tells one choice's text and calls, piece by piece."""

    def tell(self, message: pb.Delta) -> pb.Delta:
        """The delta with its calls taken out of the text."""
        pieces = self._calls.push(message.text)
        message.text = ""
        return self._into(message, pieces)

    def rest(self, index: int) -> pb.Delta | None:
        """What was held back, at the end of the answer."""
        pieces = self._calls.finish()
        return self._into(pb.Delta(index=index), pieces) if pieces else None

    def _into(self, message: pb.Delta, pieces: Sequence[Piece]) -> pb.Delta:
        calls = message.tool_calls
        for piece in pieces:
            if isinstance(piece, Said):
                message.text += piece.text
            elif isinstance(piece, Called):
                calls.add(number=piece.number, id=self._new_id(), name=piece.name)
            elif calls and calls[-1].number == piece.number:
                calls[-1].arguments += piece.text
            else:
                calls.add(number=piece.number, arguments=piece.text)
        return message


def templated(message: pb.ChatMessage) -> dict[str, Any]:
    """A message as chat templates expect it; OpenAI's newer word 'developer' is 'system' there."""
    told: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    told["content"] = message.content if message.content or not message.tool_calls else None
    if message.name:
        told["name"] = message.name
    if message.tool_calls:
        told["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": templated_arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        told["tool_call_id"] = message.tool_call_id
    return told


def _function(number: int, tool: pb.Tool) -> dict[str, Any]:
    if not re.fullmatch(NAME, tool.name):
        raise _bad(f"the name of tool {number} must be 1 to 64 letters, digits, dots, dashes or underscores", "tools")
    parameters: Any = {"type": "object", "properties": {}}
    if tool.parameters_json:
        try:
            parameters = json.loads(tool.parameters_json)
        except (ValueError, RecursionError) as error:
            raise _bad(f"parameters_json of tool '{tool.name}' is no JSON: {error!s:.200}", "tools") from None
        if not isinstance(parameters, dict):
            raise _bad(f"parameters_json of tool '{tool.name}' must be a JSON schema: an object", "tools")
    return {"name": tool.name, "description": tool.description, "parameters": parameters}


def _bad(what: str, field: str) -> InvalidRequest:
    return InvalidRequest(what, param=f"chat.{field}")
