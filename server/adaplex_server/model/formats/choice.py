"""Which format a base is kept in: what the checkpoint's own config says, else what the settings say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaplex_adapters.errors import StartupError
from adaplex_server.model.config import ModelConfig
from adaplex_server.model.formats.grouped_checkpoint import parse_awq, parse_gptq
from adaplex_server.model.formats.parts import (
    ReadWeight,
    quantizing,
    read_bitsandbytes,
    read_dense,
    reading_awq,
    reading_gptq,
    reading_llm_int8,
)
from adaplex_server.model.formats.quantization import THRESHOLD, Quantization
from adaplex_server.model.json_file import read_json_object


def choose_format(folder: Path, config: ModelConfig, quantization: Quantization) -> tuple[str, ReadWeight]:
    """The format's name and how to read a weight in it. Raises StartupError where it is not supported."""
    given = config.quantization or _quantize_config(folder)
    if given is None:
        return quantization.format, read_dense if quantization.kind == "none" else quantizing(quantization)
    method = given.get("quant_method", _bitsandbytes(given))
    if method == "bitsandbytes":
        return _of_bitsandbytes(given)
    if method == "gptq":
        form = parse_gptq(given)
        return form.name, reading_gptq(form)
    if method == "awq":
        return "awq", reading_awq(parse_awq(given))
    raise StartupError(
        f"the checkpoint's quant_method {method!r} is not supported; use bitsandbytes, gptq, awq or none"
    )


def _of_bitsandbytes(given: Mapping[str, Any]) -> tuple[str, ReadWeight]:
    if given.get("load_in_8bit", given.get("_load_in_8bit")):
        threshold = float(given.get("llm_int8_threshold", THRESHOLD))
        return "int8", reading_llm_int8(threshold)
    kind = given.get("bnb_4bit_quant_type", "fp4")
    if not given.get("load_in_4bit", given.get("_load_in_4bit")) or kind not in ("nf4", "fp4"):
        raise StartupError(f"the checkpoint is bitsandbytes of type {kind!r}; nf4, fp4 and 8-bit are read")
    return kind + ("-double" if given.get("bnb_4bit_use_double_quant") else ""), read_bitsandbytes


def _bitsandbytes(given: Mapping[str, Any]) -> str | None:
    """Old configs do not name the method."""
    return "bitsandbytes" if given.get("load_in_4bit") or given.get("load_in_8bit") else None


def _quantize_config(folder: Path) -> dict[str, Any] | None:
    """AutoGPTQ's own file, for checkpoints whose config.json says nothing."""
    found = read_json_object(folder / "quantize_config.json")
    return None if found is None else {"quant_method": "gptq", **found}
