"""What a service is built from. Resolved by the command line (file, environment, options).

Nothing here is read twice.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adaplex_server.caller import Limits
from adaplex_server.engine.settings import EngineSettings
from adaplex_server.service.access.key_store import KeyStore
from adaplex_server.service.trace import Tracer
from adaplex_server.service.training.settings import TrainingSettings

ENGINE_COMMAND = (sys.executable, "-m", "adaplex_server.engine")


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """All times in seconds.

    data_dir: holds catalogue.sqlite3; the adapter store is `engine.store` (by convention data_dir/adapters). engine:
    sent to the engine process as it is; engine.base is also where tokenizer, chat template and config are read.
    aliases: other names under which the base answers. startup_adapters: name -> PEFT folder, registered before the
    service is ready. adapters_dir: paths sent by clients are accepted only inside it (None: no such paths).
    chat_template: a jinja template that replaces the tokenizer's own.

    max_adapter_bytes: size of an adapter's tensor file at most.

    row_buffer: events kept for a reader that is slower than the model, per row, before its request is ended.
    drain_seconds: how long running requests may finish after SIGTERM. restart_first .. restart_longest: pauses before a
    lost engine is started again, doubling; back to the first after healthy_after of health. stall_seconds: silence of
    an engine that has work, past which it is killed and started again. adapter_labels: adapters that get metric series
    of their own, the others are "other". keys: the API keys, None for a server that asks for none. training: of
    fine-tuning jobs; None for the defaults, inside data_dir. adapter_limits: of each adapter, over all callers.
    adapter_weights: names with another share of a busy engine than 1. engine_command: what is started; the number of
    the inherited socket is appended. tracer: told of every request; None for none.
    """

    data_dir: Path
    engine: EngineSettings
    aliases: tuple[str, ...] = ()
    startup_adapters: Mapping[str, Path] = field(default_factory=dict)
    adapters_dir: Path | None = None
    chat_template: str | None = None
    max_adapter_bytes: int = 4 << 30
    row_buffer: int = 2048
    drain_seconds: float = 30.0
    restart_first: float = 0.5
    restart_longest: float = 30.0
    healthy_after: float = 60.0
    stall_seconds: float = 300.0
    adapter_labels: int = 50
    keys: KeyStore | None = None
    training: TrainingSettings | None = None
    adapter_limits: Limits = field(default_factory=Limits)
    adapter_weights: Mapping[str, float] = field(default_factory=dict)
    engine_command: tuple[str, ...] = ENGINE_COMMAND
    tracer: Tracer | None = None
