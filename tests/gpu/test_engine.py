"""The engine's steps on the GPU: only settling one waits for the device, and overlap changes no choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from adaplex_server.engine.messages import LoadAdapter, Submit
from adaplex_server.vocabulary import SamplingParams
from support.mixed import RECIPES, Traffic, Zoo, make_zoo, settings_for

WISHES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.2, "top_k": 40, "min_p": 0.01},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 0.7, "logit_bias": {5: 3.0}, "min_tokens": 4, "stop_token_ids": (7, 8)},
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.9, "logprobs": 0, "prompt_logprobs": 2},
]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"), {name: RECIPES[name] for name in ("all-8", "qv-1")})


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def start(zoo: Zoo, **changes: Any) -> Traffic:
    """An engine with room for everything and both adapters on the device."""
    room: dict[str, Any] = {"kv_bytes": None, "adapter_bytes": None, "max_rows": 40, "max_step_tokens": 64}
    traffic, _ = Traffic.start(zoo, settings_for(zoo, device="cuda", prefix_cache=False, **{**room, **changes}))
    for call, revision in enumerate(zoo.revisions.values()):
        traffic.inbox.put(LoadAdapter(call, revision))
    while len(traffic.answers) < len(zoo.revisions):
        traffic.step(wait=not traffic.answers)
    return traffic


def submit(traffic: Traffic, zoo: Zoo, wishes: list[dict[str, Any]]) -> None:
    for i, wish in enumerate(wishes):
        sampling = SamplingParams(**{"max_tokens": 12, "ignore_eos": True, "seed": i, **wish})
        revision = [None, *zoo.revisions.values()][i % 3]
        traffic.submit(Submit(len(traffic.submits), [3 + i, 9, 8, 7], sampling, revision))


@pytest.mark.parametrize("graphs", [True, False])
def test_only_settling_waits_for_the_device(zoo: Zoo, graphs: bool) -> None:
    traffic = start(zoo, overlap=True, decode_graphs=graphs)
    for _ in range(2):
        submit(traffic, zoo, WISHES)
        traffic.settle()
    with waiting_is_an_error():
        submit(traffic, zoo, WISHES)
        traffic.settle()
    assert {end.reason for end in traffic.ends.values()} <= {"length", "stop"}


@pytest.mark.parametrize("graphs", [True, False])
def test_overlapping_steps_change_no_choice(zoo: Zoo, graphs: bool) -> None:
    """All wishes side by side: the same tokens and log-probabilities, step by step or overlapping, bit for bit."""
    found = []
    for overlap in (False, True):
        traffic = start(zoo, overlap=overlap, decode_graphs=graphs)
        submit(traffic, zoo, WISHES * 3)
        traffic.settle()
        found.append(traffic.tokens)
    assert found[0] == found[1]
