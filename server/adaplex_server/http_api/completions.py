"""/v1/completions: prompts continued or only scored. What lm-eval's local-completions reads is this."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.http_api.body import read_model
from adaplex_server.http_api.choices import Choice, Event, UsageSoFar, finish_reason, gather, merged, usage
from adaplex_server.http_api.completion_choice import ChoiceWriter
from adaplex_server.http_api.context import RequestContext, context_of
from adaplex_server.http_api.disconnect import while_connected
from adaplex_server.http_api.event_stream import DONE, event, open_stream
from adaplex_server.http_api.operation import Operation, json_response
from adaplex_server.http_api.schemas.answers import Completion, TextChoice
from adaplex_server.http_api.schemas.completions import CompletionRequest, Prompt
from adaplex_server.http_api.settings import HttpSettings
from adaplex_server.http_api.time_limit import time_limit
from adaplex_server.service.service import Service
from adaplex_server.vocabulary import Finish, GenerateRequest

DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True)
class _Asked:
    """One prompt: what the service is asked, and the prompt as the client wrote it."""

    request: GenerateRequest
    prompt: Prompt


class Completions:
    """Plain prompts, answered whole or as a stream."""

    def __init__(self, service: Service, settings: HttpSettings) -> None:
        self._service = service
        self._settings = settings

    def operations(self) -> tuple[Operation, ...]:
        """What is served here."""
        return (
            Operation(
                method="POST",
                path="/v1/completions",
                handler=self.create,
                summary="Continue or score prompts with the base or an adapter",
                body=CompletionRequest,
                answer=Completion,
                event=Completion,
                errors=(400, 404, 413, 429, 500, 503, 504),
            ),
        )

    async def create(self, request: Request) -> Response:
        """Answer one or several prompts."""
        limits = self._settings
        body = await read_model(request, CompletionRequest, limits.max_body_bytes, limits.body_idle)
        context = context_of(request.scope)
        context.model = body.model
        self._service.check_room(model=body.model)
        asked = await self._requests(body, context, time_limit(request))
        if body.stream:
            return await open_stream(request, self._chunks(body, asked), limits)
        return json_response(await while_connected(request.receive, self._whole(body, asked)))

    async def _requests(self, body: CompletionRequest, context: RequestContext, deadline: float | None) -> list[_Asked]:
        """Every prompt is checked before the first one starts."""
        prompts = body.prompt
        if len(prompts) > self._settings.max_prompts:
            most = self._settings.max_prompts
            raise InvalidRequest(f"prompt holds {len(prompts)} prompts, at most {most} are allowed.", param="prompt")
        wishes = body.sampling(
            max_tokens=body.max_tokens,
            logprobs=body.logprobs,
            echo=bool(body.echo),
            prompt_logprobs=body.prompt_alternatives,
        )
        await self._service.check(body.constraint)
        begin = body.add_special_tokens is not False
        asked = []
        for i, prompt in enumerate(prompts):
            text = isinstance(prompt, str)
            ids = await self._service.encode(prompt, add_special=begin) if text else prompt
            made = self._service.request(
                model=body.model,
                prompt=ids,
                sampling=wishes,
                default_max_tokens=DEFAULT_MAX_TOKENS,
                request_id=context.request_id if len(prompts) == 1 else f"{context.request_id}-{i}",
                deadline=deadline,
                caller=context.caller,
            )
            asked.append(_Asked(made, prompt))
        return asked

    def _events(self, asked: Sequence[_Asked]) -> AsyncGenerator[tuple[int, Event], None]:
        starts = [partial(self._service.generate, one.request) for one in asked]
        # A batch alone must fit: with more choices fewer prompts are under way at once, and half of the room is enough.
        at_once = self._service.places // (2 * asked[0].request.n)
        return merged(starts, max(1, min(self._settings.batch_width, at_once)))

    async def _whole(self, body: CompletionRequest, asked: Sequence[_Asked]) -> Completion:
        n = asked[0].request.n
        choices = await gather(self._events(asked), len(asked), n)
        told = [
            self._choice(body, one, p * n + i, choice)
            for p, one in enumerate(asked)
            for i, choice in enumerate(choices[p])
        ]
        finishes = [(p, choice.finish) for p, row in enumerate(choices) for choice in row]
        return Completion(_new_id(), int(time.time()), body.model, told, usage=usage(finishes))

    def _writer(self, body: CompletionRequest, asked: _Asked, index: int) -> ChoiceWriter:
        return ChoiceWriter(self._service.text, body, asked.prompt, asked.request.prompt, index)

    def _choice(self, body: CompletionRequest, asked: _Asked, index: int, choice: Choice) -> TextChoice:
        return self._writer(body, asked, index).write(choice, choice.finish)

    async def _chunks(self, body: CompletionRequest, asked: Sequence[_Asked]) -> AsyncGenerator[bytes, None]:
        """The stream's events, choices interleaved; then usage if wanted, then [DONE]."""
        head = (_new_id(), int(time.time()), body.model)
        n = asked[0].request.n
        prompts = [one.request.prompt for one in asked]
        so_far = UsageSoFar(prompts, wanted=body.wants_usage, so_far=body.wants_usage_so_far)
        writers: dict[int, ChoiceWriter] = {}
        finishes: list[tuple[int, Finish]] = []
        async with aclosing(self._events(asked)) as events:
            async for p, one in events:
                index = p * n + one.index
                so_far.add(one)
                writer = writers.get(index) or writers.setdefault(index, self._writer(body, asked[p], index))
                new = Choice()
                new.add(one)
                if new.end is not None:
                    finish_reason(new.end)
                    finishes.append((p, new.end))
                told = writer.write(new, new.end)
                if told.text or told.logprobs or told.finish_reason or told.token_ids:
                    yield event(msgspec.json.encode(Completion(*head, [told], usage=so_far.told)))
        tail = b""
        if body.wants_usage:
            tail = event(msgspec.json.encode(Completion(*head, [], usage=usage(finishes))))
        yield tail + DONE


def _new_id() -> str:
    return f"cmpl-{uuid.uuid4().hex}"
