"""The one place that answers requests: both skins (HTTP and gRPC) talk to a `Service` and to nothing below it."""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from adaplex_adapters.errors import AdaplexError, InvalidRequest, Unavailable
from adaplex_server.caller import ANYONE, Caller
from adaplex_server.engine.messages import EngineInfo, EngineStats
from adaplex_server.service.access.gate import Gate
from adaplex_server.service.answer import Answer
from adaplex_server.service.constraints import ConstraintCheck
from adaplex_server.service.engine_client import EngineClient
from adaplex_server.service.limits import MAX_CHOICES, SamplingRequest, build_sampling
from adaplex_server.service.metrics import Metrics, RowInFlight, Sources
from adaplex_server.service.registry import Registry
from adaplex_server.service.room import Room
from adaplex_server.service.series import reason_of
from adaplex_server.service.settings import ServiceSettings
from adaplex_server.service.text_codec import TextCodec
from adaplex_server.service.training.fine_tuning import FineTuning
from adaplex_server.service.training.settings import TrainingSettings
from adaplex_server.service.types import ServiceInfo, ServiceState
from adaplex_server.vocabulary import Constraint, Delta, Finish, GenerateRequest

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger(__name__)
THREAD_CHARS = 8192
"""Longer texts are tokenized off the event loop (about a millisecond's work)."""
DRAIN_RETRY_SECONDS = 5.0
_ANSWERED = ("stop", "length")
NO_STATS = EngineStats(**dict.fromkeys(EngineStats.__struct_fields__, 0))


