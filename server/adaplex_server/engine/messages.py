"""Frames between the API process and the engine process.

One end of a Unix socket pair is inherited by the engine; a frame is a 4-byte little-endian length and a msgpack body
(msgspec, tagged union; no pickle). End of file on either side means that the other process is gone. The engine knows
revisions, never names.

Every accepted `Submit` ends in exactly one `RowEnd`, also after a `Cancel` (reason "cancelled").
"""

from __future__ import annotations

from typing import Literal

import msgspec

from adaplex_server.vocabulary import FinishReason, SamplingParams, TokenLogprob

# ---- API -> engine ---------------------------------------------------------------------------------------------------


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Generate for one row. row: unique in the engine's life. revision: adapter revision, None for the base.

    deadline: absolute time.monotonic() seconds (one clock for both processes of a machine), None for none.
    priority: lower values are served first, and preempted last. virtual_tokens: length of the revision's soft prompt,
    which stands before the prompt. weight: the revision's share of a busy engine, beside the others' weights.
    tenant: whom the row is for; only rows of one tenant share the pages of a prompt's beginning, so that nobody learns
    what others ask.
    """

    row: int
    prompt: list[int]
    sampling: SamplingParams
    revision: str | None = None
    deadline: float | None = None
    priority: int = 0
    virtual_tokens: int = 0
    weight: float = 1.0
    tenant: str = ""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Stop this row within one step. Unknown rows are ignored (they have just ended)."""

    row: int


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Read the revision from the store, put it on the device and prove it: AdapterLoaded or AdapterFailed."""

    call: int
    revision: str


class DropAdapter(msgspec.Struct, frozen=True, tag=True):
    """Forget the revision once no row uses it: slot, host copy and prefix-cache pages. Answered by AdapterDropped."""

    call: int
    revision: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Finish nothing more; end the process."""


ToEngine = Submit | Cancel | LoadAdapter | DropAdapter | Shutdown

# ---- engine -> API ---------------------------------------------------------------------------------------------------


class EngineInfo(msgspec.Struct, frozen=True):
    """What a started engine is: told once, in Ready."""

    pid: int
    device: str
    dtype: str
    base_format: str
    max_context: int
    max_rows: int
    max_waiting: int
    page_size: int
    total_pages: int
    base_bytes: int
    vocab_size: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The base is loaded and the engine takes rows."""

    info: EngineInfo


class Progress(msgspec.Struct, frozen=True, tag=True):
    """A line for whoever waits for Ready: what is being done, and how far (0..1)."""

    text: str
    fraction: float


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start (error: class name in the error tree). The process ends after this."""

    error: str
    message: str


class RowToken(msgspec.Struct, frozen=True, omit_defaults=True):
    """One new token of a row. logprob is set when asked for. prompt_logprobs, cached_tokens and began come with the
    first token only; began: time.monotonic() seconds at which the row got its place in a step, 0 if not told.
    """

    row: int
    token: int
    logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cached_tokens: int = 0
    began: float = 0.0


class RowEnd(msgspec.Struct, frozen=True, omit_defaults=True):
    """The one final word on a row. error: class name in the error tree when reason is "error".

    When a stop or end token ended the row it is `stop_token` and was not sent as a RowToken. prompt_logprobs is set
    here when asked for and no token was sent (max_tokens 0: scoring only). stop_logprob: of the stop token, when
    logprobs were asked for. began: as in RowToken, when no token was sent.
    """

    row: int
    reason: FinishReason
    error: str | None = None
    message: str = ""
    retry_after: float | None = None
    stop_token: int | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    stop_logprob: TokenLogprob | None = None
    began: float = 0.0


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """Gauges and running totals (totals count since the engine started). Told with every step, so without names."""

    waiting: int
    running: int
    pages_used: int
    pages_cached: int
    pages_total: int
    adapters_resident: int
    rank_rows_used: int
    rank_rows_total: int
    adapter_loads: int
    adapter_evictions: int
    preemptions: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    steps: int
    step_seconds: float
    slots_total: int = 0
    host_adapter_bytes: int = 0


class StepFigures(msgspec.Struct, frozen=True, array_like=True):
    """What one step was. seconds: of its own, without what it shared with the step before. prefill_rows: rows that
    computed tokens of their prompts (or of an answer whose pages were given up). tokens: computed, of all rows.
    adapters: different revisions in the batch. base_rows: rows without an adapter.
    """

    seconds: float
    rows: int
    prefill_rows: int
    tokens: int
    adapters: int
    base_rows: int


class StepDone(msgspec.Struct, frozen=True, tag=True):
    """Everything that one step did: one message a step. figures: None if rows ended without one."""

    tokens: list[RowToken]
    ends: list[RowEnd]
    stats: EngineStats
    figures: StepFigures | None = None


class AdapterLoaded(msgspec.Struct, frozen=True, tag=True):
    """The proof: every tensor was consumed, and the probe's logits differ from the base's by at most this (over 0)."""

    call: int
    revision: str
    max_logit_difference: float
    device_bytes: int
    seconds: float


class AdapterFailed(msgspec.Struct, frozen=True, tag=True):
    """The revision cannot be served; nothing of it stays. error: class name in the error tree."""

    call: int
    revision: str
    error: str
    message: str


class AdapterMoved(msgspec.Struct, frozen=True, tag=True):
    """An adapter was brought nearer: "read" from the store into host memory, or by "copy" from there to the device (as
    long as its rows waited for it).
    """

    revision: str
    stage: Literal["read", "copy"]
    seconds: float


class AdapterDropped(msgspec.Struct, frozen=True, tag=True):
    """The revision is gone; bytes of device memory that became reclaimable."""

    call: int
    revision: str
    freed_bytes: int


FromEngine = Ready | Progress | Failed | StepDone | AdapterLoaded | AdapterFailed | AdapterMoved | AdapterDropped
