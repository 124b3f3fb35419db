"""The engine as a process over a real socket pair: start, answer, refuse, end with its parent."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import torch

from adaplex_server.engine.messages import (
    AdapterDropped,
    AdapterFailed,
    AdapterLoaded,
    Cancel,
    DropAdapter,
    Failed,
    FromEngine,
    LoadAdapter,
    Progress,
    Ready,
    Shutdown,
    StepDone,
    Submit,
)
from adaplex_server.engine.settings import EngineSettings
from adaplex_server.engine.wire import FrameReader, send
from adaplex_server.model.base import load_base
from adaplex_server.model.config import read_config
from adaplex_server.vocabulary import SamplingParams
from support.mixed import Oracle, Zoo, make_zoo, settings_for

NAMES = ("all-8", "qv-1", "all-64")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    from support.mixed import RECIPES

    return make_zoo(tmp_path_factory.mktemp("zoo"), {name: RECIPES[name] for name in NAMES})


class Peer:
    """The API process's end."""

    def __init__(self, sock: socket.socket, process: subprocess.Popen) -> None:
        self.sock = sock
        self.process = process
        self._frames = FrameReader(sock)
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    def send(self, message: msgspec.Struct) -> None:
        send(self.sock, message)

    def read(self) -> Any:
        return self._frames.read(self._decoder)

    def read_until(self, kind: type) -> Any:
        while not isinstance(message := self.read(), kind):
            assert message is not None, "the engine has gone"
        return message

    def finish(self, rows: set[int]) -> tuple[dict[int, list], dict[int, Any]]:
        """All tokens and ends, until these rows have ended."""
        tokens: dict[int, list] = {}
        ends: dict[int, Any] = {}
        while not rows <= ends.keys():
            message = self.read_until(StepDone)
            for token in message.tokens:
                tokens.setdefault(token.row, []).append(token)
            ends |= {end.row: end for end in message.ends}
        return tokens, ends


@contextmanager
def engine(settings: EngineSettings) -> Iterator[Peer]:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "adaplex_server.engine", str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
    theirs.close()
    ours.settimeout(60)
    try:
        peer = Peer(ours, process)
        peer.send(settings)
        yield peer
    finally:
        ours.close()
        try:
            process.wait(10)
        finally:
            process.kill()
            process.communicate()


def test_rows_of_three_adapters_through_the_process(zoo: Zoo) -> None:
    settings = settings_for(zoo, threads=1)
    with engine(settings) as peer:
        seen = []
        while not isinstance(message := peer.read(), Ready):
            seen.append(message)
        assert seen and all(isinstance(m, Progress) for m in seen)
        assert message.info.vocab_size == 256 and message.info.base_format == "nf4-double"
        peer.send(LoadAdapter(1, zoo.revisions["all-8"]))
        loaded = peer.read_until(AdapterLoaded)
        assert loaded.call == 1 and loaded.max_logit_difference > 0.1 and loaded.device_bytes > 0
        prompt = [5, 77, 140, 9, 33]
        names = [None, *NAMES]
        sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=1)
        for row, name in enumerate(names):
            peer.send(Submit(row, prompt, sampling, zoo.revisions[name] if name else None))
        peer.send(Submit(9, prompt, SamplingParams(max_tokens=100, ignore_eos=True)))
        peer.send(Cancel(9))
        tokens, ends = peer.finish({0, 1, 2, 3, 9})
        assert {row: end.reason for row, end in ends.items()} == {**dict.fromkeys(range(4), "length"), 9: "cancelled"}
        _check_greedy(zoo, settings, prompt, {row: tokens[row] for row in range(4)}, names)

        peer.send(DropAdapter(2, zoo.revisions["all-8"]))
        assert peer.read_until(AdapterDropped).freed_bytes == loaded.device_bytes
        peer.send(Submit(20, prompt, sampling, zoo.revisions["all-8"]))
        assert peer.finish({20})[1][20].error == "ModelNotFound"
        peer.send(LoadAdapter(3, "0" * 64))
        assert peer.read_until(AdapterFailed).error == "NotFound"
        peer.send(Shutdown())
        assert peer.process.wait(10) == 0


def _check_greedy(zoo: Zoo, settings: EngineSettings, prompt: list[int], tokens: dict, names: list) -> None:
    config = read_config(zoo.base)
    base = load_base(
        zoo.base,
        config=config,
        quantize=settings.quantize,
        double_quant=True,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    oracle = Oracle(zoo, base, torch.device("cpu"))
    for row, name in enumerate(names):
        ids = [token.token for token in tokens[row]]
        (logprobs,) = oracle.logprobs(zoo.revisions[name] if name else None, [prompt + ids])
        best = logprobs[len(prompt) - 1 : -1]
        assert float((best.amax(-1) - best.gather(1, torch.tensor(ids)[:, None])[:, 0]).max()) < 1e-3
        assert abs(tokens[row][0].logprob.logprob - float(best[0, ids[0]])) < 1e-3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": "/nonexistent"}, "config.json"),
        ({"kv_bytes": 5000}, "kv_bytes"),
        ({"adapter_bytes": 10}, "adapter_bytes"),
        ({"kv_bytes": 1 << 50}, "do not fit"),
    ],
)
def test_settings_that_cannot_start(zoo: Zoo, changes: dict, words: str) -> None:
    with engine(settings_for(zoo, threads=1, **changes)) as peer:
        failed = peer.read_until(Failed)
        assert failed.error == "StartupError" and words in failed.message
        assert peer.process.wait(10) == 2


def test_the_process_ends_with_its_parent(zoo: Zoo) -> None:
    with engine(settings_for(zoo, threads=1)) as peer:
        peer.read_until(Ready)
        peer.send(Submit(0, [5, 6], SamplingParams(max_tokens=100, ignore_eos=True)))
        peer.sock.shutdown(socket.SHUT_RDWR)
        assert peer.process.wait(5) is not None


def test_a_sigterm_for_the_whole_group_is_left_to_the_parent(zoo: Zoo) -> None:
    with engine(settings_for(zoo, threads=1)) as peer:
        peer.read_until(Ready)
        for number in (signal.SIGTERM, signal.SIGINT):
            peer.process.send_signal(number)
        peer.send(Submit(0, [5, 6], SamplingParams(max_tokens=20, ignore_eos=True)))
        assert peer.finish({0})[1][0].reason == "length"
        peer.send(Shutdown())
        assert peer.process.wait(10) == 0
