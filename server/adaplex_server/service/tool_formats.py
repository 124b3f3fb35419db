"""How a base writes tool calls: known from its chat template, which shows the model its own earlier calls.

- Hermes 2 Pro, Qwen 2.5 and 3: `<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`, after any text.
- Llama 3.1 and later: the whole answer is `{"name": ..., "parameters": {...}}`; several are separated by `;`.
- Mistral (up to its v7 templates): `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`.

Templates with calls in other forms (XML of parameters, `[ARGS]`, Python) are not recognized.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from adaplex_server.vocabulary import Constraint

UNKNOWN_FORM = (
    "this base's chat template has no tools, or writes calls in a way that is not known; the forms of Hermes and Qwen, "
    "Llama 3 and Mistral are"
)
_ALPHABET = string.ascii_letters + string.digits
_MOST_CALLS = 16
_SPACE = {"x-guidance": {"whitespace_pattern": r"( |\n {0,32})"}}


@dataclass(frozen=True)
class ToolFormat:
    """opening: what comes before the calls; "" if an answer with calls begins with them. closing: what ends one call,
    "" for nothing. key: the name of the arguments. marker: id of a control token before the calls, which has no text.
    """

    name: Literal["hermes", "llama3", "mistral"]
    opening: str
    closing: str
    key: str
    marker: int | None = None

    def call_id(self, draw: Callable[[str], str]) -> str:
        """A new one, of characters that `draw` chooses; Mistral's templates take nine letters and digits alone."""
        if self.name == "mistral":
            return "".join(draw(_ALPHABET) for _ in range(9))
        return "call_" + "".join(draw(_ALPHABET) for _ in range(24))

    def constraint(self, tools: Sequence[Mapping[str, Any]], *, several: bool) -> Constraint:
        """An answer that is nothing but calls of these tools. tools: OpenAI's function objects."""
        rules = [self._rule(number, tool) for number, tool in enumerate(tools)]
        call = " | ".join(f"call{number}" for number in range(len(tools)))
        return Constraint("lark", "\n".join([f"start: {self._start(several)}", f"call: {call}", *rules]))

    def _start(self, several: bool) -> str:
        more = f"{{0,{_MOST_CALLS - 1}}}" if several else "{0}"
        if self.name == "hermes":
            return f'call ("\\n" call){more}' if several else "call"
        if self.name == "llama3":
            return f'call ("; " call){more}' if several else "call"
        marker = "" if self.marker is None else f"<[{self.marker}]> "
        return f'{marker}"[" call (", " call){more} "]"' if several else f'{marker}"[" call "]"'

    def _rule(self, number: int, tool: Mapping[str, Any]) -> str:
        head = f'{{"name": {json.dumps(tool["name"])}, "{self.key}": '
        opened, closed = ("<tool_call>\n", "\n</tool_call>") if self.name == "hermes" else ("", "")
        schema = {**_SPACE, **(tool.get("parameters") or {"type": "object"})}
        return (
            f"call{number}: {json.dumps(opened + head)} arguments{number} {json.dumps('}' + closed)}\n"
            f"arguments{number}: %json {json.dumps(schema)}"
        )


def recognize(template: str | None, tokens: Mapping[str, int]) -> ToolFormat | None:
    """The format of a chat template; None if it has no tools or writes calls in a way that is not known.

    tokens: the tokenizer's control tokens and their ids.
    """
    if not template or "tools" not in template:
        return None
    if "[TOOL_CALLS]" in template:
        marker = tokens.get("[TOOL_CALLS]")
        opening = "[TOOL_CALLS]" if marker is None else ""
        return None if "[ARGS]" in template else ToolFormat("mistral", opening, "", "arguments", marker)
    if "<tool_call>" in template:
        other = any(mark in template for mark in ("<function=", "<arg_key>", "<parameter="))
        return None if other else ToolFormat("hermes", "<tool_call>", "</tool_call>", "arguments")
    if "<|python_tag|>" in template or '"parameters": dictionary' in template:
        return ToolFormat("llama3", "", "", "parameters")
    return None
