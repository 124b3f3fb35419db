"""Taking the port, and ending without cutting what runs."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any

import pytest

from adaplex_adapters.errors import StartupError
from adaplex_server.http_api.server import bind
from adaplex_server.http_api.settings import HttpSettings


def test_a_port_in_use_is_told_at_once() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(StartupError, match=f"Port {port} on 127.0.0.1 is in use"):
            bind("127.0.0.1", port)
    bind("127.0.0.1", port).close()


def test_hosts_that_are_not_ours() -> None:
    for host in ("no.such.host.invalid", "192.0.2.1", "a" * 300):
        with pytest.raises(StartupError, match="--http"):
            bind(host, 0)


def test_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        bind("::1", 0).close()
    except StartupError as error:
        pytest.skip(f"no IPv6 here: {error}")


def test_a_stop_lets_running_streams_finish(service: Any, serve: Any) -> None:
    from openai import OpenAI

    running = serve(service, HttpSettings())
    with running as address, OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="slow", messages=[{"role": "user", "content": "x"}], max_tokens=40, stream=True
        )
        next(iter(stream))
        ended = threading.Thread(target=running.__exit__, args=(None, None, None))
        ended.start()
        said = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert said.endswith(("[slow|<user>x|0]" * 3)[1:40][-20:])
        ended.join()


def test_a_stop_cuts_what_does_not_finish(service: Any, serve: Any) -> None:
    import httpx

    with serve(service, HttpSettings(drain=1)) as address:
        asked = threading.Thread(target=_ignore_errors, args=(httpx.post, f"{address}/v1/completions"))
        asked.start()
        while not service.running:
            pass
    asked.join()
    assert service.running == []


def _ignore_errors(post: Any, url: str) -> None:
    import httpx

    with contextlib.suppress(httpx.HTTPError):
        post(url, json={"model": "silent", "prompt": "x"}, timeout=20)