def _refusals_are_counted(ask: Callable[P, R]) -> Callable[P, R]:
    """Of a service's method with a keyword `model`: errors are counted, under the name if it is one of ours."""

    @functools.wraps(ask)
    def counting(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return ask(*args, **kwargs)
        except AdaplexError as error:
            service: Any = args[0]
            service._refuse(error, str(kwargs["model"]))
            raise

    return counting


class Service:
    """Owns the engine client, the registry, the metrics and the requests under way.

    A skin's way of a request: `await encode` or `await chat`, then `request`, then `generate`. May be asked anything
    before `start` is over: what is not there yet raises Unavailable. progress(text, fraction): called while the base
    is loaded.
    """

    def __init__(self, settings: ServiceSettings, progress: Callable[[str, float], None] | None = None) -> None:
        self.settings = settings
        self._engine = EngineClient(settings, progress)
        self.gate = Gate(settings.keys, settings.adapter_limits)
        self.registry = Registry(settings, self._engine, tells_names=lambda: self.gate.open)
        self.training = FineTuning(
            settings.training or _default_training(settings), self._serve_trained, self.registry.check_free
        )
        self.metrics = Metrics(
            settings.engine.base_name,
            settings.adapter_labels,
            self._engine.figures,
            Sources(
                stats=lambda: self.stats() if self._engine.running else None,
                info=lambda: self._engine.state.info,
                restarts=lambda: self._engine.state.restarts,
                registered=lambda: self.registry.count,
                ready=lambda: self.info().ready,
                rows=self._rows_in_flight,
            ),
        )
        self._text: TextCodec | None = None
        self._constraint_check = ConstraintCheck()
        self._answers: set[Answer] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._phase: ServiceState = "starting"
        self._problem = ""
        self._started = time.time()
        self._room = Room()

    # ---- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the catalogue, start the engine, register the adapters of the settings. Raises StartupError.

        Then only `close` is left.
        """
        folder, template = Path(self.settings.engine.base), self.settings.chat_template
        try:
            await self.registry.open()
            codec = asyncio.create_task(asyncio.to_thread(TextCodec, folder, chat_template=template))
            await asyncio.gather(codec, self._engine.start())
            self._text = codec.result()
            await self.registry.load_folders(self.settings.startup_adapters)
            await self.training.open()
        except AdaplexError as error:
            self._phase, self._problem = "failed", error.message
            raise
        if self._phase == "starting":
            self._phase = "ready"

    async def drain(self, timeout: float | None = None) -> None:
        """Refuse new requests with a retry hint; let running ones finish for `timeout` seconds, then end them."""
        self._phase = "draining"
        limit = self.settings.drain_seconds if timeout is None else timeout
        log.info("draining: %d requests have up to %.0f s to finish", len(self._answers), limit)
        if not await self._idle_within(limit):
            log.warning("%d requests were not done in time and are ended", len(self._answers))
            for answer in tuple(self._answers):
                answer.abort(Unavailable("the server is shutting down; try again", retry_after=DRAIN_RETRY_SECONDS))
            await self._idle_within(1.0)

    async def _idle_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _serve_trained(self, name: str, folder: Path) -> str:
        """What a finished job has made, under its name."""
        return (await self.registry.install_trained(name, folder)).revision

    async def close(self) -> None:
        """End the engine and let go of the catalogue; running requests end with Unavailable."""
        self._phase = "draining"
        await self.training.close()
        await self._engine.close()
        await self.registry.close()
        if self.settings.tracer is not None:
            await asyncio.to_thread(self.settings.tracer.close)

    # ---- text --------------------------------------------------------------------------------------------------------

    @property
    def text(self) -> TextCodec:
        """Text to tokens and back. Raises Unavailable until it is loaded."""
        if self._text is None:
            raise Unavailable("the server is starting; try again in a moment", retry_after=self._engine.retry_after)
        return self._text

    async def encode(self, text: str, *, add_special: bool = True) -> tuple[int, ...]:
        """Token ids of a raw prompt; control tokens in it count. Raises InvalidRequest, RequestTooLarge."""
        codec = self.text
        if len(text) <= THREAD_CHARS:
            return tuple(codec.encode(text, add_special=add_special))
        return tuple(await asyncio.to_thread(codec.encode, text, add_special=add_special))

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[int, ...]:
        """Token ids of a conversation through the chat template, ready to be answered. Raises InvalidRequest."""
        codec = self.text
        if _is_short(messages) and not tools:
            return tuple(codec.chat(messages))
        return tuple(await asyncio.to_thread(codec.chat, messages, tools=tools))

    async def check(self, constraint: Constraint | None) -> None:
        """Raises InvalidRequest if no answer can keep to it, as far as that is seen without an answer."""
        if constraint is not None:
            await self._constraint_check(constraint)

    # ---- requests ----------------------------------------------------------------------------------------------------

    @_refusals_are_counted
    def check_room(self, *, model: str) -> None:
        """Raises Overloaded if a request would be refused for want of room: to be asked before its prompt is tokenized,
        so that a server that is asked too much spends nothing on what it cannot serve.
        """
        if self._engine.state.info is not None:
            self._room.check(model, 1, self.places)

    @property
    def places(self) -> int:
        """Rows that may be under way at once, over all requests; 0 until an engine has been there."""
        info = self._engine.state.info
        return 0 if info is None else info.max_rows + info.max_waiting

    @_refusals_are_counted
    def request(
        self,
        *,
        model: str,
        prompt: Sequence[int],
        sampling: SamplingRequest,
        default_max_tokens: int | None = None,
        request_id: str | None = None,
        deadline: float | None = None,
        caller: Caller = ANYONE,
    ) -> GenerateRequest:
        """Check and complete what a client asked for. Raises ModelNotFound, InvalidRequest, PromptTooLong, Unavailable.

        default_max_tokens: None for the rest of the context. deadline: seconds from the submission on.
        """
        info = self._engine_info()
        for name in self.registry.adapters_of(model) or (model,):
            self.gate.check_name(caller, name)
        made = build_sampling(
            sampling,
            prompt_tokens=len(prompt),
            max_context=info.max_context - self.registry.virtual_tokens(model),
            vocab_size=info.vocab_size,
            default_max_tokens=default_max_tokens,
        )
        return GenerateRequest(
            request_id=request_id or secrets.token_hex(12),
            model=model,
            prompt=tuple(prompt),
            sampling=made.params,
            n=made.n,
            stop=made.stop,
            include_stop=made.include_stop,
            deadline=deadline,
            priority=made.priority,
            caller=caller,
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta | Finish, None]:
        """Stream the answer: deltas of the n choices interleaved, one Finish each. Errors of the tree are raised.

        Nothing is submitted before the first `__anext__`, which checks, resolves the name and admits: ModelNotFound,
        Overloaded, Unavailable and InvalidRequest come before the first item. Closing the iterator (`aclose`) cancels
        the rows at once.
        """
        try:
            self._check_open()
            await self.registry.prepare(request.model)
            answer = self._begin(request)
        except AdaplexError as error:
            self._refuse(error, request.model)
            raise
        try:
            while answer.open:
                for item in answer.read(await answer.take()):
                    if isinstance(item, AdaplexError):
                        raise item
                    yield item
        except AdaplexError as error:
            answer.outcome = reason_of(error)
            raise
        finally:
            self._end(answer)

    def _begin(self, request: GenerateRequest) -> Answer:
        """Admit and submit, or raise with nothing begun."""
        self._check_open()
        link, info = self._engine.link(), self._engine_info()
        model, revision = request.model, self.registry.resolve(request.model)
        _check(request, info)
        places = self.places
        if request.n > places:
            raise InvalidRequest(f"n is {request.n}, but this server takes {places} rows at once", param="n")
        self._room.check(model, request.n, places)
        lease = self.gate.admit(request.caller, self.registry.adapters_of(model), len(request.prompt))
        answer = Answer(request, link, self.text, self.metrics.series(model), lease, self.settings.row_buffer)
        for _ in range(request.n):
            self._room.begin(model)
            if revision is not None:
                self.registry.begin_use(model, revision)

        def row_ended() -> None:
            self._room.end(model)
            if revision is not None:
                self.registry.end_use(model, revision)

        if self.settings.tracer is not None:
            answer.trace = self.settings.tracer.begin(request, answer.began)
        self._answers.add(answer)
        self._idle.clear()
        weight = self.settings.adapter_weights.get(model, 1.0)
        answer.submit(revision, self.registry.virtual_tokens(model), self._engine.next_row, row_ended, weight)
        return answer

    def _refuse(self, error: AdaplexError, model: str) -> None:
        self.metrics.refused(error, model if self.registry.kind(model) else None)

    def _check_open(self) -> None:
        if self._phase == "draining":
            raise Unavailable("the server is shutting down; try again", retry_after=DRAIN_RETRY_SECONDS)

    def _end(self, answer: Answer) -> None:
        answer.close()
        answer.lease.release()
        seconds = time.monotonic() - answer.began
        if answer.outcome in _ANSWERED:
            self._room.answered(seconds)
        answer.series.ended(answer.outcome)
        answer.series.whole_request.observe(seconds)
        if answer.trace is not None:
            answer.trace.end(answer.outcome, answer.rows)
        self._answers.discard(answer)
        if not self._answers:
            self._idle.set()

    # ---- what it tells -----------------------------------------------------------------------------------------------

    def _engine_info(self) -> EngineInfo:
        info = self._engine.state.info
        if info is None or self._phase == "starting":
            raise Unavailable("the server is starting; try again in a moment", retry_after=self._engine.retry_after)
        return info

    def info(self) -> ServiceInfo:
        """The server as a whole."""
        engine = self._engine.state
        state: ServiceState = self._phase
        if state == "ready" and engine.phase != "ready":
            state = "failed" if engine.phase == "failed" else "starting"
        return ServiceInfo(
            base=self.settings.engine.base_name,
            aliases=self.settings.aliases,
            state=state,
            detail=self._problem or engine.detail,
            progress=engine.progress,
            restarts=engine.restarts,
            started=self._started,
            engine=engine.info,
        )

    async def scrape(self) -> tuple[bytes, str]:
        """What Prometheus reads, and its media type."""
        try:
            training = await asyncio.to_thread(self.training.figures)
        except AdaplexError as error:
            log.warning("training jobs are left out of the metrics: %s", error)
            training = None
        return self.metrics.exposition(training)

    def _rows_in_flight(self) -> list[RowInFlight]:
        return [
            RowInFlight(answer.request.model, self.registry.kind(answer.request.model) or "unloaded", row.first > 0)
            for answer in self._answers
            for row in answer.rows
            if not row.ended
        ]

    def stats(self) -> EngineStats:
        """The engine's latest figures; zeros while there is no engine."""
        link = self._engine.running
        return link.stats if link and link.stats else NO_STATS


def _default_training(settings: ServiceSettings) -> TrainingSettings:
    engine = settings.engine
    return TrainingSettings(
        folder=settings.data_dir / "training", base=Path(engine.base), base_name=engine.base_name, device=engine.device
    )


def _is_short(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a conversation is small enough for the event loop; contents in parts are not worth counting."""
    if len(messages) > 64:
        return False
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    return sum(len(text) if isinstance(text, str) else THREAD_CHARS for text in contents if text) <= THREAD_CHARS


def _check(request: GenerateRequest, info: EngineInfo) -> None:
    """What would harm the engine, whoever made the request."""
    if not 1 <= request.n <= MAX_CHOICES:
        raise InvalidRequest(f"n must lie in [1, {MAX_CHOICES}], got {request.n}", param="n")
    prompt = request.prompt
    if not prompt:
        raise InvalidRequest("the prompt is empty: send at least one token", param="prompt")
    if min(prompt) < 0 or max(prompt) >= info.vocab_size:
        raise InvalidRequest(f"token ids of the prompt must lie in [0, {info.vocab_size - 1}]", param="prompt")
