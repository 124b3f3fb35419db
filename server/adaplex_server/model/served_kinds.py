"""Which parts of an adapter the decoder can compute with."""

from __future__ import annotations

from adaplex_adapters.errors import InvalidAdapter
from adaplex_adapters.spec import Adapter


def refuse_unserved(adapter: Adapter) -> None:
    """Raise InvalidAdapter, with the kind and what is missing, when the decoder would leave out a part of it."""
    modules = adapter.modules.values()
    parts = {
        "an adapted embedding": any(module.embedding for module in modules),
        "bottlenecks": bool(adapter.bottlenecks),
        "replaced weights": bool(adapter.replaced),
        "copies of the base's weights": bool(adapter.base_copies),
    }
    found = ", ".join(part for part, there in parts.items() if there)
    if found:
        raise InvalidAdapter(
            f"this server cannot serve adapters of kind {adapter.spec.kind} with {found} yet; it serves low-rank "
            "adapters of linears (LoRA, rsLoRA, DoRA, and AdaLoRA, VeRA, LoHa and LoKr, which are read as such), IA3 "
            "and soft prompts (prompt tuning, P-tuning, prefix tuning)"
        )
