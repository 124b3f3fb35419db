"""Before anything is loaded: what a run will train, how much memory each part of it takes, and about how long it
will last. Estimates from the base's config, the rows' lengths and the options; a run that cannot fit is refused with
what would.

What the parts are, for n trained weights: the weights themselves and their gradients 4 n bytes each, the optimizer's
two moments 8 n (2 n in 8 bits); activations grow with the tokens of a forward pass, and with checkpointing all but one
layer keep their input alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaplex_adapters.errors import InvalidRequest
from adaplex_adapters.training.answer_loss import HEAD_ROWS
from adaplex_adapters.training.base_outline import BaseOutline, outline_base
from adaplex_adapters.training.frozen_base import base_form, compute_dtype, read_base_config, training_device
from adaplex_adapters.training.memory import available_bytes, resident_bytes
from adaplex_adapters.training.methods.attach import wants_checkpointing
from adaplex_adapters.training.micro_batch_graphs import LARGEST
from adaplex_adapters.training.optimizers import optimizer_name
from adaplex_adapters.training.options import PREFIX, SOFT_PROMPTS, TrainOptions
from adaplex_adapters.training.precision import mixed_dtype
from adaplex_adapters.training.rows import Rows
from adaplex_adapters.training.trainer import count_steps

# Bytes a weight of a quantized linear takes on a GPU; the scales are one a block of 64 (32 bits, or 8 with double
# quantization), one a row, or one a group of 128.
_BYTES = {"nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64, "int8": 1.0, "gptq": 0.5 + 2.5 / 128}
_DOUBLE_SAVED = 3 / 64
_GPU_CONTEXT = 600 * 2**20
_EFFICIENCY = {"cpu": 0.45, "cuda": 0.4}
# Of fused passes: the share at any number of tokens, and the tokens at which it is half of that (measured on an H200
# with the 8B shape; what a pass does once, such as expanding the weights, is felt in small ones).
_FUSED_EFFICIENCY, _FUSED_HALF = 0.75, 600
_MARGIN = 1.05
# A CPU's allocator keeps holes between what lives long and what each layer frees (measured with SmolLM2, glibc): this
# much more than what is saved without checkpointing, this share of it with.
_CPU_WASTE, _CPU_KEPT = 1.2, 0.45


@dataclass(frozen=True)
class Plan:
    """parts: bytes by name, all held at one time at worst. seconds: an estimate. available: bytes that may be used."""

    parameters: int
    steps: int
    tokens: int
    parts: tuple[tuple[str, int], ...]
    seconds: float
    available: int
    device: str

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(size for _, size in self.parts)

    @property
    def fits(self) -> bool:
        """Whether it may be started."""
        return self.total * _MARGIN <= self.available

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**dataclasses.asdict(self), "parts": dict(self.parts), "total": self.total, "fits": self.fits}


@dataclass(frozen=True)
class Site:
    """Where a run is to take place. limit: bytes that it may use, None for what is free. flops: measured or given."""

    device: torch.device
    available: int
    flops: float


def measure_site(device: str, limit: int | None, precision: str) -> Site:
    """The device, its free memory (with what this process holds already) and its speed in a quarter of a second."""
    place = training_device(device)
    free = available_bytes(place) + (resident_bytes() if place.type == "cpu" else 0)
    return Site(place, min(free, limit) if limit else free, _measured_flops(place, compute_dtype(precision, place)))


def make_plan(folder: Path, rows: Rows, options: TrainOptions, site: Site) -> Plan:
    """What the run takes. Raises StartupError for a folder that is no base, InvalidRequest for unknown targets."""
    outline = outline_base(folder, options)
    form = base_form(read_base_config(folder), options)
    lengths = sorted((len(e.ids) for e in rows.train), reverse=True)
    sequences = -(-sum(lengths) // options.max_length) if options.packing else len(lengths)
    virtual = options.virtual_tokens if options.method in SOFT_PROMPTS else 0
    steps = count_steps(sequences, options)
    passes = steps * options.accumulation
    per_row = sum(lengths) / max(1, sequences) + virtual
    tokens = int(min(passes * options.batch_size, sequences * options.epoch_limit) * per_row)
    widest = (options.max_length if options.packing else lengths[0]) + virtual
    largest = options.batch_size * widest
    recorded = LARGEST if outline.fused and site.device.type == "cuda" and largest > LARGEST else 0
    parts = (
        *_held(outline, form, options, site.device),
        ("activations", _activations(outline, options, site.device, largest)),
        ("graphs", _activations(outline, options, site.device, recorded) if recorded else 0),  # of smaller batches
        ("head", _head(outline, options, site.device, rows, options.batch_size)),
        ("program", _GPU_CONTEXT if site.device.type == "cuda" else resident_bytes()),
    )
    flops = tokens * outline.flops_a_token(options, wants_checkpointing(options, site.device), int(per_row))
    seconds = flops / site.flops / _efficiency(outline, site.device, per_row * options.batch_size)
    return Plan(outline.trained, steps, tokens, parts, seconds, site.available, str(site.device))


def check_plan(plan: Plan, folder: Path, rows: Rows, options: TrainOptions, site: Site) -> None:
    """Raise InvalidRequest when the plan does not fit, saying what would."""
    if plan.fits:
        return
    needed, there = plan.total / 2**30, plan.available / 2**30
    fitting = next((text for text, other in _smaller(options) if make_plan(folder, rows, other, site).fits), None)
    hint = f"this would fit: {fitting}" if fitting else "no smaller setting fits; use a smaller base or another machine"
    raise InvalidRequest(
        f"the run needs about {needed:.2f} GiB of memory and {there:.2f} GiB are free; {hint}", param="batch_size"
    )


def check_plans_together(plans: Sequence[Plan]) -> None:
    """Raise InvalidRequest unless runs that share one base and each pass fit at one time."""
    shared = ("base", "program")
    once = sum(size for name, size in plans[0].parts if name in shared)
    total = once + sum(size for plan in plans for name, size in plan.parts if name not in shared)
    if total * _MARGIN > plans[0].available:
        needed, there = total / 2**30, plans[0].available / 2**30
        raise InvalidRequest(
            f"the {len(plans)} runs need about {needed:.2f} GiB of memory at one time and {there:.2f} GiB are free; "
            "train fewer together, one after another, or with a smaller batch_size",
            param="together",
        )


def plan_lines(plan: Plan) -> Iterator[str]:
    """For people."""
    yield f"{plan.parameters:,} weights to train, {plan.steps} steps, {plan.tokens:,} tokens"
    for name, size in (*plan.parts, ("together", plan.total), ("free", plan.available)):
        yield f"  {name:<12} {size / 2**20:>10,.1f} MiB"
    minutes, seconds = divmod(round(plan.seconds), 60)
    yield f"about {minutes} min {seconds} s on {plan.device}" + ("" if plan.fits else "; it does not fit")


def _efficiency(outline: BaseOutline, device: torch.device, tokens: float) -> float:
    if outline.fused and device.type == "cuda":
        return _FUSED_EFFICIENCY * tokens / (tokens + _FUSED_HALF)
    return _EFFICIENCY[device.type]


def _held(outline: BaseOutline, form: str, options: TrainOptions, device: torch.device) -> Iterator[tuple[str, int]]:
    dense = compute_dtype(options.precision, device).itemsize
    saved = _DOUBLE_SAVED if options.double_quant and form in ("nf4", "fp4") else 0.0
    a_weight = _BYTES[form] - saved if form in _BYTES and device.type == "cuda" else float(dense)
    other = 4 if options.upcast_base else dense
    yield "base", int(outline.linear_weights * a_weight) + outline.other_weights * other
    frozen = outline.trained if options.init == "pissa" else 0
    yield "adapter", 4 * (outline.trained + frozen)
    halves = 4 if outline.fused and device.type == "cuda" else 0  # weights and gradients as they are multiplied
    yield "gradients", (4 + halves) * outline.trained
    moments = 2.1 if optimizer_name(options, device).endswith("_8bit") else 8.0
    yield "optimizer", int(moments * outline.trained)
    yield "best so far", 4 * outline.trained if device.type == "cpu" else 0


def _activations(outline: BaseOutline, options: TrainOptions, device: torch.device, tokens: int) -> int:
    """What one forward pass keeps for its gradient."""
    mixed = mixed_dtype(options, device)
    base = compute_dtype(options.precision, device).itemsize
    # Without autocast the adapter's own products are in float32, and so is the input that each of them keeps.
    own = base if mixed is not None else 4
    layer = base * outline.layer_outputs * 1.4 + own * outline.layer_adapted_inputs + 6 * base * outline.hidden
    if outline.fused and device.type == "cuda":  # the linears' outputs but for two, and five times the residual stream
        layer = base * (outline.layer_outputs + 3 * outline.hidden)
    expanded = 2 * base * outline.largest_linear if device.type == "cuda" else 0
    whole = tokens * outline.layers * layer
    if not wants_checkpointing(options, device):
        return int(whole * (_CPU_WASTE if device.type == "cpu" else 1.0)) + expanded
    kept = tokens * (outline.layers * outline.hidden * base + 2 * layer)
    return int(max(kept, _CPU_KEPT * whole) if device.type == "cpu" else kept) + expanded


def _head(outline: BaseOutline, options: TrainOptions, device: torch.device, rows: Rows, batch: int) -> int:
    """Logits, their float32 copy and its gradient, for the learned tokens of one pass, HEAD_ROWS at a time."""
    learned = sorted((e.learned for e in rows.train), reverse=True)[:batch]
    count = HEAD_ROWS if options.packing else min(HEAD_ROWS, sum(learned))
    if outline.fused and device.type == "cuda":
        return 2 * (count * outline.vocabulary + 3 * sum(learned) * outline.hidden)
    return count * outline.vocabulary * (2 * compute_dtype(options.precision, device).itemsize + 8)


def _smaller(options: TrainOptions) -> Iterator[tuple[str, TrainOptions]]:
    """Settings to try, those first that change the result least."""
    changed, said = options, []
    if options.method != PREFIX and not options.gradient_checkpointing:
        changed = dataclasses.replace(changed, gradient_checkpointing=True)
        said.append("gradient_checkpointing=true")
        yield ", ".join(said), changed
    batch = options.batch_size
    while batch > 1:
        batch = batch // 2
        smaller = dataclasses.replace(
            changed, batch_size=batch, accumulation=-(-options.batch_size * options.accumulation // batch)
        )
        yield ", ".join([*said, f"batch_size={batch}", f"accumulation={smaller.accumulation}"]), smaller
    smaller = dataclasses.replace(
        changed, batch_size=1, accumulation=options.batch_size * options.accumulation, optimizer="paged_adamw_8bit"
    )
    said += ["batch_size=1", f"accumulation={smaller.accumulation}", "optimizer=paged_adamw_8bit"]
    yield ", ".join(said), smaller
    for length in (options.max_length // 2, options.max_length // 4):
        if length >= 8:
            yield ", ".join([*said, f"max_length={length}"]), dataclasses.replace(smaller, max_length=length)


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product that looks like a linear's."""
    size = 4096 if device.type == "cuda" else 768
    x = torch.ones(256 if device.type == "cpu" else 2048, size, dtype=dtype, device=device)
    w = torch.ones(size, size, dtype=dtype, device=device)
    torch.matmul(x, w)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < 0.25:
        torch.matmul(x, w)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done += 1
    return 2.0 * x.numel() * size * done / (time.perf_counter() - began)
