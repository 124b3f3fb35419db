"""Between the protobuf messages and the internal vocabulary. Pure functions; no rule of the API is decided here."""

from __future__ import annotations

from adaplex_adapters.errors import InternalError
from adaplex_proto.v1 import adaplex_pb2 as pb
from adaplex_server.service.types import AdapterInfo
from adaplex_server.vocabulary import Delta, Finish, TokenLogprob

REASONS = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


def adapter_message(info: AdapterInfo) -> pb.Adapter:
    """What List, Describe and Load tell about an adapter."""
    return pb.Adapter(
        name=info.name,
        revision=info.revision,
        kind=info.kind,
        rank=info.rank,
        targets=info.targets,
        size_bytes=info.nbytes,
        parameters=info.parameters,
        base_model=info.base_model,
        source=info.source,
        created=info.created,
        state=info.state,
        running=info.running,
        reason=info.reason,
        virtual_tokens=info.virtual_tokens,
        bottleneck_size=info.bottleneck_size,
        parts=[pb.AdapterPart(adapter=one.name, weight=one.weight, revision=one.revision) for one in info.parts],
    )


def event_message(event: Delta | Finish) -> pb.GenerateResponse:
    """One event of a stream."""
    if isinstance(event, Delta):
        return pb.GenerateResponse(delta=_delta(event))
    return pb.GenerateResponse(finish=_finish(event))


def _delta(delta: Delta) -> pb.Delta:
    return pb.Delta(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=[_logprob(token) for token in delta.logprobs],
        prompt_logprobs=[_logprob(token) for token in delta.prompt_logprobs or () if token is not None],
    )


def _logprob(token: TokenLogprob) -> pb.TokenLogprob:
    top = [pb.Alternative(token_id=token_id, logprob=logprob) for token_id, logprob in token.top]
    return pb.TokenLogprob(token_id=token.token_id, logprob=token.logprob, top=top)


def _finish(finish: Finish) -> pb.Finish:
    reason = REASONS.get(finish.reason)
    if reason is None:
        raise InternalError(f"a stream finished with the reason '{finish.reason}', which has no wire form")
    message = pb.Finish(
        index=finish.index,
        reason=reason,
        prompt_tokens=finish.prompt_tokens,
        completion_tokens=finish.completion_tokens,
        cached_tokens=finish.cached_tokens,
    )
    if isinstance(finish.matched_stop, str):
        message.stop = finish.matched_stop
    elif finish.matched_stop is not None:
        message.stop_token_id = finish.matched_stop
    return message
