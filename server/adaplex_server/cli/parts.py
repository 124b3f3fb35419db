"""From the user's settings to what each part is built from. Translates; creates the data folder and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from adaplex_adapters.errors import StartupError
from adaplex_server.bases.cache import cache_root
from adaplex_server.bases.locate import locate_base
from adaplex_server.caller import Limits
from adaplex_server.cli.demo import demo_adapters
from adaplex_server.engine.settings import EngineSettings
from adaplex_server.service.access.key_store import KeyStore
from adaplex_server.service.otel import otlp_tracer
from adaplex_server.service.settings import ServiceSettings
from adaplex_server.service.training.settings import TrainingSettings
from adaplex_server.settings import ServerSettings, weights


def data_folder(settings: ServerSettings, base_name: str) -> Path:
    """Adapters of one base never show up under another: each base has its own folder in the data folder."""
    return settings.data_dir / base_name


def key_file(data_dir: Path) -> Path:
    """Where the API keys are: one file for all bases of a data folder."""
    return data_dir / "keys.sqlite3"


def service_settings(settings: ServerSettings, progress: Callable[[str, float], None]) -> ServiceSettings:
    """Find (and on first use make) the base, and translate. Raises StartupError."""
    base = locate_base(settings.base, progress)
    name, aliases = served_names(settings.served_name or base.name)
    folder = data_folder(settings, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(f"the data folder {folder} cannot be made: {error.strerror}; set --data-dir") from error
    if settings.adapters is not None and not settings.adapters.is_dir():
        raise StartupError(f"the adapter folder {settings.adapters} is not a folder; set --adapters", param="adapters")
    return ServiceSettings(
        data_dir=folder,
        engine=engine_settings(settings, base.folder, name, folder),
        aliases=aliases,
        adapters_dir=settings.adapters,
        startup_adapters=startup_adapters(settings),
        max_adapter_bytes=int(settings.max_upload),
        chat_template=chat_template(settings.chat_template),
        drain_seconds=settings.drain_seconds,
        adapter_labels=settings.adapter_labels,
        training=TrainingSettings(
            folder=folder / "training",
            base=base.folder,
            base_name=name,
            device=settings.device,
            memory=_plain(settings.training_memory),
            threads=settings.threads,
        ),
        tracer=otlp_tracer(settings.otlp_endpoint) if settings.otlp_endpoint else None,
        keys=KeyStore(key_file(settings.data_dir)),
        adapter_weights=weights(settings.adapter_weights),
        adapter_limits=Limits(
            settings.adapter_requests_per_minute, settings.adapter_tokens_per_minute, settings.adapter_streams
        ),
    )


def served_names(given: str) -> tuple[str, tuple[str, ...]]:
    """The base's own name, and its others. Raises StartupError."""
    names = tuple(name.strip() for name in given.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise StartupError(f"--served-name {given!r}: a name is empty or said twice", param="served_name")
    return names[0], names[1:]


def startup_adapters(settings: ServerSettings) -> dict[str, Path]:
    """Each subfolder of the adapter folder under its own name; where nothing was asked for, the demo adapters."""
    if settings.adapters is not None:
        return {p.name: p for p in sorted(settings.adapters.iterdir()) if p.is_dir() and not p.name.startswith(".")}
    return demo_adapters() if settings.base is None else {}


def chat_template(file: Path | None) -> str | None:
    """The template's source. Raises StartupError naming the file."""
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(
            f"the chat template {file} cannot be read: {error}; set --chat-template", param="chat_template"
        ) from error


def engine_settings(settings: ServerSettings, base: Path, name: str, folder: Path) -> EngineSettings:
    """What the engine process is told."""
    return EngineSettings(
        base=str(base),
        store=str(folder / "adapters"),
        base_name=name,
        quantize=settings.quantize,
        double_quant=settings.double_quant,
        quant_block=settings.quant_block,
        int8_threshold=settings.int8_threshold,
        dtype=settings.dtype,
        device=settings.device,
        max_rows=settings.max_rows,
        max_waiting=settings.max_waiting,
        max_wait=settings.max_wait or None,
        max_step_tokens=settings.max_step_tokens,
        batch_invariant=settings.batch_invariant,
        max_context=settings.max_context,
        page_size=settings.page_size,
        kv_bytes=_plain(settings.kv_memory),
        adapter_bytes=_plain(settings.adapter_memory),
        reserved_bytes=_plain(settings.training_memory) or 0,
        host_adapter_bytes=int(settings.host_adapter_memory),
        max_head_bytes=int(settings.max_head_memory),
        max_slots=settings.max_slots,
        max_rank=settings.max_rank,
        prefix_cache=settings.prefix_cache,
        threads=settings.threads,
        weight_cache=str(cache_root() / "weights") if settings.weight_cache else None,
    )


def _plain(size: int | None) -> int | None:
    """pydantic's ByteSize is an int that the frames' encoder does not know."""
    return None if size is None else int(size)
