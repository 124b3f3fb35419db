"""One row in the engine: what was asked, and how far it has come. Changed by the `Scheduler` and its parts alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from adaplex_server.vocabulary import SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from adaplex_server.engine.guide import Guide


@dataclass(eq=False)
class Row:
    """A sequence from its Submit to its RowEnd.

    tokens: the virtual ones of a soft prompt (-1, -2, ...: no ids of the vocabulary), then prompt and generated ones,
    as far as the host knows them. virtual: how many of them are virtual. prompt_length: with these. weight: of
    its revision. tenant: as in `Submit`. queued: when it came. max_tokens: as asked, or less where
    the context ends earlier. pages: only ever extended in place; another list means other pages.
    digests: of the full pages so far, for the prefix cache. slot: the adapter's, None for the base or while the row
    has never run. scores: log-probabilities of the prompt's own tokens gathered so far. kept_pages: how many of `pages`
    have been offered to the prefix cache. began: when it first got its place in a step. A preempted row has text and
    slot, no pages.

    guide: which tokens may come next, None for any.

    A launched step has been planned and given to the device; a settled one has had its outcomes committed. computed:
    tokens whose keys and values lie in `pages` once every launched step is done. settled: those of settled steps.
    ahead: tokens that launched steps choose and that the host does not know yet, at most one when a step is planned.
    unsettled: launched steps with this row that are not settled, also when the row has since been preempted or ended.
    """

    id: int
    tokens: list[int]
    prompt_length: int
    sampling: SamplingParams
    revision: str | None
    deadline: float | None
    priority: int
    arrival: int
    max_tokens: int
    virtual: int = 0
    weight: float = 1.0
    tenant: str = ""
    queued: float = 0.0
    computed: int = 0
    settled: int = 0
    ahead: int = 0
    unsettled: int = 0
    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    cached_tokens: int = 0
    began: float = 0.0
    state: Literal["new", "waiting", "running", "preempted", "ended"] = "new"
    kept_pages: int = 0
    slot: int | None = None
    guide: Guide | None = None
    scores: list[TokenLogprob | None] = field(default_factory=list)

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: the lower priority value, then the earlier arrival. The last of this order is preempted."""
        return (self.priority, self.arrival)

    @property
    def generated(self) -> int:
        """Tokens generated so far that the host knows."""
        return len(self.tokens) - self.prompt_length

    @property
    def length(self) -> int:
        """Tokens, with those that launched steps choose."""
        return len(self.tokens) + self.ahead

    @property
    def remaining(self) -> int:
        """Tokens that must be computed before the next one can be chosen; 0 when launched steps do all that is left."""
        length = len(self.tokens) + self.ahead
        return 0 if 0 < self.max_tokens <= length - self.prompt_length else length - self.computed

    @property
    def scoring(self) -> bool:
        """Log-probabilities of the prompt are wanted that no launched step computes."""
        if self.sampling.prompt_logprobs is None:
            return False
        first, last = self.virtual, self.prompt_length - 1
        launched = min(max(self.computed, first), last) - min(max(self.settled, first), last)
        return len(self.scores) + launched < self.prompt_length - first


@dataclass(frozen=True)
class Work:
    """What one step does for a row: compute `count` tokens from `start`.

    logits: of how many of them, counted from the last, the logits are wanted; scores: of how many, counted from the
    first, the logits tell the next prompt token's log-probability. samples: the last one's logits choose a token.
    fed: the one token is what the step before chooses for this row, and only the device knows it.
    """

    row: Row
    start: int
    count: int
    logits: int
    scores: int
    samples: bool
    fed: bool = False


def work_on(row: Row, count: int) -> Work:
    """The next `count` tokens of a row, and what is wanted of their logits."""
    start, end = row.computed, row.computed + count
    if row.scoring and start < row.virtual:
        # Nobody wants the logits of virtual tokens.
        return Work(row, start, min(count, row.virtual - start), logits=0, scores=0, samples=False)
    samples = end == row.length and row.max_tokens > 0
    if row.scoring:
        return Work(row, start, count, logits=count, scores=min(end, row.prompt_length - 1) - start, samples=samples)
    return Work(row, start, count, logits=int(samples), scores=0, samples=samples, fed=end > len(row.tokens))


@dataclass(frozen=True)
class Outcome:
    """What the sampler says on a row. token: None where none was to be chosen. failed: its logits are not finite."""

    token: int | None = None
    failed: bool = False
    logprob: TokenLogprob | None = None
    scores: tuple[TokenLogprob, ...] = ()
