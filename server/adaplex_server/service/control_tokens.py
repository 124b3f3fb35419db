"""Keeps text that a client wrote from becoming control tokens when a conversation is templated.

A chat template yields one string in which `<|im_end|>` of the template and `<|im_end|>` that a user typed look alike.
So the client's control-token look-alikes are masked before the template is rendered (a private-use character around a
number: no template trims or splits it), the rendered text is cut at the control tokens that are left (the template's
own, hence real), and the pieces between, unmasked, are tokenized by a tokenizer that has no control tokens. Nothing a
client sends can end a turn or begin one.

Conversations without a look-alike, practically all, are tokenized whole, exactly as transformers does it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

MASK = "\ue0a7"
_MASKED = re.compile(f"{MASK}([0-9]+){MASK}")


def plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """A copy to which control tokens are plain text."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    return plain


class ControlTokens:
    """The control tokens of one tokenizer. Immutable after construction; used from any thread. ids: by their text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        ids = {token.content: number for number, token in added.items() if token.special and token.content}
        # The mask itself counts as one, so that a client cannot write it.
        self._texts = [*sorted(ids, key=len, reverse=True), MASK]
        self._number = {text: number for number, text in enumerate(self._texts)}
        self.ids = ids
        self._tokenizer = tokenizer
        self._plain = plain_tokenizer(tokenizer)
        self._any = re.compile("|".join(map(re.escape, self._texts)))
        self._cut = re.compile(f"({'|'.join(map(re.escape, self._texts[:-1]))})") if ids else None

    def mask(self, value: Any) -> tuple[Any, bool]:
        """`value` (strings in lists and mappings) with every look-alike masked, and whether there was any."""
        if isinstance(value, str):
            masked, count = self._any.subn(lambda found: f"{MASK}{self._number[found[0]]}{MASK}", value)
            return masked, count > 0
        if isinstance(value, Mapping):
            pairs = [(self.mask(key), self.mask(item)) for key, item in value.items()]
            return {k: v for (k, _), (v, _) in pairs}, any(a or b for (_, a), (_, b) in pairs)
        if isinstance(value, list | tuple):
            items = [self.mask(item) for item in value]
            return [item for item, _ in items], any(masked for _, masked in items)
        return value, False

    def encode_masked(self, rendered: str) -> list[int]:
        """Token ids of a rendered conversation in which the client's look-alikes are masked."""
        pieces = self._cut.split(rendered) if self._cut else [rendered]
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            if number % 2:
                ids.append(self.ids[piece])
            elif piece:
                ids += self._plain.encode(self._unmask(piece), add_special_tokens=False).ids
        return ids

    def _unmask(self, text: str) -> str:
        return _MASKED.sub(lambda found: self._texts[int(found[1])], text)
