"""/v1/chat/completions"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from adaplex_adapters.errors import InvalidRequest
from adaplex_server.http_api.body import read_model
from adaplex_server.http_api.choices import Choice, UsageSoFar, finish_reason, gather, merged, usage
from adaplex_server.http_api.context import RequestContext, context_of
from adaplex_server.http_api.disconnect import while_connected
from adaplex_server.http_api.event_stream import DONE, event, open_stream
from adaplex_server.http_api.operation import Operation, json_response
from adaplex_server.http_api.schemas.answers import (
    AnswerMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatFinishReason,
    ChatLogprobs,
)
from adaplex_server.http_api.schemas.chat import ChatCompletionRequest
from adaplex_server.http_api.settings import HttpSettings
from adaplex_server.http_api.time_limit import time_limit
from adaplex_server.http_api.tokens import chat_logprobs, prompt_logprobs
from adaplex_server.http_api.tool_use import ToolTeller, tool_use
from adaplex_server.service.service import Service
from adaplex_server.service.tool_use import ToolUse
from adaplex_server.vocabulary import Delta, Finish, GenerateRequest, TokenLogprob


class ChatCompletions:
    """Conversations, answered whole or as a stream."""

    def __init__(self, service: Service, settings: HttpSettings) -> None:
        self._service = service
        self._settings = settings

    def operations(self) -> tuple[Operation, ...]:
        """What is served here."""
        return (
            Operation(
                method="POST",
                path="/v1/chat/completions",
                handler=self.create,
                summary="Continue a conversation with the base or an adapter",
                body=ChatCompletionRequest,
                answer=ChatCompletion,
                event=ChatCompletionChunk,
                errors=(400, 404, 413, 429, 500, 503, 504),
            ),
        )

    async def create(self, request: Request) -> Response:
        """Answer one conversation."""
        limits = self._settings
        body = await read_model(request, ChatCompletionRequest, limits.max_body_bytes, limits.body_idle)
        context = context_of(request.scope)
        context.model = body.model
        self._service.check_room(model=body.model)
        tools = tool_use(body, self._service.text.tool_format) if body.tools else None
        asked = await self._request(body, tools, context, time_limit(request))
        if body.stream:
            return await open_stream(request, self._chunks(body, tools, asked), limits)
        return json_response(await while_connected(request.receive, self._whole(body, tools, asked)))

    async def _request(
        self, body: ChatCompletionRequest, tools: ToolUse | None, context: RequestContext, deadline: float | None
    ) -> GenerateRequest:
        try:
            constraint = body.constraint if tools is None else tools.constraint
            await self._service.check(constraint)
            prompt = await self._service.chat(
                [message.templated() for message in body.messages],
                tools=tools.told if tools else None,
            )
            return self._service.request(
                model=body.model,
                prompt=prompt,
                sampling=body.sampling(
                    max_tokens=body.answer_tokens, logprobs=body.alternatives, constraint=constraint
                ),
                request_id=context.request_id,
                deadline=deadline,
                caller=context.caller,
            )
        except InvalidRequest as error:
            if error.param == "prompt":  # the service's word for it
                error.param = "messages"
            raise

    async def _whole(
        self, body: ChatCompletionRequest, tools: ToolUse | None, asked: GenerateRequest
    ) -> ChatCompletion:
        events = merged([lambda: self._service.generate(asked)], 1)
        choices = (await gather(events, 1, asked.n))[0]
        return ChatCompletion(
            id=_new_id(),
            created=int(time.time()),
            model=body.model,
            choices=[self._choice(body, tools, i, choice) for i, choice in enumerate(choices)],
            usage=usage((0, choice.finish) for choice in choices),
            **self._of_prompt(body, asked, choices[0].prompt_logprobs),
        )

    def _choice(self, body: ChatCompletionRequest, tools: ToolUse | None, index: int, choice: Choice) -> ChatChoice:
        text, teller = "".join(choice.text), ToolTeller(tools) if tools else None
        return ChatChoice(
            index=index,
            message=teller.message(text) if teller else AnswerMessage(text),
            logprobs=self._logprobs(body, choice.logprobs),
            finish_reason=_reason(choice.finish, teller),
            stop_reason=choice.finish.matched_stop,
            token_ids=choice.token_ids if body.return_token_ids else UNSET,
        )

    def _logprobs(
        self, body: ChatCompletionRequest, tokens: list[TokenLogprob] | tuple[TokenLogprob, ...]
    ) -> ChatLogprobs | None:
        return chat_logprobs(self._service.text, tokens) if body.logprobs else None

    def _of_prompt(self, body: ChatCompletionRequest, asked: GenerateRequest, logprobs: Any) -> dict[str, Any]:
        """The fields about the prompt, as far as they were asked for."""
        told: dict[str, Any] = {}
        if body.prompt_logprobs is not None and logprobs is not None:
            told["prompt_logprobs"] = prompt_logprobs(self._service.text, logprobs, body.prompt_logprobs)
        if body.return_token_ids:
            told["prompt_token_ids"] = list(asked.prompt)
        return told

    async def _chunks(
        self, body: ChatCompletionRequest, tools: ToolUse | None, asked: GenerateRequest
    ) -> AsyncGenerator[bytes, None]:
        """The stream's events: role, deltas, finish for each choice, then usage if wanted, then [DONE]."""
        so_far = UsageSoFar([asked.prompt], wanted=body.wants_usage, so_far=body.wants_usage_so_far)
        write = _ChunkWriter(body, so_far)
        started: set[int] = set()
        tellers = [ToolTeller(tools) if tools else None for _ in range(asked.n)]
        finishes: list[Finish] = []
        async with aclosing(self._service.generate(asked)) as events:
            async for one in events:
                so_far.add(one)
                out = b""
                if one.index not in started:
                    about_prompt = {}
                    if not started:
                        seen = one.prompt_logprobs if isinstance(one, Delta) else None
                        about_prompt = self._of_prompt(body, asked, seen)
                    started.add(one.index)
                    role = ChatChunkChoice(one.index, ChatDelta(role="assistant", content=""))
                    out = write([role], **about_prompt)
                if isinstance(one, Finish):
                    finishes.append(one)
                    out += b"".join(write([choice]) for choice in _last(one, tellers[one.index]))
                elif one.text or one.logprobs or (body.return_token_ids and one.token_ids):
                    out += b"".join(write([choice]) for choice in self._next(body, one, tellers[one.index]))
                if len(finishes) == asked.n:
                    break
                if out:
                    yield out
        tail = write([], usage=usage((0, one) for one in finishes)) if body.wants_usage else b""
        yield out + tail + DONE

    def _next(self, body: ChatCompletionRequest, delta: Delta, teller: ToolTeller | None) -> Iterator[ChatChunkChoice]:
        """What a delta tells; tokens are told with its first chunk, even if their text is held back."""
        deltas = teller.deltas(delta.text) if teller else [ChatDelta(content=delta.text)]
        logprobs = self._logprobs(body, delta.logprobs)
        ids = list(delta.token_ids) if body.return_token_ids else UNSET
        if deltas or logprobs or ids:
            first, *more = deltas or [ChatDelta()]
            yield ChatChunkChoice(delta.index, first, logprobs=logprobs, token_ids=ids)
            yield from (ChatChunkChoice(delta.index, one) for one in more)


class _ChunkWriter:
    """Makes events with the stream's id, time and model."""

    def __init__(self, body: ChatCompletionRequest, so_far: UsageSoFar) -> None:
        self._id = _new_id()
        self._created = int(time.time())
        self._model = body.model
        self._so_far = so_far

    def __call__(self, choices: list[ChatChunkChoice], **more: Any) -> bytes:
        fields = {"usage": self._so_far.told, **more}
        chunk = ChatCompletionChunk(self._id, self._created, self._model, choices, **fields)
        return event(msgspec.json.encode(chunk))


def _last(finish: Finish, teller: ToolTeller | None) -> Iterator[ChatChunkChoice]:
    """The end of a choice, after what was held back of it."""
    held = teller.deltas("", last=True) if teller else []
    yield from (ChatChunkChoice(finish.index, one) for one in held)
    reason = _reason(finish, teller)
    yield ChatChunkChoice(finish.index, ChatDelta(), finish_reason=reason, stop_reason=finish.matched_stop)


def _reason(finish: Finish, teller: ToolTeller | None) -> ChatFinishReason:
    reason = finish_reason(finish)
    return "tool_calls" if teller and teller.called and reason == "stop" else reason


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"
