"""The one place that answers requests: both skins (HTTP and gRPC) talk to a `Service` and to nothing below it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from adaplex_server.engine.messages import EngineStats
from adaplex_server.service.limits import SamplingRequest
from adaplex_server.service.settings import ServiceSettings
from adaplex_server.service.types import AdapterInfo, ServiceInfo
from adaplex_server.vocabulary import Delta, Finish, GenerateRequest


class TextCodec(Protocol):
    """Text to token ids and back (becomes `service.text_codec.TextCodec`)."""

    def encode(self, text: str, *, add_special: bool = False) -> list[int]: ...
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...
    def token_text(self, token: int) -> str: ...
    def token_bytes(self, token: int) -> bytes: ...


class Registry(Protocol):
    """Names -> revisions (becomes `service.registry.Registry`)."""

    def list(self) -> tuple[AdapterInfo, ...]: ...
    def describe(self, name: str) -> AdapterInfo: ...
    def staging(self) -> AbstractContextManager[Path]: ...
    async def upload(self, name: str, staging: Path) -> AdapterInfo: ...
    async def load_folder(self, name: str, folder: Path) -> AdapterInfo: ...
    async def load_path(self, name: str, path: str) -> AdapterInfo: ...
    async def unload(self, name: str) -> AdapterInfo: ...


class Metrics(Protocol):
    """Counters and histograms (becomes `service.metrics.Metrics`)."""

    def exposition(self) -> tuple[bytes, str]: ...


class Service(Protocol):
    """Made with `Service(settings, progress=None)`; progress(text, fraction) is called while the base is loaded.

    A skin's way of a request: `await encode` or `await chat` -> `request(...)` -> `generate(...)`.
    """

    settings: ServiceSettings
    text: TextCodec
    registry: Registry
    metrics: Metrics

    async def start(self) -> None:
        """Start the engine, open the catalogue, register the adapter folder. Raises StartupError."""

    async def drain(self, timeout: float | None = None) -> None:
        """Refuse new requests (Unavailable with a hint), let running ones finish for `timeout` seconds, then cancel
        them."""

    async def close(self) -> None:
        """End the engine and close everything; running requests end with Unavailable."""

    async def encode(self, text: str, *, add_special: bool = True) -> tuple[int, ...]:
        """Token ids of a plain prompt; long texts are tokenized off the event loop.

        Raises InvalidRequest, RequestTooLarge.
        """

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[int, ...]:
        """Token ids of a conversation through the chat template. Raises InvalidRequest."""

    def request(
        self,
        *,
        model: str,
        prompt: Sequence[int],
        sampling: SamplingRequest,
        default_max_tokens: int | None = None,
        request_id: str | None = None,
        deadline: float | None = None,
    ) -> GenerateRequest:
        """Check and complete what a client asked for.

        Raises ModelNotFound, InvalidRequest, PromptTooLong, Unavailable.
        """

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta | Finish, None]:
        """Stream the answer: deltas of the n choices interleaved, one Finish each. Errors of the tree are raised.

        Nothing is submitted before the first `__anext__`, which validates, resolves the name and admits
        (ModelNotFound, Overloaded, Unavailable, InvalidRequest come before the first item). Closing the iterator
        (`aclose`) cancels the rows at once.
        """

    def info(self) -> ServiceInfo: ...

    def stats(self) -> EngineStats: ...
