"""The gRPC interface of a real server: streams, deadlines, cancellation, health, reflection, rich errors, adapters."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from running_server import RunningServer

from adaplex_proto.v1 import adaplex_pb2 as pb
from adaplex_proto.v1 import adaplex_pb2_grpc as pb_grpc

ROOT = Path(__file__).parents[2]
BASE = "smollm2-135m-instruct"


@pytest.fixture
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc) as opened:
        yield opened


@pytest.fixture
def inference(channel: grpc.Channel) -> pb_grpc.InferenceStub:
    return pb_grpc.InferenceStub(channel)


@pytest.fixture
def adapters(channel: grpc.Channel) -> pb_grpc.AdaptersStub:
    return pb_grpc.AdaptersStub(channel)


def ask(text: str, model: str = BASE, **sampling: object) -> pb.GenerateRequest:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content=text)])
    return pb.GenerateRequest(
        model=model, chat=chat, sampling=pb.Sampling(**{"temperature": 0, "max_tokens": 24, **sampling})
    )


def answer(events: Iterator[pb.GenerateResponse]) -> tuple[str, pb.Finish]:
    received = list(events)
    assert [e.WhichOneof("event") for e in received[:-1]] == ["delta"] * (len(received) - 1)
    return "".join(e.delta.text for e in received[:-1]), received[-1].finish


def test_http_and_grpc_give_the_same_text(server: RunningServer, inference: pb_grpc.InferenceStub) -> None:
    for model, text in ((BASE, "Name a colour."), ("itn-en", "forty two thousand and seven")):
        body = {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": 24,
        }
        over_http = httpx.post(f"{server.http}/v1/chat/completions", json=body, timeout=60).json()
        over_grpc, finish = answer(inference.Generate(ask(text, model)))
        assert over_grpc == over_http["choices"][0]["message"]["content"]
        assert finish.completion_tokens == over_http["usage"]["completion_tokens"]
        assert finish.prompt_tokens == over_http["usage"]["prompt_tokens"]


def test_choices_and_logprobs_are_streamed(inference: pb_grpc.InferenceStub) -> None:
    request = ask("Name a colour.", logprobs=2, temperature=1, seed=3, max_tokens=5, ignore_eos=True)
    request.n = 3
    events = list(inference.Generate(request))
    assert sorted(e.finish.index for e in events if e.HasField("finish")) == [0, 1, 2]
    for index in range(3):
        tokens = [t for e in events if e.HasField("delta") and e.delta.index == index for t in e.delta.logprobs]
        assert len(tokens) == 5
        assert all(t.logprob <= 0 and len(t.top) == 2 for t in tokens)


def test_a_seed_means_the_same_tokens(inference: pb_grpc.InferenceStub) -> None:
    request = ask("Tell me a story.", temperature=1, seed=11)
    first, _ = answer(inference.Generate(request))
    again, finish = answer(inference.Generate(request))
    assert first == again, "also when the prompt comes from the prefix cache"
    assert finish.cached_tokens > 0


def test_an_unknown_model_is_not_found_and_the_list_is_given(inference: pb_grpc.InferenceStub) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        list(inference.Generate(ask("x", "no-such-model")))
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND
    assert "itn-en" in raised.value.details()


def test_a_bad_field_is_named_in_the_details(inference: pb_grpc.InferenceStub) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        list(inference.Generate(ask("x", temperature=-1)))
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(raised.value)
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    assert bad.field_violations[0].field == "temperature"


def test_a_deadline_ends_the_stream_and_frees_the_row(server: RunningServer, inference: pb_grpc.InferenceStub) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        list(inference.Generate(ask("Tell me a story.", max_tokens=4000, ignore_eos=True), timeout=0.7))
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    server.wait_for("adaplex_requests_running", 0)


def test_cancelling_frees_the_row(server: RunningServer, inference: pb_grpc.InferenceStub) -> None:
    call = inference.Generate(ask("Tell me a story.", max_tokens=4000, ignore_eos=True))
    next(call)
    server.wait_for("adaplex_requests_running", 1)
    call.cancel()
    server.wait_for("adaplex_requests_running", 0)


def test_health_and_reflection(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "adaplex.v1.Inference", "adaplex.v1.Adapters"):
        state = health.Check(health_pb2.HealthCheckRequest(service=service)).status
        assert state == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    wanted = reflection_pb2.ServerReflectionRequest(list_services="")
    (listed,) = reflection.ServerReflectionInfo(iter([wanted]))
    names = {service.name for service in listed.list_services_response.service}
    assert {"adaplex.v1.Inference", "adaplex.v1.Adapters", "grpc.health.v1.Health"} <= names
    by_symbol = reflection_pb2.ServerReflectionRequest(file_containing_symbol="adaplex.v1.Inference")
    (described,) = reflection.ServerReflectionInfo(iter([by_symbol]))
    assert described.file_descriptor_response.file_descriptor_proto


def test_an_answer_keeps_to_its_constraint(inference: pb_grpc.InferenceStub) -> None:
    request = ask("Name a colour.")
    request.constraint.choice.texts.extend(["turquoise!", "vermilion!"])
    text, finish = answer(inference.Generate(request))
    assert text in ("turquoise!", "vermilion!") and finish.reason == pb.FINISH_REASON_STOP
    request.constraint.regex = "("
    with pytest.raises(grpc.RpcError) as refused:
        answer(inference.Generate(request))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


def parts(name: str, folder: Path) -> Iterator[pb.LoadAdapterRequest]:
    yield pb.LoadAdapterRequest(name=name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        data = (folder / file).read_bytes()
        for start in range(0, len(data), 1 << 20):
            chunk = pb.FileChunk(file_name=file, data=data[start : start + (1 << 20)])
            yield pb.LoadAdapterRequest(chunk=chunk)


def test_an_adapter_is_loaded_described_used_and_unloaded(
    adapters: pb_grpc.AdaptersStub, inference: pb_grpc.InferenceStub
) -> None:
    loaded = adapters.Load(parts("numbers-again", ROOT / "examples" / "itn-en" / "adapter"))
    assert loaded == adapters.Describe(pb.DescribeAdapterRequest(name="numbers-again"))
    assert loaded.kind == "lora"
    original = adapters.Describe(pb.DescribeAdapterRequest(name="itn-en"))
    assert loaded.revision == original.revision, "the same content is the same revision"
    text = "nine hundred and ninety nine"
    again, original_text = (answer(inference.Generate(ask(text, name)))[0] for name in ("numbers-again", "itn-en"))
    assert again == original_text
    assert again != answer(inference.Generate(ask(text)))[0]
    adapters.Unload(pb.UnloadAdapterRequest(name="numbers-again"))
    assert "numbers-again" not in {a.name for a in adapters.List(pb.ListAdaptersRequest()).adapters}
    with pytest.raises(grpc.RpcError) as raised:
        adapters.Describe(pb.DescribeAdapterRequest(name="numbers-again"))
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("name", ["../up", "a/b", "", "x" * 200, "naïve"])
def test_hostile_names_are_refused(adapters: pb_grpc.AdaptersStub, name: str) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        adapters.Load(parts(name, ROOT / "examples" / "itn-en" / "adapter"))
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_the_client_example_runs(server: RunningServer) -> None:
    script = ROOT / "examples" / "clients" / "grpc_client.py"
    ran = subprocess.run([sys.executable, str(script), server.grpc], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert "FINISH_REASON_STOP" in ran.stdout
    failed = subprocess.run(
        [sys.executable, str(script), server.grpc, "no-such-model"], capture_output=True, text=True, timeout=60
    )
    assert failed.returncode == 1
    assert "NOT_FOUND" in failed.stderr
