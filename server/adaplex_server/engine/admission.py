"""Which rows can be served at all, and which are worth queueing. Owns nothing."""

from __future__ import annotations

from adaplex_adapters.errors import AdaplexError, InvalidRequest, PromptTooLong
from adaplex_server.engine.messages import Submit

_SURE = 0.75
"""Share of the longest wait up to which rows are queued. Under overload the queue is always as long as it may be, and a
wait is hardly foreseen better than this: without it many would wait in vain.
"""


def refusal(message: Submit, max_context: int, vocab_size: int) -> AdaplexError | None:
    """Why the row cannot be served in this context and vocabulary, if it cannot."""
    prompt, virtual = len(message.prompt), message.virtual_tokens
    room = max_context - virtual - prompt
    if not prompt:
        return PromptTooLong("the prompt is empty: send at least one token")
    if room < 0 or (room == 0 and message.sampling.max_tokens > 0):
        before = f" after the adapter's {virtual} virtual ones" if virtual else ""
        return PromptTooLong(
            f"a prompt of {prompt} tokens{before} leaves no room for an answer in {max_context} tokens"
        )
    strange = _strange_token(message, vocab_size)
    if strange is not None:
        return InvalidRequest(f"token id {strange} is not in the vocabulary of {vocab_size}")
    return None


def too_late(wait: float, longest: float | None, left: float | None) -> str | None:
    """Why a row should not wait, if it should not: it would begin too late to be of use, and take a place from others
    that would not.

    wait: its expected seconds in the queue. longest: what any row may wait. left: until its deadline.
    """
    if longest is not None and wait > _SURE * longest:
        return f"this request would wait for about {wait:.1f} s, and {longest:g} s is the limit; retry later"
    if left is not None and 0 < left <= wait:
        return f"this request would wait for about {wait:.1f} s, and its time ends before; retry later"
    return None


def _strange_token(message: Submit, vocab_size: int) -> int | None:
    """A token id outside the vocabulary would be an index outside the device's tensors, and the end of all rows."""
    sampling = message.sampling
    named = (*message.prompt, *sampling.logit_bias, *sampling.stop_token_ids)
    low, high = min(named), max(named)
    return low if low < 0 else high if high >= vocab_size else None
