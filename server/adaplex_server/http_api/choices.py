"""Gathers what the service streams into whole choices, and several prompts' streams into one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType

from adaplex_adapters.errors import InternalError
from adaplex_server.http_api.disconnect import stop
from adaplex_server.http_api.schemas.answers import FinishReason, PromptTokensDetails, Usage
from adaplex_server.vocabulary import Delta, Finish, TokenLogprob

Event = Delta | Finish
Stream = AsyncGenerator[Event, None]


@dataclass
class Choice:
    """One answer so far; owned by whoever gathers it."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprob | None] | None = None
    end: Finish | None = None

    def add(self, event: Event) -> None:
        """Take the next event of this choice."""
        if isinstance(event, Finish):
            self.end = event
            return
        self.text.append(event.text)
        self.token_ids.extend(event.token_ids)
        self.logprobs.extend(event.logprobs)
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs

    @property
    def finish(self) -> Finish:
        """The final word, which the service has promised for each choice."""
        if self.end is None:
            raise InternalError("The answer ended without its final message; retry the request.")
        return self.end


def finish_reason(finish: Finish) -> FinishReason:
    """As OpenAI tells it. Other reasons are raised as errors by the service and cannot come here."""
    if finish.reason not in ("stop", "length"):
        raise InternalError(f"The answer ended with '{finish.reason}'; retry the request.")
    return finish.reason


def usage(finishes: Iterable[tuple[int, Finish]]) -> Usage:
    """Usage of pairs (prompt number, final word): a prompt counts once, whatever n."""
    prompts: dict[int, Finish] = {}
    generated = 0
    for prompt, finish in finishes:
        if prompt not in prompts or finish.index == 0:
            prompts[prompt] = finish
        generated += finish.completion_tokens
    asked = sum(one.prompt_tokens for one in prompts.values())
    cached = sum(one.cached_tokens for one in prompts.values())
    return Usage(asked, generated, asked + generated, PromptTokensDetails(cached))


class UsageSoFar:
    """What the chunks of a stream tell of the usage: nothing, null, or the tokens so far, whose count it owns."""

    def __init__(self, prompts: Iterable[Sequence[int]], *, wanted: bool, so_far: bool) -> None:
        self._prompt = sum(map(len, prompts))
        self._generated = 0
        self._wanted = wanted
        self._so_far = so_far

    def add(self, event: Event) -> None:
        """The next event of the stream."""
        if isinstance(event, Delta):
            self._generated += len(event.token_ids)

    @property
    def told(self) -> Usage | UnsetType | None:
        """For the next chunk."""
        if not self._so_far:
            return None if self._wanted else UNSET
        total = self._prompt + self._generated
        return Usage(self._prompt, self._generated, total, PromptTokensDetails(0))


async def gather(streams: AsyncGenerator[tuple[int, Event], None], prompts: int, n: int) -> list[list[Choice]]:
    """Everything at once: choices[prompt][answer]."""
    choices = [[Choice() for _ in range(n)] for _ in range(prompts)]
    async with aclosing(streams):
        async for prompt, event in streams:
            choices[prompt][event.index].add(event)
    return choices


async def merged(starts: Sequence[Callable[[], Stream]], width: int) -> AsyncGenerator[tuple[int, Event], None]:
    """Events of several streams as they come, each with its stream's number; at most `width` streams run at once.

    The first error ends all of them. Closing this generator closes them before it returns.
    """
    if len(starts) == 1:
        async with aclosing(starts[0]()) as only:
            async for event in only:
                yield 0, event
        return
    queue: asyncio.Queue[tuple[int, Event] | BaseException | None] = asyncio.Queue(maxsize=4 * width)
    numbered = iter(enumerate(starts))

    async def work() -> None:
        try:
            for number, start in numbered:
                async with aclosing(start()) as stream:
                    async for event in stream:
                        await queue.put((number, event))
            await queue.put(None)
        except Exception as error:  # told to the reader, who raises it
            await queue.put(error)

    workers = [asyncio.ensure_future(work()) for _ in range(min(width, len(starts)))]
    try:
        running = len(workers)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for worker in workers:
            worker.cancel()
        for worker in workers:
            await stop(worker)
