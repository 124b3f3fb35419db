"""How many tokens a step has."""

from __future__ import annotations

from typing import Any

import pytest

from adaplex_server.engine.settings import CPU_STEP_TOKENS, GPU_STEP_TOKENS, EngineSettings, with_step_tokens
from adaplex_server.kernels.lora_tiles import FEW_TOKENS


@pytest.mark.parametrize(
    ("given", "on_gpu", "tokens"),
    [
        ({}, False, CPU_STEP_TOKENS),
        ({}, True, GPU_STEP_TOKENS),
        ({"max_step_tokens": 40}, True, 40),
        ({"batch_invariant": True}, True, FEW_TOKENS),
        ({"batch_invariant": True, "max_step_tokens": 40}, True, 40),
        ({"batch_invariant": True, "max_step_tokens": 4000}, True, FEW_TOKENS),
        ({"batch_invariant": True}, False, CPU_STEP_TOKENS),
    ],
)
def test_tokens_of_a_step(given: dict[str, Any], on_gpu: bool, tokens: int) -> None:
    settings = EngineSettings(base="", store="", base_name="", **given)
    assert with_step_tokens(settings, on_gpu).max_step_tokens == tokens
