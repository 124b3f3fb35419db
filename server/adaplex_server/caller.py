"""Who asks, and what they may do. Owns nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, get_args

Verb = Literal["generate", "adapters", "train", "observe"]
"""generate: ask models. adapters: upload, load and remove adapters. train: files and fine-tuning jobs. observe: read
metrics and the state of adapters.
"""

VERBS: frozenset[Verb] = frozenset(get_args(Verb))


@dataclass(frozen=True)
class Limits:
    """Of one key, or of one adapter over all keys; None is no limit. Rates are per minute, streams at once."""

    requests: int | None = None
    tokens: int | None = None
    streams: int | None = None

    @property
    def none(self) -> bool:
        return self.requests is None and self.tokens is None and self.streams is None


@dataclass(frozen=True)
class Caller:
    """key: the public id of the key, None where no key is needed. models: patterns (`*` and `?`) of the names that may
    be asked for.
    """

    key: str | None
    name: str
    verbs: frozenset[Verb] = VERBS
    models: tuple[str, ...] = ("*",)
    limits: Limits = field(default_factory=Limits)

    def may(self, verb: Verb) -> bool:
        return verb in self.verbs

    @property
    def owner(self) -> str | None:
        """To whom files and jobs belong that this caller makes: whoever the key was made for, so that a new key of
        theirs takes them over. None where no key is needed.
        """
        return None if self.key is None else self.name

    def may_see(self, owner: str | None) -> bool:
        """Files and jobs of this owner: one's own, and everybody's without a key or with one for all models."""
        return self.key is None or "*" in self.models or (owner is not None and owner == self.owner)

    def may_name(self, model: str) -> bool:
        """Whether this model is in the key's scope."""
        return any(fnmatchcase(model, pattern) for pattern in self.models)


ANYONE = Caller(None, "anyone")
"""Whoever asks a server that has no keys."""
