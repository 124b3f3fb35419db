"""What the service tells about itself and its adapters. Frozen; owns nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adaplex_adapters.catalogue import Lineage
from adaplex_server.engine.messages import EngineInfo

AdapterState = Literal["ready", "resident", "failed"]
ServiceState = Literal["starting", "ready", "draining", "failed"]


@dataclass(frozen=True)
class AdapterInfo:
    """One registered name.

    revision: SHA-256 (hex) of the content that new requests of this name get. nbytes: size as stored. created: Unix
    seconds. source: "upload", "folder", "trainer" or "composition". running: rows of this name in the engine now, of
    whatever revision. state: "ready" can be named in a request; "resident" is ready and has been used since the
    engine started; "failed" cannot be served, `reason` says why (it does not belong in a list of models).
    virtual_tokens, bottleneck_size: see `AdapterSpec`. parts: what a composition was made of.
    """

    name: str
    revision: str
    kind: str
    rank: int
    targets: tuple[str, ...]
    nbytes: int
    parameters: int
    base_model: str
    source: str
    created: float
    state: AdapterState
    running: int = 0
    reason: str = ""
    virtual_tokens: int = 0
    bottleneck_size: int = 0
    parts: tuple[Lineage, ...] = ()

    @property
    def servable(self) -> bool:
        """Whether a request may name it now."""
        return self.state in ("ready", "resident")


@dataclass(frozen=True)
class ServiceInfo:
    """The server as a whole.

    base: the base's own name; aliases: other names of the base. state: readiness is state == "ready"; "starting" also
    while the engine is started again; "failed" while it crashes again and again (it is still being retried). detail:
    why not ready, or what is being loaded. progress: 0..1 of the present load. restarts: engines lost since the
    service started. started: Unix seconds. engine: None until the first engine is ready, then the latest one's.
    """

    base: str
    aliases: tuple[str, ...]
    state: ServiceState
    detail: str
    progress: float
    restarts: int
    started: float
    engine: EngineInfo | None

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self.state == "ready"
