"""All settings of the server in one typed object, and the one place that reads them from environment and TOML file.

Order, weakest first: defaults, the TOML file, `ADAPLEX_*` variables, the command line. Unknown keys and bad values are
refused with their name; nothing is ignored. `ServerSettings` is the only list of options: the command line, the TOML
keys (same names) and the variables (`ADAPLEX_` and the name in capitals) are all made from it.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator

from adaplex_adapters.errors import StartupError
from adaplex_server.model.formats.quantization import BLOCK, BLOCKS, THRESHOLD, QuantizeKind

ENV_PREFIX = "ADAPLEX_"
# Not settings of a server: which TOML file to read, and which server the other commands talk to, and with which key.
CONFIG_VARIABLE = "ADAPLEX_CONFIG"
SERVER_VARIABLE = "ADAPLEX_SERVER"
KEY_VARIABLE = "ADAPLEX_API_KEY"
# Kubernetes gives them to every pod beside a Service called adaplex (ADAPLEX_PORT=tcp://10.0.0.1:8000, ...).
_SERVICE_LINK = re.compile(r"ADAPLEX_(SERVICE_(HOST|PORT)|PORT)(_.*)?")


def default_data_dir() -> Path:
    """Where adapters and the catalogue live unless told otherwise: $XDG_DATA_HOME/adaplex."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "adaplex"


