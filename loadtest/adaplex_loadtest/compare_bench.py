"""transformers and PEFT beside the engine, in one run on one base, in turns so that a drifting machine hurts both."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from adaplex_adapters.reader import read_adapter
from adaplex_loadtest.engine_bench import Batch, EngineBench, settings_for
from adaplex_loadtest.peft_bench import PeftWorkload
from adaplex_loadtest.random_adapters import write_random_lora
from adaplex_loadtest.statistics import report
from adaplex_server.bases.embedded import ensure_embedded
from adaplex_server.engine.assembly import choose_device
from adaplex_server.model.base import load_base
from adaplex_server.model.config import read_config
from adaplex_server.model.families import base_shape


def compare(
    batches: Sequence[tuple[int, int]], prompt: int, output: int, rank: int, threads: int | None, repeats: int
) -> list[str]:
    """A JSON line for each batch of (rows, adapters): tokens a second of both, prefill included, and the ratio."""
    threads = threads or len(os.sched_getaffinity(0))
    device = choose_device("auto")
    folder = ensure_embedded()
    config = read_config(folder)
    base = load_base(folder, config=config, quantize="nf4", double_quant=True, dtype=torch.bfloat16, device=device)
    shape = base_shape(config)
    measured = [Batch(rows, adapters, prompt, output) for rows, adapters in batches]
    count = max(batch.adapters for batch in measured)
    with tempfile.TemporaryDirectory() as made:
        folders = [write_random_lora(Path(made) / str(i), shape, rank=rank, seed=i) for i in range(count)]
        settings = settings_for(measured, rank, Path(made), threads=threads, page_size=16)
        ours = EngineBench(base, settings, [read_adapter(one, shape) for one in folders])
        theirs = PeftWorkload(folder, folders, str(device), threads)
        return [_one(ours, theirs, batch, config.vocab_size, repeats) for batch in measured]


def _one(ours: EngineBench, theirs: PeftWorkload, batch: Batch, vocab: int, repeats: int) -> str:
    prompts = [[(row * 7919 + i * 31) % vocab for i in range(batch.prompt_tokens)] for row in range(batch.rows)]
    tokens = batch.rows * batch.output_tokens
    our_best = their_best = 0.0
    for _ in range(repeats + 1):  # the first turn warms both up, and can only lose
        our_best = max(our_best, tokens / ours.run(batch).total)
        speed = theirs.tokens_per_second(prompts, batch.output_tokens, mixed=batch.adapters > 0)
        their_best = max(their_best, speed)
    return report(
        benchmark="peft",
        rows=batch.rows,
        adapters=batch.adapters,
        prompt_tokens=batch.prompt_tokens,
        output_tokens=batch.output_tokens,
        adaplex_tokens_per_second=round(our_best, 1),
        peft_tokens_per_second=round(their_best, 1),
        ratio=round(our_best / their_best, 2),
    )
