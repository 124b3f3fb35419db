"""`adaplex.v1.Inference`: generation as a stream, and the list of models."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing

import grpc

from adaplex_adapters.errors import InvalidRequest
from adaplex_proto.v1 import adaplex_pb2 as pb
from adaplex_proto.v1 import adaplex_pb2_grpc as pb_grpc
from adaplex_server.grpc_api.access import caller_of
from adaplex_server.grpc_api.constraints import constraint_of
from adaplex_server.grpc_api.errors import streaming, unary
from adaplex_server.grpc_api.tool_use import ToolTeller, templated, tool_use
from adaplex_server.grpc_api.translate import event_message
from adaplex_server.request_scope import open_scope
from adaplex_server.service.limits import SamplingRequest
from adaplex_server.service.service import Service
from adaplex_server.service.tool_use import ToolUse
from adaplex_server.vocabulary import Constraint, Delta, Finish

OPTIONAL_FIELDS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
    "prompt_logprobs",
)


class InferenceServicer(pb_grpc.InferenceServicer):
    """Owns nothing; every rule is the service's."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @streaming
    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Closing the inner generator (the client cancelled, or its deadline passed) cancels the rows at once."""
        sent = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        request_id = request.request_id or secrets.token_hex(12)
        open_scope(request_id, sent.get("traceparent", ""), sent.get("tracestate", ""))
        self._service.check_room(model=request.model)
        tools = tool_use(request.chat, self._service.text.tool_format) if request.HasField("chat") else None
        constraint = _constraint(request, tools)
        await self._service.check(constraint)
        wanted = self._service.request(
            model=request.model,
            prompt=await self._prompt(request, tools),
            sampling=sampling_request(request, constraint),
            request_id=request_id,
            deadline=context.time_remaining(),
            caller=caller_of(context, self._service.gate),
        )
        tellers = [ToolTeller(tools) for _ in range(wanted.n)] if tools else None
        async with aclosing(self._service.generate(wanted)) as events:
            async for event in events:
                for message in (event_message(event),) if tellers is None else _told(event, tellers[event.index]):
                    yield message

    @unary
    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        info = self._service.info()
        max_context = info.engine.max_context if info.engine else 0
        caller = caller_of(context, self._service.gate)
        bases = [name for name in (info.base, *info.aliases) if caller.may_name(name)]
        adapters = [a.name for a in self._service.registry.list() if a.servable and caller.may_name(a.name)]
        return pb.ListModelsResponse(
            models=[
                *(pb.Model(name=name, max_context=max_context) for name in bases),
                *(pb.Model(name=name, parent=info.base, max_context=max_context) for name in adapters),
            ]
        )

    async def _prompt(self, request: pb.GenerateRequest, tools: ToolUse | None) -> tuple[int, ...]:
        match request.WhichOneof("prompt"):
            case "text":
                return await self._service.encode(request.text)
            case "token_ids":
                return tuple(request.token_ids.ids)
            case "chat":
                messages = [templated(message) for message in request.chat.messages]
                return await self._service.chat(messages, tools=tools.told if tools else None)
        raise InvalidRequest("one of text, token_ids and chat must be set", param="prompt")


def _constraint(request: pb.GenerateRequest, tools: ToolUse | None) -> Constraint | None:
    wanted = constraint_of(request)
    if tools is None:
        return wanted
    if wanted is not None:
        raise InvalidRequest("constraint and tools exclude each other; send tool_choice MODE_NONE", param="constraint")
    return tools.constraint


def _told(event: Delta | Finish, teller: ToolTeller) -> Iterator[pb.GenerateResponse]:
    """What an event tells where tools may be called; its tokens are told with it, even if their text is held back."""
    message = event_message(event)
    if isinstance(event, Delta):
        teller.tell(message.delta)
    else:
        rest = teller.rest(event.index)
        if rest is not None:
            yield pb.GenerateResponse(delta=rest)
        if teller.called and event.reason == "stop":
            message.finish.reason = pb.FINISH_REASON_TOOL_CALLS
    yield message


def sampling_request(request: pb.GenerateRequest, constraint: Constraint | None = None) -> SamplingRequest:
    """What the client wrote about sampling; fields that it left out stay None. constraint: of the answer."""
    sampling = request.sampling
    given = {name: getattr(sampling, name) for name in OPTIONAL_FIELDS if sampling.HasField(name)}
    return SamplingRequest(
        **given,
        logit_bias=dict(sampling.logit_bias) or None,
        stop_token_ids=tuple(sampling.stop_token_ids) or None,
        ignore_eos=sampling.ignore_eos,
        stop=tuple(request.stop) or None,
        include_stop=request.include_stop,
        n=request.n or None,
        priority=request.priority,
        constraint=constraint,
    )
