"""What becomes of a dense checkpoint's linears while it is loaded, as the settings say it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adaplex_adapters.errors import StartupError

QuantizeKind = Literal["nf4", "fp4", "int8", "int8-absmax", "int8-zeropoint", "none"]
BLOCK = 64
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
THRESHOLD = 6.0


@dataclass(frozen=True)
class Quantization:
    """kind: bitsandbytes' 4-bit types, LLM.int8, weight-only int8 by rows, or as they are. double_quant, block: of the
    4-bit types, whether absmax is quantized too, and values that share one. int8_threshold: of LLM.int8's outliers, 0
    for none.

    Raises StartupError for a block or threshold that cannot be.
    """

    kind: QuantizeKind = "nf4"
    double_quant: bool = True
    block: int = BLOCK
    int8_threshold: float = THRESHOLD

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise StartupError(
                f"blocks of {self.block} values are not supported; use one of {BLOCKS}", param="quant_block"
            )
        if not self.int8_threshold >= 0:
            raise StartupError(f"the threshold {self.int8_threshold} must be 0 or more", param="int8_threshold")

    @property
    def format(self) -> str:
        """What a base quantized so is called: "nf4-double", "int8", ..."""
        four_bit = self.kind in ("nf4", "fp4")
        return self.kind + ("-double" if four_bit and self.double_quant else "")
