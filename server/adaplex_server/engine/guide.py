"""Where an answer is in its grammar, and which tokens may come next.

A guide belongs to one row and is moved on, by the tokens that the row has got since, when the row's next token is
chosen: a token that a preempted or ended row never got is never seen, and nothing is ever taken back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

_UNFULFILLED = "the answer cannot keep to its constraint: {}; simplify the constraint"


class Guide:
    """error: why the grammar cannot be followed any more, "" while it can; then any token is allowed and the row must
    be ended. workers: threads that are shared by all guides.
    """

    __slots__ = ("_matcher", "_seen", "_workers", "error")

    def __init__(self, matcher: LLMatcher, workers: LLExecutor) -> None:
        self._matcher = matcher
        self._workers = workers
        self._seen = 0
        self.error = ""

    def advance(self, generated: Sequence[int]) -> None:
        """generated: all of the answer's tokens so far; those that are new are taken."""
        new = list(generated[self._seen :])
        if new and not self.error:
            self._matcher.consume_tokens(new)
            self._seen += len(new)
            self._note_error()

    def _note_error(self) -> None:
        if self._matcher.is_error():
            self.error = _UNFULFILLED.format(self._matcher.get_error().strip()[:200])

    @staticmethod
    def allowed(guides: Sequence[Guide], banned: Sequence[Collection[int]], vocab_size: int) -> np.ndarray:
        """Which tokens may come next: [R, W] uint8, bit t % 8 of byte t // 8, W * 8 >= vocab_size. banned: of each
        guide, tokens that may not come unless nothing else may.
        """
        words = -(-vocab_size // 32)
        masks = np.full((len(guides), words), 0xFFFFFFFF, dtype=np.uint32)
        live = [(guide._matcher, row) for row, guide in enumerate(guides) if not guide.error]
        if len(live) == 1:
            matcher, row = live[0]
            matcher.unsafe_compute_mask_ptr(masks[row].ctypes.data, words * 4)
        elif live:
            guides[live[0][1]]._workers.unsafe_compute_mask_ptr(live, masks.ctypes.data, words * 4, len(guides))
        told = masks.view(np.uint8)
        for row, (guide, tokens) in enumerate(zip(guides, banned, strict=True)):
            if not guide.error:
                guide._check(told[row], tokens)
        return told

    def _check(self, mask: np.ndarray, banned: Collection[int]) -> None:
        """Take the banned tokens out of the row's mask, if any other is left; open it if the grammar has failed."""
        self._note_error()
        if not self.error and not mask.any():
            self.error = _UNFULFILLED.format("no token can continue it")
        if self.error:
            mask[:] = 0xFF
            return
        if banned:
            kept = mask.copy()
            for token in banned:
                kept[token >> 3] &= ~np.uint8(1 << (token & 7))
            if kept.any():
                mask[:] = kept
