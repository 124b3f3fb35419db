"""Text to token ids and back, for one base: tokenizer, chat template and detokenizer.

Everything here is immutable once made and may be used from any thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.bases.tokenizer import load_tokenizer
from adaplex_server.service.control_tokens import ControlTokens
from adaplex_server.service.conversation import check_messages, check_text
from adaplex_server.service.detokenizer import Detokenizer, TokenBytes, token_bytes
from adaplex_server.service.tool_formats import ToolFormat, recognize


class TextCodec:
    """The texts of one base.

    folder: the base's. chat_template: jinja source that replaces the tokenizer's own. tool_format: how the base writes
    tool calls, None if it writes none that are known.
    """

    def __init__(self, folder: Path, *, chat_template: str | None = None) -> None:
        self._templates = load_tokenizer(folder)
        self._tokenizer: Tokenizer = self._templates.backend_tokenizer
        self._chat_template = chat_template or self._templates.chat_template
        self._control = ControlTokens(self._tokenizer)
        self.table: TokenBytes = token_bytes(self._tokenizer)
        template = self._chat_template if isinstance(self._chat_template, str) else None
        self.tool_format: ToolFormat | None = recognize(template, self._control.ids)

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of a raw prompt. Control tokens written in it are control tokens: a raw prompt is the client's own.

        add_special: with what the tokenizer puts around a text (such as a begin token). Raises InvalidRequest,
        RequestTooLarge.
        """
        return self._tokenizer.encode(check_text(text, "prompt"), add_special_tokens=add_special).ids

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The conversation as the template writes it; no check of control tokens. Raises InvalidRequest."""
        if self._chat_template is None:
            raise InvalidRequest(
                "this base has no chat template; use completions with a prompt, or start the server with a template",
                param="messages",
            )
        from jinja2 import TemplateError

        try:
            rendered = self._templates.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                chat_template=self._chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest(
                f"the chat template refuses these messages: {error!s:.300}", param="messages"
            ) from error
        return str(rendered)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation; control tokens come from the template alone (see `control_tokens`).

        messages: role system, developer, user, assistant or tool; content a string or a list of text parts. Raises
        InvalidRequest.
        """
        checked = check_messages(messages, tools)
        (masked, masked_tools), any_masked = self._control.mask((checked, list(tools or ())))
        rendered = self.render(masked, tools=masked_tools, add_generation_prompt=add_generation_prompt)
        if any_masked:
            return self._control.encode_masked(rendered)
        return self._tokenizer.encode(rendered, add_special_tokens=False).ids

    def detokenizer(self, prompt: Sequence[int] = (), *, skip_special: bool = True) -> Detokenizer:
        """For an answer to `prompt`. It continues the prompt's text unless the prompt ends in a control token."""
        continues = bool(prompt) and prompt[-1] not in self.table.special
        return Detokenizer(self.table, continues=continues, skip_special=skip_special)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of a whole sequence."""
        return Detokenizer(self.table, skip_special=skip_special).all(ids)

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for, which may be a part of a character; b"" for ids outside the vocabulary."""
        return self.table.text[token] if 0 <= token < len(self.table.text) else b""

    def token_text(self, token: int) -> str:
        """The same as text; bytes that are not whole characters show as U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")
