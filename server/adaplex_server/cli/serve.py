"""`adaplex serve`: builds the parts from the settings and runs them until a signal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from adaplex_server.cli.options import with_settings
from adaplex_server.settings import load_settings


def _serve(config: Path | None, flags: dict[str, Any]) -> None:
    """Serve a base model and its adapters over HTTP (OpenAI's API) and gRPC.

    Without options it serves the embedded SmolLM2-135M-Instruct, quantized to NF4 once into the cache folder, with
    three demo adapters, on 127.0.0.1:8000 (HTTP) and 127.0.0.1:50051 (gRPC).

    Every option is also a key of the TOML file and an environment variable; the command line wins over the environment,
    and the environment over the file.

    Examples:

      adaplex serve --base ./Llama-3.1-8B --adapters ./adapters --kv-memory 20GiB

      adaplex serve --base ./Llama-2-7b-Chat-GPTQ --http 0.0.0.0:8000

      ADAPLEX_MAX_ROWS=128 adaplex serve --config adaplex.toml
    """
    settings = load_settings(config, os.environ, flags)
    print(settings)


serve = with_settings(_serve)
