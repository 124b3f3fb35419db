"""A service without an engine whose answers show which model and prompt they belong to, behind a real HTTP server.

A token is one UTF-8 byte (id = byte), 256 is the end token, 257 also decodes to "A": two tokens with one text. What
happens to a request is decided by the name of the model that it asks for.
"""

from __future__ import annotations

import asyncio
import codecs
import math
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from adaplex_adapters.catalogue import Lineage
from adaplex_adapters.errors import (
    AdaplexError,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    Overloaded,
    RowFailed,
    Unavailable,
)
from adaplex_adapters.names import check_name
from adaplex_server.caller import ANYONE, Caller, Limits
from adaplex_server.engine.messages import EngineInfo
from adaplex_server.http_api.server import HttpServer, bind
from adaplex_server.http_api.settings import HttpSettings
from adaplex_server.service.access.gate import Gate
from adaplex_server.service.composed_name import NamedPart
from adaplex_server.service.limits import SamplingRequest, build_sampling
from adaplex_server.service.types import AdapterInfo, ServiceInfo
from adaplex_server.vocabulary import Delta, Finish, GenerateRequest, TokenLogprob

BASE = "org/base"
CONTEXT = 4096
END, TWIN = 256, 257
ENGINE = EngineInfo(
    pid=1,
    device="cpu",
    dtype="float32",
    base_format="none",
    max_context=CONTEXT,
    max_rows=8,
    max_waiting=8,
    page_size=16,
    total_pages=64,
    base_bytes=1,
    vocab_size=300,
)
BEHAVIOURS = ("slow", "silent", "full", "down", "breaks", "breaks-late", "bug", "bug-late", "ends-at-once", "unicode")


class FakeText:
    """One token a byte."""

    tool_format: Any = None

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        return list(text.encode())

    def chat(self, messages: Sequence[Mapping[str, Any]], **_: Any) -> list[int]:
        if messages[-1]["role"] == "assistant":
            raise InvalidRequest("the chat template refuses these messages", param="messages")
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return b"".join(self.token_bytes(one) for one in ids).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        return {END: b"<end>", TWIN: b"A"}.get(token) or (bytes([token]) if token < 256 else b"")

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode("utf-8", "replace")


def logprob(token: int, most: int | None) -> TokenLogprob:
    """ "A" is never the best choice: its twin is. Every other token is."""
    if token == ord("A"):
        top = ((TWIN, -0.25), (token, -1.5))
        return TokenLogprob(token, -1.5, top[: most or 0])
    return TokenLogprob(token, -0.5, ((token, -0.5), (ord("z"), -2.0), (END, -math.inf))[: most or 0])


