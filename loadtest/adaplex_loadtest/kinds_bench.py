"""What a batch of several kinds of adapters costs beside the same batch of LoRAs: prefill, decode step and their ratio.

Both are run in one engine, in turns, so that a drifting machine hurts both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from msgspec import structs

from adaplex_adapters.spec import KIND_LORA
from adaplex_loadtest.engine_bench import Batch, EngineBench, Timed, described
from adaplex_loadtest.random_kinds import VIRTUAL_TOKENS, RandomKinds
from adaplex_loadtest.statistics import percentile, report
from adaplex_server.engine.settings import EngineSettings
from adaplex_server.model.base import Base
from adaplex_server.model.families import base_shape

GOAL = 1.15
"""Times the step of the LoRAs, at most."""


def bench(
    base: Base,
    settings: EngineSettings,
    batches: Sequence[Batch],
    sets: Sequence[tuple[str, ...]],
    rank: int,
    repeats: int = 3,
) -> list[str]:
    """A JSON line for each batch with each set of kinds, which take turns among its adapters. settings: of an engine
    for `batches`; here it gets room for the sets beside the LoRAs, and for the widest bottleneck.
    """
    count = max(batch.adapters for batch in batches)
    kinds = RandomKinds(base_shape(base.config), rank, base.dtype)
    adapters = [kinds.made(one, count, i * count) for i, one in enumerate(((KIND_LORA,), *sets))]
    running = EngineBench(base, _with_room(settings, kinds, count * len(adapters)), list(chain(*adapters)))
    lines = []
    for batch in batches:
        for i, one in enumerate(sets):
            mixed = replace(batch, first=(i + 1) * count)
            turns = [(running.run(batch), running.run(mixed)) for _ in range(repeats)]
            lines.append(
                report(
                    benchmark="engine, kinds",
                    **described(base, batch),
                    kinds=one,
                    rank=rank,
                    bottleneck=kinds.width,
                    virtual_tokens=VIRTUAL_TOKENS,
                    prompt_tokens=batch.prompt_tokens,
                    output_tokens=batch.output_tokens,
                    **_compared(turns),
                )
            )
    return lines


def _compared(turns: Sequence[tuple[Timed, Timed]]) -> dict[str, object]:
    """Milliseconds of the LoRAs and of the kinds, the fastest prefill and the median over all steps; and the ratio of
    the steps, in all and turn by turn.
    """
    loras, kinds = zip(*turns, strict=True)

    def step(of: Sequence[Timed]) -> float:
        return percentile([seconds for one in of for seconds in one.steps], 0.5)

    return {
        "lora_prefill_ms": round(min(one.prefill for one in loras) * 1e3, 1),
        "prefill_ms": round(min(one.prefill for one in kinds) * 1e3, 1),
        "lora_step_ms": round(step(loras) * 1e3, 3),
        "step_ms": round(step(kinds) * 1e3, 3),
        "step_p99_ms": round(percentile([seconds for one in kinds for seconds in one.steps], 0.99) * 1e3, 3),
        "ratios": [round(step([mixed]) / step([lora]), 3) for lora, mixed in turns],
        "ratio": round(step(kinds) / step(loras), 3),
        "goal": GOAL,
    }


def _with_room(settings: EngineSettings, kinds: RandomKinds, slots: int) -> EngineSettings:
    return structs.replace(settings, max_slots=slots, max_rank=max(settings.max_rank, kinds.width))