class ServerSettings(BaseModel):
    """What `adaplex serve` can be told. Frozen: "auto" and None are resolved where used, never written back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: Annotated[
        str | None,
        Field(
            title="Base model",
            description="The base: a folder in Hugging Face layout, or a hub name where there is a network. "
            "A GPTQ or bitsandbytes NF4 folder is recognized from its own config. Without it, the embedded "
            "SmolLM2-135M-Instruct.",
        ),
    ] = None
    served_name: Annotated[
        str | None,
        Field(
            title="Base model",
            description="What clients call the base; the folder's name unless given. After a comma, other names of it.",
        ),
    ] = None
    chat_template: Annotated[
        Path | None,
        Field(
            title="Base model",
            description="File with a jinja chat template, for a base that has none or instead of its own.",
        ),
    ] = None
    quantize: Annotated[
        QuantizeKind,
        Field(
            title="Base model",
            description="How a dense checkpoint is kept in memory: quantized in flight to bitsandbytes' 4-bit NF4 or "
            "FP4, to LLM.int8, to weight-only int8 of rows (absmax or zero-point), or as it is.",
        ),
    ] = "nf4"
    double_quant: Annotated[
        bool,
        Field(
            title="Base model",
            description="Quantize the block scales of NF4 and FP4 as well (0.37 bit a parameter less at blocks of 64).",
        ),
    ] = True
    quant_block: Annotated[
        int,
        Field(
            title="Base model", description="Parameters that share a scale in NF4 and FP4: a power of two, 32 to 4096."
        ),
    ] = BLOCK
    int8_threshold: Annotated[
        float,
        Field(
            title="Base model",
            ge=0,
            description="Activations of this magnitude are outliers to LLM.int8 and kept in 16 bits; 0 for none.",
        ),
    ] = THRESHOLD
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(title="Base model", description="Type of activations and KV cache; auto follows the checkpoint."),
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Field(title="Base model", description="Where the base lives.")
    ] = "auto"
    threads: Annotated[
        int | None, Field(title="Base model", ge=1, description="CPU threads of the model; all cores unless given.")
    ] = None

    weight_cache: Annotated[
        bool,
        Field(
            title="Base model",
            description="On a GPU, keep the weights as they lie in its memory in the user's cache folder, so that the "
            "next start is quicker (as many bytes as the base takes).",
        ),
    ] = True

    adapters: Annotated[
        Path | None,
        Field(
            title="Adapters",
            description="Folder with one PEFT folder an adapter, each served under its folder's name. Also the only "
            "place from which /v1/load_lora_adapter loads. Without --base and --adapters, the demo adapters.",
        ),
    ] = None
    data_dir: Annotated[
        Path, Field(title="Adapters", description="Where uploaded adapters and the catalogue are kept, durably.")
    ] = Field(default_factory=default_data_dir)
    max_rank: Annotated[
        int, Field(title="Adapters", ge=1, le=1024, description="Largest LoRA rank that is accepted.")
    ] = 256
    max_slots: Annotated[
        int,
        Field(
            title="Adapters",
            ge=1,
            le=4096,
            description="Adapters on the device at once; more may be registered, they take turns.",
        ),
    ] = 64
    max_upload: Annotated[
        ByteSize, Field(title="Adapters", description="Largest adapter that is accepted, unpacked.")
    ] = ByteSize(2 << 30)

    http: Annotated[str, Field(title="Listening", description="HOST:PORT of the HTTP API.")] = "127.0.0.1:8000"
    grpc: Annotated[str, Field(title="Listening", description="HOST:PORT of the gRPC API, or 'off'.")] = (
        "127.0.0.1:50051"
    )

    tls_cert: Annotated[
        Path | None,
        Field(title="Listening", description="PEM file with the certificate chain; HTTP and gRPC are then TLS alone."),
    ] = None
    tls_key: Annotated[Path | None, Field(title="Listening", description="PEM file with the certificate's key.")] = None

    adapter_requests_per_minute: Annotated[
        int | None, Field(title="Access", ge=1, description="Requests a minute of each adapter, over all callers.")
    ] = None
    adapter_tokens_per_minute: Annotated[
        int | None,
        Field(title="Access", ge=1, description="Tokens a minute of each adapter, prompts and answers together."),
    ] = None
    adapter_streams: Annotated[
        int | None, Field(title="Access", ge=1, description="Requests of each adapter under way at once.")
    ] = None

    max_rows: Annotated[int, Field(title="Limits", ge=1, le=1024, description="Rows of one step at most.")] = 64
    max_waiting: Annotated[
        int, Field(title="Limits", ge=1, description="Requests that may wait; past it clients get 429.")
    ] = 256
    max_wait: Annotated[
        float,
        Field(
            title="Limits",
            ge=0,
            description="A request that would wait for longer than this before it begins gets 429 at once, so that "
            "those that wait are answered in time when more come than can be served; 0 for no such limit.",
        ),
    ] = 60.0
    adapter_weights: Annotated[
        str,
        Field(
            title="Limits",
            description="Shares of a busy engine, as NAME=WEIGHT,NAME=WEIGHT: an adapter (or the base) of weight 2 "
            "gets twice the tokens of one of weight 1, which is everybody's who is not named.",
        ),
    ] = ""
    max_step_tokens: Annotated[
        int | None,
        Field(
            title="Limits",
            ge=16,
            description="Tokens of one step at most; longer prompts are prefilled in chunks. 512 on a CPU and 4096 on "
            "a GPU unless given.",
        ),
    ] = None
    batch_invariant: Annotated[
        bool,
        Field(
            title="Limits",
            description="On a GPU too, a request's logits are bit for bit the same alone or mixed, however its prompt "
            "is cut, and after a preemption: steps of 128 tokens at most, which prefill more slowly.",
        ),
    ] = False
    max_context: Annotated[
        int | None,
        Field(title="Limits", ge=16, description="Tokens of prompt and answer; the model's own unless given."),
    ] = None
    page_size: Annotated[int, Field(title="Limits", ge=8, le=256, description="Tokens in a page of the KV cache.")] = 16
    prefix_cache: Annotated[
        bool, Field(title="Limits", description="Reuse the KV pages of equal prompt beginnings.")
    ] = True
    drain_seconds: Annotated[
        float, Field(title="Limits", ge=0, description="How long running requests may finish after SIGTERM.")
    ] = 30.0

    kv_memory: Annotated[
        ByteSize | None,
        Field(title="Memory", description="For the KV cache, such as 4GiB; a share of what is free unless given."),
    ] = None
    adapter_memory: Annotated[
        ByteSize | None,
        Field(title="Memory", description="For adapters on the device; a share of what is free unless given."),
    ] = None
    training_memory: Annotated[
        ByteSize | None,
        Field(
            title="Memory",
            description="Kept free for fine-tuning jobs, and the most that one may take; nothing is kept free unless "
            "given, and a job may then take what is left.",
        ),
    ] = None
    host_adapter_memory: Annotated[
        ByteSize, Field(title="Memory", description="For adapters kept ready in host memory.")
    ] = ByteSize(2 << 30)
    max_head_memory: Annotated[
        ByteSize,
        Field(
            title="Memory",
            description="An adapter's own embedding and head at most; each one that is on the device takes as much "
            "there as its own are large, beside adapter_memory.",
        ),
    ] = ByteSize(256 << 20)

    adapter_labels: Annotated[
        int,
        Field(
            title="Metrics and logs",
            ge=0,
            description="Adapters with a metrics label of their own; the rest are 'other'.",
        ),
    ] = 100
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Field(title="Metrics and logs", description="What is logged, to standard error."),
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"],
        Field(title="Metrics and logs", description="Lines for people, or one JSON object a line."),
    ] = "text"
    otlp_endpoint: Annotated[
        str | None,
        Field(
            title="Metrics and logs",
            description="Where traces of requests go, an OpenTelemetry collector such as "
            "http://localhost:4318/v1/traces; needs adaplex[otel].",
        ),
    ] = None

    @field_validator("adapter_weights")
    @classmethod
    def _are_weights(cls, value: str) -> str:
        weights(value)
        return value

    @field_validator("quant_block")
    @classmethod
    def _known_block(cls, value: int) -> int:
        if value not in BLOCKS:
            raise ValueError(f"use one of {', '.join(str(block) for block in BLOCKS)}")
        return value


def weights(text: str) -> dict[str, float]:
    """NAME=WEIGHT pairs with commas between. Raises ValueError."""
    found: dict[str, float] = {}
    for pair in filter(None, text.split(",")):
        name, _, number = (part.strip() for part in pair.rpartition("="))
        if not name or name in found or not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", number) or float(number) < 0.001:
            raise ValueError(f"{pair!r} is not NAME=WEIGHT with a weight from 0.001 to 999999 for a name not yet given")
        found[name] = float(number)
    return found


def load_settings(config: Path | None, environ: Mapping[str, str], flags: Mapping[str, Any]) -> ServerSettings:
    """Merge the sources. flags: only what was given on the command line. StartupError names the key and its source."""
    path = config or (Path(environ[CONFIG_VARIABLE]) if environ.get(CONFIG_VARIABLE) else None)
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, values in (
        ("the configuration file", _from_toml(path) if path else {}),
        ("the environment", _from_environment(environ)),
        ("the command line", dict(flags)),
    ):
        for key, value in values.items():
            if key not in ServerSettings.model_fields:
                raise StartupError(
                    f"unknown setting '{key}' in {source}; known are: {', '.join(ServerSettings.model_fields)}"
                )
            merged[key], origin[key] = value, source
    try:
        return ServerSettings(**merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise StartupError(
            f"setting '{key}' from {origin.get(key, 'the defaults')} is {merged.get(key)!r}: {first['msg']}", param=key
        ) from error


def _from_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise StartupError(f"the configuration file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StartupError(f"the configuration file {path} is not valid TOML: {error}") from error


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables whose names begin with ADAPLEX_, the prefix taken off and in lower case."""
    return {
        name.removeprefix(ENV_PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(ENV_PREFIX)
        and name not in (CONFIG_VARIABLE, SERVER_VARIABLE, KEY_VARIABLE)
        and not _SERVICE_LINK.fullmatch(name)
    }


def host_and_port(address: str, setting: str) -> tuple[str, int]:
    """Split HOST:PORT ([::1]:80 for IPv6). Raises StartupError naming the setting."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise StartupError(f"setting '{setting}' is '{address}', which is not HOST:PORT", param=setting)
    return host.strip("[]") or "127.0.0.1", int(port)
