"""How much each key and each adapter has used: token buckets that fill evenly and hold one minute's allowance.

`Rates` owns all the buckets, on the event loop. A request is charged for itself and its prompt when it is admitted and
for its answer as it grows, so a bucket may fall below zero; the next request then waits for it to be above again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from adaplex_adapters.errors import RateLimited
from adaplex_server.caller import Limits

_MINUTE = 60.0
_MOST_IDLE = 4096
"""Subjects remembered before full, idle ones are forgotten."""


class _Bucket:
    """per_minute: what flows in, and what it holds at most."""

    __slots__ = ("_at", "_level", "per_minute")

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / _MINUTE)
        self._at = now
        return self._level

    def take(self, amount: float) -> None:
        self._level -= amount

    def wait(self, wanted: float, now: float) -> float:
        """Seconds until this much is there."""
        return max(0.0, (wanted - self.level(now)) * _MINUTE / self.per_minute)


@dataclass
class _Subject:
    """What one key, or one adapter, has used. Changed by `Rates` and its leases alone."""

    limits: Limits
    requests: _Bucket | None
    tokens: _Bucket | None
    streams: int = 0


class Lease:
    """One admitted request. `used` as its answer grows, `release` once at its end."""

    __slots__ = ("_subjects",)

    def __init__(self, subjects: tuple[_Subject, ...]) -> None:
        self._subjects = subjects

    def used(self, tokens: int) -> None:
        for subject in self._subjects:
            if subject.tokens:
                subject.tokens.take(tokens)

    def release(self) -> None:
        for subject in self._subjects:
            subject.streams -= 1
        self._subjects = ()


class Rates:
    """clock: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._subjects: dict[str, _Subject] = {}

    def admit(self, wanted: Mapping[str, Limits], prompt_tokens: int, streams: int = 1) -> Lease:
        """Let a request begin under all of these subjects' limits, or none. wanted: what the subject is called in the
        message -> its limits. Raises RateLimited with the time to wait.
        """
        now = self._clock()
        subjects = {name: self._subject(name, limits, now) for name, limits in wanted.items() if not limits.none}
        for name, subject in subjects.items():
            _check(name, subject, prompt_tokens, now)
        for subject in subjects.values():
            subject.streams += 1
            if subject.requests:
                subject.requests.take(1)
            if subject.tokens:
                subject.tokens.take(prompt_tokens)
        return Lease(tuple(subjects.values()))

    def headers(self, name: str, limits: Limits) -> dict[str, str]:
        """What OpenAI's clients read of a subject's state."""
        if limits.none:
            return {}
        now, told = self._clock(), {}
        subject = self._subject(name, limits, now)
        for what, bucket in (("requests", subject.requests), ("tokens", subject.tokens)):
            if bucket:
                told[f"x-ratelimit-limit-{what}"] = str(bucket.per_minute)
                told[f"x-ratelimit-remaining-{what}"] = str(max(0, int(bucket.level(now))))
                told[f"x-ratelimit-reset-{what}"] = f"{bucket.wait(bucket.per_minute, now):.3f}s"
        return told

    def _subject(self, name: str, limits: Limits, now: float) -> _Subject:
        found = self._subjects.get(name)
        if found is None or found.limits != limits:
            fresh = _Subject(
                limits,
                None if limits.requests is None else _Bucket(limits.requests, now),
                None if limits.tokens is None else _Bucket(limits.tokens, now),
                found.streams if found else 0,
            )
            if len(self._subjects) >= _MOST_IDLE:
                self._forget(now)
            found = self._subjects[name] = fresh
        return found

    def _forget(self, now: float) -> None:
        for name, one in list(self._subjects.items()):
            full = all(b is None or b.level(now) >= b.per_minute for b in (one.requests, one.tokens))
            if full and not one.streams:
                del self._subjects[name]


def _check(name: str, subject: _Subject, prompt_tokens: int, now: float) -> None:
    limits = subject.limits
    if limits.streams is not None and subject.streams >= limits.streams:
        raise RateLimited(
            f"{name} has {subject.streams} requests under way, and {limits.streams} is its limit", retry_after=1.0
        )
    if subject.requests and (wait := subject.requests.wait(1, now)):
        raise RateLimited(
            f"{name} has used its {limits.requests} requests a minute; try again in {wait:.1f} s", retry_after=wait
        )
    # A prompt above the whole allowance would wait for ever: it passes when the bucket is full.
    if subject.tokens and (wait := subject.tokens.wait(min(prompt_tokens + 1, subject.tokens.per_minute), now)):
        raise RateLimited(
            f"{name} has used its {limits.tokens} tokens a minute; try again in {wait:.1f} s", retry_after=wait
        )
