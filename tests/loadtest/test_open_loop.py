"""The generator keeps its schedule whatever the server does, and tells wrong, late and refused answers apart."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from adaplex_adapters.errors import InvalidRequest
from adaplex_loadtest import open_loop
from adaplex_loadtest.answered import WRONG, Answered
from adaplex_loadtest.arrivals import Arrival, Lengths, Traffic, poisson, read_trace, zipf_weights
from adaplex_loadtest.html_report import page, plots_of_run
from adaplex_loadtest.load_figures import Objective, by_model, figures
from adaplex_loadtest.open_loop import Target
from adaplex_loadtest.overload import Goodput, closed_loop, goodput
from adaplex_loadtest.process_watch import Sample
from adaplex_loadtest.questions import questions_for
from adaplex_loadtest.soak import Plan, leaks, not_at_rest, slope

TRAFFIC = Traffic(("a", "b", "c", "d"), 50.0, 40.0, Lengths(20, 0.5), Lengths(8), check=0.5, seed=3)


def test_zipf_is_zipf() -> None:
    assert zipf_weights(4, 1) == pytest.approx([0.48, 0.24, 0.16, 0.12])
    assert zipf_weights(3, 0) == pytest.approx([1 / 3] * 3)
    asked = Counter(one.model for one in poisson(TRAFFIC))
    assert [model for model, _ in asked.most_common()] == ["a", "b", "c", "d"]
    assert asked["a"] / asked.total() == pytest.approx(0.48, abs=0.04)


def test_arrivals_are_a_poisson_process() -> None:
    arrivals = poisson(TRAFFIC)
    gaps = [b.at - a.at for a, b in pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    spread = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.1) and spread**0.5 == pytest.approx(mean, rel=0.1)
    assert poisson(TRAFFIC) == arrivals != poisson(replace(TRAFFIC, seed=4))
    assert {one.output for one in arrivals} == {8} and len({one.prompt for one in arrivals}) > 10


def test_a_trace_is_read_and_sorted(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    lines = [{"at": 2, "model": 3, "prompt": 5, "output": 6}, {"at": 1, "model": "x", "prompt": 1, "output": 2}]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert read_trace(file, ["a", "b"]) == [Arrival(1, "x", 1, 2, False), Arrival(2, "b", 5, 6, False)]
    file.write_text('{"at": 1}')
    with pytest.raises(InvalidRequest, match=":1 is no arrival"):
        read_trace(file, ["a"])


class Server:
    """Answers every request after `pause` seconds with "yes", but refuses every fifth."""

    def __init__(self, pause: float) -> None:
        self.pause = pause
        self.heads: list[str] = []

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        self.heads.append(head)
        if len(self.heads) % 5 == 0:
            writer.write(b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3\r\n\r\n")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await asyncio.sleep(self.pause)
            choice = {"delta": {"content": "yes"}} if "messages" in body else {"text": "yes"}
            for event in ({"choices": [choice]}, {"choices": [], "usage": {"completion_tokens": 1}}):
                writer.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        writer.close()


async def ask(pause: float, arrivals: list[Arrival], **target: Any) -> tuple[Server, list[Answered]]:
    server = Server(pause)
    listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        return server, await open_loop.run(Target(f"http://127.0.0.1:{port}", **target), arrivals)


async def test_requests_do_not_wait_for_answers() -> None:
    """All 40 are sent before the first is answered."""
    arrivals = [Arrival(i / 100, "m", 3, 4, False) for i in range(40)]
    server, answered = await ask(0.8, arrivals, timeout=2.5)
    assert [one.at for one in answered] == [one.at for one in arrivals]
    assert max(one.late for one in answered) < 0.4
    assert all("X-Request-Timeout: 2.500" in head for head in server.heads)
    assert Counter(one.error for one in answered) == {None: 32, "HTTP 429": 8}
    assert {one.retry_after for one in answered if one.error} == {3.0}


async def test_a_wrong_answer_is_told() -> None:
    answers = {("a", question): "yes" for question in questions_for("a")}
    answers |= {("b", question): "no" for question in questions_for("b")}
    arrivals = [Arrival(0, model, 3, 4, check) for model, check in (("a", True), ("b", True), ("b", False))]
    _, answered = await ask(0, arrivals, answers=answers)
    assert [one.error for one in answered] == [None, WRONG, None]


async def test_a_client_that_hangs_up_and_a_server_that_is_gone() -> None:
    _, (gone,) = await ask(30, [Arrival(0, "a", 3, 4, False)], hang_ups=1.0)
    assert gone.error == "hung up" and gone.seconds < 5
    (lost,) = await open_loop.run(Target("http://127.0.0.1:9"), [Arrival(0, "a", 3, 4, False)])
    assert lost.error == "ConnectionRefusedError"


def answered_in(first: float, per_token: float, model: str = "a", error: str | None = None) -> Answered:
    return Answered(1.0, model, "http", 0.0, first, [per_token] * 4, first + 4 * per_token, 5, "x", error)


def test_goodput_counts_what_came_in_time() -> None:
    objective = Objective(1.0, 0.1)
    seen = [answered_in(0.5, 0.05), answered_in(1.5, 0.05), answered_in(0.5, 0.2), answered_in(0.5, 0.05, "b", WRONG)]
    told = figures(seen, 2.0, objective)
    assert (told["good"], told["goodput_per_second"], told["answered"]) == (1, 0.5, 3)
    assert told["errors"] == {WRONG: 1} and told["time_to_first_token_ms"]["p50"] == 500
    assert [(line["model"], line["good"]) for line in by_model(seen, objective)] == [("a", 1), ("b", 0)]


def test_the_page_needs_nothing_from_outside_and_escapes() -> None:
    seen = [answered_in(0.5, 0.05, "<b>"), answered_in(1.5, 0.05)]
    objective = Objective(1.0, 0.1)
    text = page("Load", figures(seen, 2.0, objective), by_model(seen, objective), plots_of_run(seen))
    assert text.count("<svg") == 3 and "<b>" not in text and "&lt;b&gt;" in text
    assert not any(word in text for word in ("http://", "https://", "<script", "<link", "nan"))


def rest(at: float, rss: int, handles: int = 20, device: int = 0) -> Sample:
    return Sample(at, (100 << 20, rss << 20), (30, handles), {}, device << 20)


def test_a_leak_is_growth_within_an_engines_life() -> None:
    plan = Plan(60, 1, rss_growth=50 << 20, handle_growth=4)
    assert (
        leaks([(0, rest(0, 500)), (0, rest(1, 900)), (0, rest(2, 910)), (1, rest(3, 100)), (1, rest(4, 500))], plan)
        == []
    )
    growing = [(0, rest(i, 500 + 30 * i)) for i in range(6)]
    assert any("engine 1 has grown by 60 MiB" in found for found in leaks(growing, plan))
    assert any("file handles" in found for found in leaks([(0, rest(i, 500, 20 + 5 * i)) for i in range(6)], plan))
    assert any("more of the GPU" in found for found in leaks([(0, rest(i, 500, 20, 30 * i)) for i in range(6)], plan))
    assert slope([rest(60.0 * i, 500 + 2 * i) for i in range(6)], 1) == pytest.approx(120)


def test_a_replaced_adapter_that_keeps_its_slot_is_told() -> None:
    gauges = {"adaplex_adapters_registered": 2.0, "adaplex_adapters_resident": 2.0, "adaplex_requests_running": 0.0}
    assert not not_at_rest(gauges)
    (found,) = not_at_rest(gauges | {"adaplex_adapters_resident": 3.0})
    assert found.startswith("3 adapters are on the device") and not_at_rest(gauges | {"adaplex_kv_pages_used": 1.0})


def test_overload_counts_a_steady_window() -> None:
    """Of 10 s the first 2 are not counted, nor what ends after the last arrival."""
    seen = [replace(answered_in(0.5, 0.05), at=at) for at in (0.5, 3.0, 5.0, 9.5)]
    assert goodput(seen, 10.0, Objective(1.0, 0.1)) == Goodput(requests=0.25, tokens=1.2)
    assert goodput(seen, 10.0, Objective(0.1, 0.1)).requests == 0


async def test_a_closed_loop_has_one_request_a_client() -> None:
    server = Server(0.02)
    listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    async with listening:
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        answered = await closed_loop(Target(url), TRAFFIC, 3, 0.5)
    assert len(answered) >= 6 and {one.model for one in answered} <= set(TRAFFIC.models)
    assert len({one.at for one in answered}) == len(answered) and max(one.at for one in answered) < 0.5
