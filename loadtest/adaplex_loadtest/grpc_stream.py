"""One streamed request over gRPC; the channel is shared."""

from __future__ import annotations

import time
from typing import Any

import grpc

from adaplex_loadtest.answered import Answered
from adaplex_proto.v1 import adaplex_pb2 as pb
from adaplex_proto.v1 import adaplex_pb2_grpc as pb_grpc


def message_of(body: dict[str, Any]) -> pb.GenerateRequest:
    """The request that an HTTP body of ours is, as a message."""
    sampling = {name: body[name] for name in ("temperature", "max_tokens", "min_tokens", "ignore_eos") if name in body}
    request = pb.GenerateRequest(model=body["model"], sampling=pb.Sampling(**sampling))
    if "messages" in body:
        request.chat.messages.extend(pb.ChatMessage(**message) for message in body["messages"])
    else:
        request.text = body["prompt"]
    return request


async def stream(
    channel: grpc.aio.Channel, body: dict[str, Any], told: Answered, timeout: float | None, hang_up: float | None = None
) -> None:
    """Send the request and fill in `told`. hang_up: seconds after which the client cancels."""
    began = last = time.perf_counter()
    try:
        limits = [seconds for seconds in (timeout, hang_up) if seconds is not None]
        call = pb_grpc.InferenceStub(channel).Generate(message_of(body), timeout=min(limits, default=None))
        async for event in call:
            now = time.perf_counter()
            if event.HasField("finish"):
                told.tokens = event.finish.completion_tokens
            elif event.delta.text:
                told.text += event.delta.text
                if told.first_token is None:
                    told.first_token = now - began
                else:
                    told.gaps.append(now - last)
                last = now
    except grpc.aio.AioRpcError as error:
        code = error.code().name
        told.error = "hung up" if code == "DEADLINE_EXCEEDED" and hang_up is not None else f"gRPC {code}"
    told.seconds = time.perf_counter() - began