class FakeRegistry:
    """Adapters in a dictionary."""

    def __init__(self) -> None:
        self.adapters: dict[str, AdapterInfo] = {}
        self.uploaded: dict[str, dict[str, bytes]] = {}
        self.stagings: list[Path] = []

    def add(self, name: str, source: str = "folder") -> AdapterInfo:
        info = AdapterInfo(name, "ab" * 32, "lora", 8, ("q_proj",), 123, 456, BASE, source, 1.7e9, "ready")
        self.adapters[name] = info
        return info

    def list(self) -> tuple[AdapterInfo, ...]:
        return tuple(self.adapters.values())

    def describe(self, name: str) -> AdapterInfo:
        if name not in self.adapters:
            raise ModelNotFound(f"no model {name!r:.100}; there are {', '.join([BASE, *self.adapters])}", param="model")
        return self.adapters[name]

    @contextmanager
    def staging(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            self.stagings.append(Path(folder))
            yield Path(folder)

    async def upload(self, name: str, staging: Path) -> AdapterInfo:
        self.uploaded[name] = {one.name: one.read_bytes() for one in sorted(staging.iterdir())}
        return self.add(name, "upload")

    async def compose(self, name: str, parts: Sequence[NamedPart]) -> AdapterInfo:
        lineage = tuple(Lineage(part.name, part.weight, self.describe(part.name).revision) for part in parts)
        self.adapters[name] = replace(self.add(name, "composition"), parts=lineage, virtual_tokens=7)
        return self.adapters[name]

    async def load_path(self, name: str, path: str) -> AdapterInfo:
        if "inside" not in path:
            raise InvalidRequest("lora_path must lie inside the adapter folder", param="lora_path")
        return self.add(check_name(name))

    async def unload(self, name: str) -> AdapterInfo:
        if name not in self.adapters:
            raise NotFound(f"no adapter {name!r:.100}")
        return self.adapters.pop(name)


class FakeService:
    """Answers `[model|prompt|choice]`, a token at a time; knows what is running."""

    def __init__(self) -> None:
        self.text = FakeText()
        self.gate = Gate(None, Limits())
        self.training: Any = None
        self.registry = FakeRegistry()
        self.running: list[GenerateRequest] = []
        self.asked: list[GenerateRequest] = []
        self.most = 0
        self.places = 320
        self.status = ServiceInfo(BASE, ("base",), "ready", "", 1.0, 0, 1.7e9, ENGINE)
        for name in ("alpha", "beta", *BEHAVIOURS):
            self.registry.add(name)

    async def scrape(self) -> tuple[bytes, str]:
        return b"adaplex_up 1\n", "text/plain; version=0.0.4; charset=utf-8"

    def info(self) -> ServiceInfo:
        return self.status

    async def check(self, constraint: Any) -> None:
        pass

    def check_room(self, *, model: str) -> None:
        pass

    async def encode(self, text: str, *, add_special: bool = True) -> tuple[int, ...]:
        return tuple(self.text.encode(text))

    async def chat(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> tuple[int, ...]:
        return tuple(self.text.chat(messages, **more))

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
        self.gate.check_name(caller, model)
        if model not in (BASE, "base"):
            self.registry.describe(model)
        if any(not 0 <= one < ENGINE.vocab_size for one in prompt):
            raise InvalidRequest("a token id is outside the vocabulary", param="prompt")
        made = build_sampling(
            sampling,
            prompt_tokens=len(prompt),
            max_context=CONTEXT,
            vocab_size=ENGINE.vocab_size,
            default_max_tokens=default_max_tokens,
        )
        return GenerateRequest(
            request_id=request_id or "r",
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
        self.running.append(request)
        self.most = max(self.most, sum(one.n for one in self.running))
        self.asked.append(request)
        try:
            refusal: dict[str, AdaplexError] = {
                "full": Overloaded("the queue is full", retry_after=2.5),
                "down": Unavailable("the engine is starting"),
                "breaks": RowFailed("this row is not finite"),
            }
            if request.model in refusal:
                raise refusal[request.model]
            if request.model == "bug":
                raise KeyError("secret")
            if request.model == "silent":
                await asyncio.sleep(3600)
            rows = [self._row(request, index) for index in range(request.n)]
            while rows:
                for row in list(rows):
                    try:
                        yield next(row)
                    except StopIteration:
                        rows.remove(row)
                await asyncio.sleep(0.02 if request.model == "slow" else 0)
        finally:
            self.running.remove(request)

    def _row(self, request: GenerateRequest, index: int) -> Iterator[Delta | Finish]:
        wish = request.sampling
        prompt = self.text.decode(request.prompt)
        said = "héllo 🦜" if request.model == "unicode" else f"[{request.model}|{prompt}|{index}]"
        tokens = [*(said * 100 if request.model == "slow" else said).encode()][: wish.max_tokens]
        if request.model == "ends-at-once":
            tokens = []
        reason, stop = ("length", None) if len(tokens) == wish.max_tokens else ("stop", END)
        heard = None
        if wish.prompt_logprobs is not None:
            heard = (None, *(logprob(one, wish.prompt_logprobs) for one in request.prompt[1:]))
        decoder, pending = codecs.getincrementaldecoder("utf-8")("replace"), []
        if not tokens and heard is not None:
            yield Delta(index=index, text="", prompt_logprobs=heard)
        for i, token in enumerate(tokens):
            if request.model == "breaks-late" and i == 3:
                raise RowFailed("this row is not finite")
            if request.model == "bug-late" and i == 3:
                raise KeyError("secret")
            pending.append(token)
            text = decoder.decode(bytes([token]), final=i == len(tokens) - 1)
            if text or i == len(tokens) - 1:
                chances = () if wish.logprobs is None else tuple(logprob(one, wish.logprobs) for one in pending)
                ids, pending = tuple(pending), []
                yield Delta(
                    index=index,
                    text=text,
                    token_ids=ids,
                    logprobs=chances,
                    prompt_logprobs=heard if i == len(ids) - 1 else None,
                )
        ended = wish.logprobs is not None and stop is not None
        yield Finish(
            index=index,
            reason=reason,
            prompt_tokens=len(request.prompt),
            completion_tokens=len(tokens),
            cached_tokens=3,
            stop_logprob=TokenLogprob(END, -0.125, ((END, -0.125),)[: wish.logprobs]) if ended else None,
        )

    def become(self, **changes: Any) -> None:
        """Change what info() says."""
        self.status = replace(self.status, **changes)


SETTINGS = HttpSettings(max_body_bytes=200_000, max_upload_bytes=500_000, max_prompts=40, batch_width=4)


@contextmanager
def running_server(service: Any, settings: HttpSettings) -> Iterator[str]:
    """A server in a thread of its own; yields its address."""
    listening = bind("127.0.0.1", 0)
    server = HttpServer(service, listening, settings)
    address = f"http://127.0.0.1:{server.port}"

    async def live() -> None:
        if service.training:
            await service.training.open()
        try:
            await server.run()
        finally:
            if service.training:
                await service.training.close()

    def serve() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(live())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield address
    finally:
        server.stop()
        thread.join(timeout=20)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def serve() -> Callable[[Any, HttpSettings], Any]:
    return running_server


@pytest.fixture
def address(service: FakeService) -> Iterator[str]:
    with running_server(service, SETTINGS) as url:
        yield url
    assert service.running == [], "rows were left running"
    assert not any(one.exists() for one in service.registry.stagings), "a staging folder was left"


@pytest.fixture
def client(address: str) -> Iterator[Any]:
    from openai import OpenAI

    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=20) as made:
        yield made


@pytest.fixture
def http(address: str) -> Iterator[Any]:
    import httpx

    with httpx.Client(base_url=address, timeout=20) as made:
        yield made
