"""When new rows may begin beside rows that decode.

A step that computes prompts may have a cost that does not depend on their length: where decode steps are replayed as
graphs on a GPU, it is launched kernel by kernel, and takes the time of several decode steps even for one short prompt.
If each row began when it comes, a busy engine would make nothing but such steps. So after one, rows are kept until
decode steps have had `_SHARE` times as long as it lost; those that come meanwhile begin together. A step with many
tokens of prompts was worth its cost, and is followed by no pause: a burst is read as fast as it can be.

Owns the mean times of steps with and without prompts, and the end of the pause. Prompts that have begun are never held
up, and nothing is while no row decodes.
"""

from __future__ import annotations

from dataclasses import dataclass

_OF_STEPS = 1 / 8
_SHARE = 2.0
_SHORT = 1024
"""Tokens of prompts up to which a step's own work is less than what any such step costs."""


@dataclass(frozen=True)
class _Planned:
    at: float
    prompt_tokens: int
    after_decode: bool


class PromptTurns:
    """`may_begin` before each `plan`, with the same time."""

    def __init__(self) -> None:
        self._decode: float | None = None
        self._extra: float | None = None
        self._planned: _Planned | None = None
        self._pause_until = 0.0

    def may_begin(self, now: float) -> bool:
        """Whether rows may begin in the step that is planned now, if others decode in it."""
        self._observe(now)
        return now >= self._pause_until

    def plan(self, now: float, prompt_tokens: int, busy: bool) -> None:
        """A step is planned that computes so many tokens of prompts; busy: it has work."""
        before = self._planned
        self._planned = _Planned(now, prompt_tokens, before is not None and not before.prompt_tokens) if busy else None

    def _observe(self, now: float) -> None:
        """The last step has taken until now. Of decode steps only those after another one count: what a device still
        has to do of a step with prompts is waited for in the next.
        """
        last = self._planned
        if last is None:
            return
        seconds = now - last.at
        if not last.prompt_tokens:
            if last.after_decode:
                self._decode = _mean(self._decode, seconds)
            return
        if last.prompt_tokens > _SHORT:
            return
        # As long as no decode step is known, the whole step counts: the pause brings some.
        self._extra = _mean(self._extra, max(0.0, seconds - (self._decode or 0.0)))
        self._pause_until = now + _SHARE * self._extra


def _mean(before: float | None, value: float) -> float:
    return value if before is None else before + _OF_STEPS * (value - before)
