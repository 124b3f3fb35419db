"""Tools of a chat request, and the calls of them that a conversation holds, as OpenAI names them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from adaplex_server.http_api.schemas.fields import RequestModel
from adaplex_server.service.tool_use import NAME, templated_arguments


class Function(RequestModel):
    """What the model may call. parameters: a JSON schema of an object."""

    name: str = Field(pattern=NAME)
    description: str | None = Field(None, max_length=16384)
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="Calls keep to the schema where tool_choice asks for a call.")


class Tool(RequestModel):
    """Only functions are known."""

    type: Literal["function"]
    function: Function

    def described(self) -> dict[str, Any]:
        """The function, whose schema says "an object" where the client says nothing."""
        parameters = self.function.parameters or {"type": "object", "properties": {}}
        return {"name": self.function.name, "description": self.function.description or "", "parameters": parameters}


class NamedFunction(RequestModel):
    """The function that must be called."""

    name: str = Field(pattern=NAME)


class NamedTool(RequestModel):
    """A tool_choice that asks for one tool."""

    type: Literal["function"]
    function: NamedFunction


class CalledFunction(RequestModel):
    """arguments: JSON as text, as it was answered."""

    name: str = Field(max_length=256)
    arguments: str

    def templated(self) -> dict[str, Any]:
        """As chat templates expect it."""
        return {"name": self.name, "arguments": templated_arguments(self.arguments)}


class ToolCall(RequestModel):
    """A call in an assistant's message, sent back as it was received."""

    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def templated(self) -> dict[str, Any]:
        """As chat templates expect it."""
        return {"id": self.id, "type": "function", "function": self.function.templated()}
