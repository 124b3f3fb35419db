"""Where the demo adapters are: inside an installed package, or in the examples of a source checkout."""

from __future__ import annotations

from pathlib import Path

PACKAGED = Path(__file__).parent.parent / "demo"
CHECKOUT = Path(__file__).parents[3] / "examples"


def demo_adapters() -> dict[str, Path]:
    """Name -> PEFT folder of each demo adapter, sorted by name. Empty when the package was built without them."""
    folders = list(PACKAGED.glob("*/adapter_config.json")) or list(CHECKOUT.glob("*/adapter/adapter_config.json"))
    named = {(p.parent.parent if p.parent.name == "adapter" else p.parent).name: p.parent for p in folders}
    return dict(sorted(named.items()))
