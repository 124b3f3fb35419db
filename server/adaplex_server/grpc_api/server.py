"""The gRPC server: its services, health, reflection, and the limits of a connection."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from adaplex_adapters.errors import StartupError
from adaplex_proto.v1 import adaplex_pb2 as pb
from adaplex_proto.v1 import adaplex_pb2_grpc as pb_grpc
from adaplex_server.grpc_api.access import GateInterceptor
from adaplex_server.grpc_api.adapters import AdaptersServicer
from adaplex_server.grpc_api.fine_tuning import FineTuningServicer
from adaplex_server.grpc_api.inference import InferenceServicer
from adaplex_server.service.service import Service
from adaplex_server.tls import Certificate

SERVICES = tuple(pb.DESCRIPTOR.services_by_name[name].full_name for name in ("Inference", "Adapters", "FineTuning"))
MAX_MESSAGE_BYTES = 16 << 20
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Without this, a second server on the same port would silently share it.
    ("grpc.so_reuseport", 0),
    # A client may ping an idle connection every 30 s; one that floods pings is told to go away.
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_metadata_size", 16 << 10),
)


class GrpcServer:
    """Owns the listening port and the health states. Made bound (StartupError when the port is taken), then started."""

    def __init__(self, service: Service, host: str, port: int, max_upload: int, tls: Certificate | None = None) -> None:
        self._server = grpc.aio.server(options=OPTIONS, interceptors=(GateInterceptor(service.gate),))
        pb_grpc.add_InferenceServicer_to_server(InferenceServicer(service), self._server)
        pb_grpc.add_AdaptersServicer_to_server(AdaptersServicer(service, max_upload), self._server)
        pb_grpc.add_FineTuningServicer_to_server(FineTuningServicer(service), self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self.port = self._bind(host, port, tls)

    def _bind(self, host: str, port: int, tls: Certificate | None) -> int:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                return self._server.add_insecure_port(address)
            pair = (tls.key.read_bytes(), tls.chain.read_bytes())
            return self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        except RuntimeError as error:
            raise StartupError(
                f"the gRPC address {address} cannot be bound: it is in use or not ours; set --grpc"
            ) from error

    async def start(self) -> None:
        """Answer calls; health says NOT_SERVING until `set_ready(True)`."""
        await self.set_ready(False)
        await self._server.start()

    async def set_ready(self, ready: bool) -> None:
        """Tell health checks whether new requests are taken."""
        serving = health_pb2.HealthCheckResponse.SERVING
        state = serving if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *SERVICES):
            await self._health.set(name, state)

    async def stop(self, grace: float) -> None:
        """Take no new calls, let running ones finish for `grace` seconds."""
        await self._server.stop(grace)
