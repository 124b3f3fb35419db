"""Puts the HTTP skin together: every operation, its route, the errors and the envelope around all."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from adaplex_adapters.errors import AdaplexError
from adaplex_server.http_api.adapters import Adapters
from adaplex_server.http_api.chat import ChatCompletions
from adaplex_server.http_api.completions import Completions
from adaplex_server.http_api.console.page import Console
from adaplex_server.http_api.envelope import Envelope
from adaplex_server.http_api.errors import answer_adaplex_error, answer_routing_error
from adaplex_server.http_api.files import Files
from adaplex_server.http_api.fine_tuning import FineTuningJobs
from adaplex_server.http_api.legacy_lora import LegacyLora
from adaplex_server.http_api.models import Models
from adaplex_server.http_api.openapi import Document
from adaplex_server.http_api.operation import Operation, routes
from adaplex_server.http_api.settings import HttpSettings
from adaplex_server.http_api.status import Status
from adaplex_server.service.service import Service


def create_app(service: Service, settings: HttpSettings | None = None) -> Starlette:
    """The ASGI application. It may serve before `service.start()` is over: /health and /ready tell how far it is."""
    operations = all_operations(service, settings or HttpSettings())
    return Starlette(
        routes=routes(operations, service.gate),
        middleware=[Middleware(Envelope, gate=service.gate)],
        exception_handlers={AdaplexError: answer_adaplex_error, HTTPException: answer_routing_error},
    )


def all_operations(service: Service, settings: HttpSettings) -> tuple[Operation, ...]:
    """Everything that is served, /openapi.json included."""
    operations = (
        *ChatCompletions(service, settings).operations(),
        *Completions(service, settings).operations(),
        *Models(service).operations(),
        *Adapters(service, settings).operations(),
        *Files(service, settings).operations(),
        *FineTuningJobs(service, settings).operations(),
        *LegacyLora(service, settings).operations(),
        *Status(service).operations(),
        *Console().operations(),
    )
    return (*operations, *Document(operations).operations())
