"""Every route of both skins stands in the one policy table, and the table names nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from adaplex_proto.v1 import adaplex_pb2
from adaplex_server.http_api.app import all_operations
from adaplex_server.http_api.settings import HttpSettings
from adaplex_server.service.access.policy import POLICY


class _Nothing:
    def __getattr__(self, name: str) -> Any:
        return self


def http_routes() -> set[str]:
    return {f"{one.method} {one.path}" for one in all_operations(_Nothing(), HttpSettings())}  # type: ignore[arg-type]


def grpc_routes() -> set[str]:
    files = (adaplex_pb2, health_pb2, reflection_pb2)
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    return {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}


def test_every_route_has_a_rule_and_every_rule_a_route() -> None:
    assert http_routes() | grpc_routes() == set(POLICY)


@pytest.mark.parametrize("route", sorted(route for route, need in POLICY.items() if need == "nothing"))
def test_only_what_reveals_nothing_is_open(route: str) -> None:
    told = {"/health", "/ready", "/version", "/openapi.json", "/", "/console/{asset}"}
    assert route.split(" ")[-1] in told or route.startswith("/grpc.")
