"""Puts the Ray Serve application together:

serve run adaplex_server.ray_serve.application:application base=./Llama-3.1-8B adapters=/shared replicas=2 gpus=1
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from adaplex_adapters.errors import StartupError
from adaplex_server.ray_serve.gateway import Gateway
from adaplex_server.ray_serve.replica import make_replica
from adaplex_server.ray_serve.shape import SHAPE_KEYS, RayShape
from adaplex_server.settings import ServerSettings, load_settings

REPLICA_NAME = "AdaplexReplica"


def application(args: Mapping[str, Any]) -> Application:
    """The builder that `serve run` and Serve's configuration files name as import path.

    args: settings of `adaplex serve` and fields of `RayShape`, by their names; `config` names a TOML file. The
    environment of this process is not read: it is not that of the replicas. Raises StartupError.
    """
    given = dict(args)
    shape = RayShape.of({key: given.pop(key) for key in SHAPE_KEYS & given.keys()})
    config = given.pop("config", None)
    return build_app(load_settings(Path(config) if config else None, {}, given), shape)


def build_app(settings: ServerSettings, shape: RayShape | None = None) -> Application:
    """A gateway before `shape.replicas` servers, for `serve.run`. Raises StartupError for settings of one machine.

    Listening is Ray's: `http`, `grpc` and the TLS settings are not used.
    """
    shape = shape or RayShape()
    if settings.tls_cert is not None:
        raise StartupError("Ray's proxy ends TLS: give its certificate to Ray, not to tls_cert", param="tls_cert")
    replica = serve.deployment(make_replica(settings.max_slots)).options(
        name=REPLICA_NAME,
        num_replicas=shape.replicas,
        # More than a replica admits, so that it is the replica which refuses: at once, and as OpenAI does.
        max_ongoing_requests=2 * (settings.max_rows + settings.max_waiting),
        ray_actor_options={"num_cpus": shape.cpus, "num_gpus": shape.gpus},
        graceful_shutdown_timeout_s=settings.drain_seconds + 10,
        health_check_period_s=5,
    )
    gateway = serve.deployment(Gateway).options(
        name="AdaplexGateway",
        num_replicas=shape.gateways,
        max_ongoing_requests=4096,
        ray_actor_options={"num_cpus": shape.gateway_cpus},
        graceful_shutdown_timeout_s=settings.drain_seconds + 10,
    )
    return gateway.bind(replica.bind(settings))
