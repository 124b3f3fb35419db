"""The JSON files of a model folder in Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adaplex_adapters.errors import StartupError


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The object in a file, or None where there is no such file. Raises StartupError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StartupError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise StartupError(f"cannot read {path}: it holds {type(found).__name__}, not an object")
    return found
