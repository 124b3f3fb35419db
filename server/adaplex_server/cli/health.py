"""`adaplex health`: whether the server on this machine is well, for container engines and service managers."""

from __future__ import annotations

import http.client
import json
import os
import ssl
from typing import Annotated

import typer

from adaplex_adapters.errors import Unavailable
from adaplex_server.settings import ServerSettings, host_and_port, load_settings

_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def health_command(
    ready: Annotated[
        bool, typer.Option("--ready", help="Also fail while it loads or drains and takes no requests.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for its answer.", min=0.1)] = 5.0,
) -> None:
    """Ask the server whether it is well; exit with 0 if so, else with 1 and the reason.

    The address is the one `adaplex serve` takes from the same environment and configuration file.
    """
    print(check_health(load_settings(None, os.environ, {}), "/ready" if ready else "/health", timeout))


def check_health(settings: ServerSettings, path: str, timeout: float) -> str:
    """The state that the server tells of itself. Raises Unavailable with the reason if that is not a good one."""
    try:
        status, body = _get(settings, path, timeout)
        told = json.loads(body)
        state = f"{told['state']}: {told['detail']}" if told.get("detail") else str(told["state"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise Unavailable(f"no healthy server at {settings.http}: {error!r}") from error
    if status != 200:
        raise Unavailable(f"the server at {settings.http} is {state}")
    return state


def _get(settings: ServerSettings, path: str, timeout: float) -> tuple[int, bytes]:
    host, port = host_and_port(settings.http, "http")
    host = _ANY_ADDRESS.get(host, host)
    connection: http.client.HTTPConnection
    if settings.tls_cert is None:
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
    else:
        # Our own certificate, under a name that is not the loopback's: who answers there is not in question.
        trusting = ssl.create_default_context()
        trusting.check_hostname = False
        trusting.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=trusting)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()
