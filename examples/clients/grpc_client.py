"""Streams an answer over gRPC, with a deadline, and reads a rich error.

python examples/clients/grpc_client.py [127.0.0.1:50051] [MODEL] [TEXT]
"""

from __future__ import annotations

import sys

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from adaplex_proto.v1 import adaplex_pb2 as pb
from adaplex_proto.v1 import adaplex_pb2_grpc as pb_grpc


def main(address: str, model: str, text: str) -> int:
    """Print the answer as it comes; on an error print its code, message and details."""
    with grpc.insecure_channel(address) as channel:
        inference = pb_grpc.InferenceStub(channel)
        request = pb.GenerateRequest(
            model=model,
            chat=pb.Chat(messages=[pb.ChatMessage(role="user", content=text)]),
            sampling=pb.Sampling(temperature=0, max_tokens=64),
        )
        try:
            for event in inference.Generate(request, timeout=60):
                if event.HasField("delta"):
                    print(event.delta.text, end="", flush=True)
                else:
                    reason = pb.FinishReason.Name(event.finish.reason)
                    print(f"\n[{reason}, {event.finish.completion_tokens} tokens]")
        except grpc.RpcError as error:
            tell(error)
            return 1
    return 0


def tell(error: grpc.RpcError) -> None:
    """What the server said, with the hint when to try again."""
    print(f"{error.code().name}: {error.details()}", file=sys.stderr)
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(retry):
            print(f"try again in {retry.retry_delay.ToTimedelta().total_seconds()} s", file=sys.stderr)


if __name__ == "__main__":
    given = dict(enumerate(sys.argv[1:]))
    sys.exit(
        main(
            given.get(0, "127.0.0.1:50051"),
            given.get(1, "itn-en"),
            given.get(2, "Write the numbers as digits: she paid twenty three dollars and five cents"),
        )
    )
