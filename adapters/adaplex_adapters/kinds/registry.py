"""Which file reads which kind, and why the other kinds are refused."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from adaplex_adapters.kinds.adalora import read_adalora
from adaplex_adapters.kinds.bottleneck import read_bottleneck
from adaplex_adapters.kinds.composition import PEFT_TYPE as COMPOSITION
from adaplex_adapters.kinds.composition import read_composition
from adaplex_adapters.kinds.ia3 import read_ia3
from adaplex_adapters.kinds.lora import read_lora
from adaplex_adapters.kinds.lycoris import read_loha, read_lokr
from adaplex_adapters.kinds.prefix import read_prefix_tuning
from adaplex_adapters.kinds.prompts import read_p_tuning, read_prompt_tuning
from adaplex_adapters.kinds.reading import KindReader
from adaplex_adapters.kinds.vera import read_vera
from adaplex_adapters.peft_fields import CONFIG_FILE
from adaplex_adapters.problems import refuse, shown

KINDS: Mapping[str, KindReader] = MappingProxyType(
    {
        "ADALORA": read_adalora,
        "IA3": read_ia3,
        "LOHA": read_loha,
        "LOKR": read_lokr,
        "LORA": read_lora,
        "PREFIX_TUNING": read_prefix_tuning,
        "PROMPT_TUNING": read_prompt_tuning,
        "P_TUNING": read_p_tuning,
        "VERA": read_vera,
    }
)
"""By PEFT's peft_type."""

_ROTATES = "rotates the base's weights, so that its change is as large as the base"
_DENSE = "changes weights by more than a product of two thin matrices"
_OTHERS: Mapping[str, str] = MappingProxyType(
    {
        "ADAPTION_PROMPT": "adds gated prompts inside attention (LLaMA-Adapter)",
        "BOFT": _ROTATES,
        "C3A": _DENSE,
        "CARTRIDGE": "is a cache of keys and values that was distilled from a text",
        "CPT": "is a prompt with a loss of its own (context-aware prompt tuning)",
        "FOURIERFT": _DENSE,
        "HRA": _ROTATES,
        "LN_TUNING": "replaces the base's norms, which all rows share",
        "MULTITASK_PROMPT_TUNING": "needs a task's number with each request",
        "OFT": _ROTATES,
        "OSF": "replaces the base's weights",
        "POLY": "needs a task's number with each request",
        "RANDLORA": _DENSE,
        "ROAD": _ROTATES,
        "SHIRA": _DENSE,
        "TRAINABLE_TOKENS": "replaces rows of the embedding, which all rows share",
        "VBLORA": "builds its matrices from a bank of vectors",
        "WAVEFT": _DENSE,
        "XLORA": "mixes adapters by a network of its own",
    }
)


def reader_of(fields: Mapping[str, Any]) -> KindReader:
    """The reader for a config. Raises InvalidAdapter for a kind that is not served, and names it."""
    kind = fields.get("peft_type")
    if kind == COMPOSITION:
        return lambda source: read_composition(source, reader_of)
    served = ", ".join(sorted(KINDS))
    if kind is None and isinstance(fields.get("config"), dict):
        return read_bottleneck
    if kind is None:
        raise refuse(
            f"{CONFIG_FILE} has no peft_type and no config of the adapters library; it is read with peft_type {served}."
        )
    if isinstance(kind, str) and kind in KINDS:
        return KINDS[kind]
    reason = _OTHERS.get(kind) if isinstance(kind, str) else None
    because = f" It {reason}." if reason else ""
    raise refuse(
        f"{CONFIG_FILE} says peft_type {shown(kind)}, a kind that is not served.{because} Served are {served}."
    )
