"""From a file of examples to a PEFT folder: the one place that calls the steps of training in order. Keeps nothing."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.training.batches import batches_per_epoch, ordered_batches, shuffled_batches
from adaplex_adapters.training.conversations import Example
from adaplex_adapters.training.encoding import EncodedExample, encode_example
from adaplex_adapters.training.frozen_base import FrozenBase
from adaplex_adapters.training.loop import mean_loss, training_steps
from adaplex_adapters.training.options import ALL_LINEAR, TrainOptions, learning_rate_for
from adaplex_adapters.training.progress import Progress
from adaplex_adapters.training.result import round_adapter, save_adapter
from adaplex_adapters.training.split import split_examples

SAVED_DTYPE = torch.bfloat16
SHOWN_LINES = 8


@dataclass(frozen=True)
class TrainResult:
    """Losses are means over the answers' tokens (nats); those on held-out rows are None when none were held out.

    parameters: trained scalars. tokens: real tokens read in all steps. seconds: the steps alone.
    """

    out: Path
    examples: int
    held_out: int
    too_long: int
    parameters: int
    steps: int
    tokens: int
    seconds: float
    loss_first: float
    loss_last: float
    held_out_before: float | None
    held_out_after: float | None


@dataclass(frozen=True)
class _Rows:
    train: list[EncodedExample]
    held_out: list[EncodedExample]
    too_long: int


def train_adapter(
    examples: tuple[Example, ...], base: FrozenBase, out: Path, options: TrainOptions, progress: Progress
) -> TrainResult:
    """Train a fresh LoRA adapter on the examples and write it to `out`.

    The base's weights are not changed, but PEFT puts its layers into `base.model`: load a base anew for the next run.
    """
    rows = _encode(examples, base, options, progress)
    model = attach_lora(base, options)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    progress.note(f"{len(rows.train)} rows to learn, {len(rows.held_out)} held out, {parameters:,} weights to train")
    pad = _pad_id(base.tokenizer)

    def held_out_loss() -> float | None:
        measured = ordered_batches(rows.held_out, options.batch_size, pad)
        return mean_loss(model, measured, base.device) if rows.held_out else None

    before = held_out_loss()
    if before is not None:
        progress.note(f"held-out loss before: {before:.4f}")
    steps = count_steps(len(rows.train), options)
    rate = options.learning_rate or learning_rate_for(base.hidden_size)
    batches = shuffled_batches(rows.train, options.batch_size, pad, options.seed)
    progress.begin(steps)
    began, tokens, losses = time.monotonic(), 0, []
    for report in training_steps(model, batches, options, steps, rate, base.device):
        tokens += report.tokens
        losses.append(report.loss)
        progress.step(report)
    seconds = time.monotonic() - began
    progress.end()
    round_adapter(model, SAVED_DTYPE)
    after = held_out_loss()
    if after is not None:
        progress.note(f"held-out loss after: {after:.4f}")
    save_adapter(model, out, base.name, SAVED_DTYPE)
    return TrainResult(
        out=out,
        examples=len(rows.train),
        held_out=len(rows.held_out),
        too_long=rows.too_long,
        parameters=parameters,
        steps=steps,
        tokens=tokens,
        seconds=seconds,
        loss_first=losses[0],
        loss_last=losses[-1],
        held_out_before=before,
        held_out_after=after,
    )


def count_steps(examples: int, options: TrainOptions) -> int:
    """Updates in a run: whole epochs of batches, accumulated, but at most `max_steps` and at least one."""
    planned = batches_per_epoch(examples, options.batch_size) * options.epochs / options.accumulation
    return max(1, min(math.ceil(planned), options.max_steps or math.ceil(planned)))


def attach_lora(base: FrozenBase, options: TrainOptions) -> Any:
    """PEFT's model around the base with fresh float32 LoRA weights (B zero, A random by the seed)."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    torch.manual_seed(options.seed)
    random.seed(options.seed)
    model = base.model
    if base.device.type == "cuda":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    everything = options.targets == (ALL_LINEAR,)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.dropout,
        use_rslora=options.rslora,
        target_modules=ALL_LINEAR if everything else list(options.targets),
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InvalidRequest(f"targets {', '.join(options.targets)}: {error}", param="targets") from error


def _encode(examples: tuple[Example, ...], base: FrozenBase, options: TrainOptions, progress: Progress) -> _Rows:
    split = split_examples(examples, options.held_out, options.seed)
    if split.duplicates:
        progress.note(
            f"{split.duplicates} rows repeat the prompt of an earlier one; kept, on the same side of the split"
        )
    train = [encode_example(e, base.tokenizer) for e in split.train]
    held_out = [encode_example(e, base.tokenizer) for e in split.held_out]
    long = sorted(e.line for e in (*train, *held_out) if len(e.ids) > options.max_length)
    if long:
        shown = ", ".join(map(str, long[:SHOWN_LINES])) + (", ..." if len(long) > SHOWN_LINES else "")
        progress.note(f"{len(long)} rows are longer than {options.max_length} tokens and are left out (lines {shown})")
    train = [e for e in train if len(e.ids) <= options.max_length]
    held_out = [e for e in held_out if len(e.ids) <= options.max_length]
    if not train:
        raise InvalidRequest(f"every row is longer than max_length {options.max_length}", param="max_length")
    return _Rows(train, held_out, len(long))


def _pad_id(tokenizer: Any) -> int:
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(found or 0)
