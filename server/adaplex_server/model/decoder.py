"""The one decoder: tokens of all rows in, logits out, for every family and every base format.

The base and the adapter pool are read; keys and values are written where the batch says; nothing else is kept between
steps but the last plan of the adapters.

    total, normed = x + delta, norm(x + delta)
    qkv    = normed -> linear (+ LoRA) -> rotary; keys and values into their pages
    attend = attention -> linear (+ LoRA) (-> norm)
    mlp    = norm(x + attend), or norm(x) or attention's with a parallel residual
             -> linear (+ LoRA) -> activation -> linear (+ LoRA) (-> norm)

Arithmetic follows transformers': norms, rotary angles and softmax in float32, the residual in the dtype of the
activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from adaplex_server.kernels import dense
from adaplex_server.kernels.attention import AttentionRows, attention, attention_rows
from adaplex_server.kernels.bottleneck import BottleneckPlan, add_bottlenecks
from adaplex_server.kernels.factors import FactorPlan
from adaplex_server.kernels.finish import Amended, Unfinished, finish_add_norm, finish_rotary, finished
from adaplex_server.kernels.lora import LoraPages, LoraPlan, LoraStack, plan_lora
from adaplex_server.kernels.lora_tiles import LoraTiles
from adaplex_server.kernels.rotary import Rotation, rotate_and_write, step_rotation
from adaplex_server.model.adapted_linear import Factored, adapted_activation, adapted_linear
from adaplex_server.model.adapter_pool import RANK_PAGE, AdapterPool, with_rank
from adaplex_server.model.alibi import alibi_slopes
from adaplex_server.model.base import Base, NormWeights
from adaplex_server.model.batch import StepBatch, VirtualSpan
from adaplex_server.model.bottlenecks import linears_of, plan_bottlenecks
from adaplex_server.model.ends import Ends
from adaplex_server.model.factors import plan_factors
from adaplex_server.model.families import FAMILIES
from adaplex_server.model.kv_cache import KvCache
from adaplex_server.model.rotary import rotary_tables
from adaplex_server.model.soft_prompt import SoftPrompt

Block = torch.Tensor | Unfinished | Amended
"""What a block gives to the residual stream."""


@dataclass(frozen=True)
class _Step:
    """What the layers of one forward share. local_rotation: of layers with a window."""

    rotation: Rotation
    local_rotation: Rotation
    attention: AttentionRows
    lora: LoraPlan | None
    kv_slots: torch.Tensor
    soft: tuple[tuple[VirtualSpan, SoftPrompt], ...]
    factors: FactorPlan | None
    bottlenecks: BottleneckPlan | None


class Decoder:
    """Runs a base. pool: where the batches' adapter slots are, None to serve the base alone. positions: the longest
    context.
    """

    def __init__(self, base: Base, pool: AdapterPool | None, positions: int | None = None) -> None:
        config = base.config
        self.base = base
        self.pool = pool
        self._family = FAMILIES[config.family]
        self._up = "gate_up" if self._family.gated else "up"
        longest = positions or config.max_context
        self._tables = rotary_tables(config.rope, longest, base.device)
        self._local_tables = None
        if config.local_rope is not None:
            self._local_tables = rotary_tables(config.local_rope, longest, base.device)
        self._slopes = None
        if config.alibi_scale is not None:
            self._slopes = (alibi_slopes(config.num_heads) * config.alibi_scale).to(base.device)
        # Rounded to the dtype of the activations, as transformers does.
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=base.dtype, device=base.device)
        self._lora = None if pool is None else _LoraPlanner(pool)

    @torch.inference_mode()
    def forward(self, batch: StepBatch, kv: KvCache) -> torch.Tensor:
        """Logits of batch.logit_tokens, [L, vocab_size] float32. Writes the keys and values of all tokens of the
        batch.
        """
        lora = self._lora.plan(batch.row_tokens, batch.row_slots) if self._lora is not None else None
        factors, bottlenecks, pool = None, None, self.pool
        if pool is not None:
            rows = batch.row_tokens, batch.row_slots
            factors = plan_factors(*rows, pool.factor_rows, self.base.device)
            bottlenecks = plan_bottlenecks(*rows, pool.bottlenecks, pool.bottleneck_table, RANK_PAGE)
        return self.compute(batch, kv, lora, factors, bottlenecks)

    def lora_plan(self, tiles: LoraTiles) -> LoraPlan:
        """What `compute` needs to serve the adapters of these tiles, whatever is in them by then."""
        assert self._lora is not None, "a base alone has no adapters"
        return self._lora.of(tiles)

    @torch.inference_mode()
    def compute(
        self,
        batch: StepBatch,
        kv: KvCache,
        lora: LoraPlan | None,
        factors: FactorPlan | None = None,
        bottlenecks: BottleneckPlan | None = None,
    ) -> torch.Tensor:
        """As `forward`, with the adapters laid out by the caller. On a GPU it reads only shapes and the batch's tuples
        from the host and never waits, so that a CUDA graph can hold it.
        """
        config = self.base.config
        step = self._step(batch, kv, lora, factors, bottlenecks)
        x = self._embed(batch)
        delta: Block | None = None
        for layer in range(config.num_layers):
            x, delta = self._layer(layer, x, delta, kv, step)
        if batch.logit_tokens.shape[0] != x.shape[0] and not isinstance(delta, Unfinished | Amended):
            x = x.index_select(0, batch.logit_tokens)
            delta = None if delta is None else delta.index_select(0, batch.logit_tokens)
        _, normed = self._norm(x, delta, self.base.final_norm)
        if normed.shape[0] != batch.logit_tokens.shape[0]:
            normed = normed.index_select(0, batch.logit_tokens)
        logits = dense.linear(normed, self.base.head, self.base.head_bias, out_dtype=torch.float32)
        for ends, own in self._ends(batch, batch.row_logits):
            ends.logits(logits[own], normed[own], self.base)
        cap = config.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def _embed(self, batch: StepBatch) -> torch.Tensor:
        """[T, hidden_size], what the first layer reads."""
        base = self.base
        x = F.embedding(batch.tokens, base.embedding)
        for ends, own in self._ends(batch, batch.row_tokens):
            ends.embed(x[own], batch.tokens[own])
        if self._family.scaled_embedding:
            x = x.mul_(self._embedding_scale)
        for span, soft in self._soft_prompts(batch):
            soft.embed(x, span)
        if base.positions is not None:
            x = x.add_(F.embedding(batch.positions + self._family.position_offset, base.positions))
        return x if base.embedding_norm is None else self._norm(x, None, base.embedding_norm)[1]

    def _soft_prompts(self, batch: StepBatch) -> tuple[tuple[VirtualSpan, SoftPrompt], ...]:
        """The batch's virtual tokens, and where to take them from."""
        if not batch.virtual:
            return ()
        assert self.pool is not None, "a row has an adapter where none is served"
        return tuple((span, self.pool.soft[span.slot]) for span in batch.virtual)

    def _ends(self, batch: StepBatch, counts: tuple[int, ...]) -> Iterator[tuple[Ends, slice]]:
        """The embedding and head of rows that have their own, and which part of the step is theirs, where each row has
        so many of it.
        """
        found = {} if self.pool is None else self.pool.ends
        if not any(slot in found for slot in batch.row_slots):
            return
        begin = 0
        for slot, count in zip(batch.row_slots, counts, strict=True):
            if slot in found and count:
                yield found[slot], slice(begin, begin + count)
            begin += count

    def _step(
        self,
        batch: StepBatch,
        kv: KvCache,
        lora: LoraPlan | None,
        factors: FactorPlan | None,
        bottlenecks: BottleneckPlan | None,
    ) -> _Step:
        config = self.base.config
        rows = attention_rows(
            batch.token_start, batch.context_lens, batch.page_table, batch.row_tokens, batch.row_contexts,
            kv.page_size, config.num_kv_heads, config.num_heads, config.windows,
        )  # fmt: skip
        rotation = local = step_rotation(batch.positions, *self._tables, self.base.dtype)
        if self._local_tables is not None:
            local = step_rotation(batch.positions, *self._local_tables, self.base.dtype)
        return _Step(rotation, local, rows, lora, batch.kv_slots, self._soft_prompts(batch), factors, bottlenecks)

    def _layer(
        self, layer: int, x: torch.Tensor, delta: Block | None, kv: KvCache, step: _Step
    ) -> tuple[torch.Tensor, Block]:
        """The residual stream and what is still to be added to it."""
        norms = self.base.layers[layer].norms
        x, normed = self._norm(x, delta, norms["attention"])
        attended = self._beside(layer, "attention", x, self._attend(layer, normed, kv, step), step)
        if self.base.config.parallel_residual:
            if "mlp" in norms:
                _, normed = self._norm(x, None, norms["mlp"])
            return x, finished(self._mlp(layer, normed, step)).add_(finished(attended))
        if "after_attention" in norms:
            _, attended = self._norm(finished(attended), None, norms["after_attention"])
        x, normed = self._norm(x, attended, norms["mlp"])
        result = self._beside(layer, "mlp", x, self._mlp(layer, normed, step), step)
        if "after_mlp" in norms:
            _, result = self._norm(finished(result), None, norms["after_mlp"])
        return x, result

    def _beside(self, layer: int, place: str, x: torch.Tensor, block: torch.Tensor | Unfinished, step: _Step) -> Block:
        """What a block gives to x, with the bottlenecks of the tokens that have some."""
        plan = step.bottlenecks
        if plan is None or self.pool is None:
            return block
        first, last = (self.pool.linears[name] for name in linears_of(self.base.config, place))
        own = finished(block)
        add_bottlenecks(x, own, first.a[layer], last.b[layer], plan)
        return own if isinstance(block, torch.Tensor) else Amended(block, own, plan.slots)

    def _attend(self, layer: int, x: torch.Tensor, kv: KvCache, step: _Step) -> torch.Tensor | Unfinished:
        config, keys, values = self.base.config, kv.keys[layer], kv.values[layer]
        window = config.windows[layer]
        q = self._place_heads(layer, self._linear(layer, "qkv", x, step), keys, values, step)
        for span, soft in step.soft:
            soft.write(layer, keys, values, step.kv_slots, span)
        attended = attention(
            q, keys, values, step.attention, config.attention_scale, window,
            softcap=config.attention_softcap, slopes=self._slopes,
        )  # fmt: skip
        return self._linear(layer, "o", attended, step)

    def _place_heads(
        self,
        layer: int,
        qkv: torch.Tensor | Unfinished,
        keys: torch.Tensor,
        values: torch.Tensor,
        step: _Step,
    ) -> torch.Tensor:
        """q [T, H, D] with its positions; keys and values into their pages."""
        config, norms = self.base.config, self.base.layers[layer].norms
        rotation = step.rotation if config.windows[layer] is None else step.local_rotation
        weights = (norms["q"].weight, norms["k"].weight) if "q" in norms else (None, None)
        where = rotation, step.kv_slots, keys, values, *weights, config.norm_eps
        if isinstance(qkv, Unfinished) and self._family.qkv_layout == "blocks":
            q = finish_rotary(qkv, config.num_heads, *where)
            if q is not None:
                return q
        return rotate_and_write(*self._split(finished(qkv)), *where)

    def _split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [T, H, D], k and v [T, KV, D] of the fused outputs; views, but for q in groups."""
        config = self.base.config
        if self._family.qkv_layout == "groups":
            shared = config.num_heads // config.num_kv_heads
            grouped = qkv.view(qkv.shape[0], config.num_kv_heads, shared + 2, config.head_dim)
            q = grouped[:, :, :shared].reshape(-1, config.num_heads, config.head_dim)
            return q, grouped[:, :, shared], grouped[:, :, shared + 1]
        if self._family.qkv_layout == "heads":
            q, k, v = qkv.view(-1, config.num_heads, 3, config.head_dim).unbind(2)
            return q, k, v
        heads = qkv.view(qkv.shape[0], -1, config.head_dim)
        q, k, v = heads.split_with_sizes((config.num_heads, config.num_kv_heads, config.num_kv_heads), 1)
        return q, k, v

    def _mlp(self, layer: int, x: torch.Tensor, step: _Step) -> torch.Tensor | Unfinished:
        base = self.base.layers[layer].linears[self._up]
        activation, gated = self.base.config.activation, self._family.gated
        factors = self._factored(layer, self._up, step)
        inner = adapted_activation(base, x, step.lora, self._up, layer, activation, gated, factors)
        return self._linear(layer, "down", inner, step)

    def _linear(self, layer: int, linear: str, x: torch.Tensor, step: _Step) -> torch.Tensor | Unfinished:
        base = self.base.layers[layer].linears[linear]
        return adapted_linear(base, x, step.lora, linear, layer, self._factored(layer, linear, step))

    def _factored(self, layer: int, linear: str, step: _Step) -> Factored | None:
        if step.factors is None or self.pool is None:
            return None
        rows = self.pool.linears[linear]
        return Factored(step.factors, rows.a[layer], rows.b[layer])

    def _norm(self, x: torch.Tensor, delta: Block | None, weights: NormWeights) -> tuple[torch.Tensor, torch.Tensor]:
        center = self._family.norm == "layer"
        return finish_add_norm(x, delta, weights.weight, weights.bias, self.base.config.norm_eps, center)


class _LoraPlanner:
    """Keeps the plan of the last step, which serves the next one too while the same rows decode with the same
    adapters.
    """

    def __init__(self, pool: AdapterPool) -> None:
        self._host_pages = pool.host_pages
        self._stacks = {
            name: LoraStack(linear.a, linear.b, linear.scaling, linear.targets.spans)
            for name, linear in pool.linears.items()
        }
        self._pages = LoraPages(pool.slot_pages, pool.slot_page_count, RANK_PAGE, pool.host_pages)
        self._last: tuple[tuple[int, ...], tuple[int, ...], list[tuple[int, ...]]] | None = None
        self._plan: LoraPlan | None = None

    def of(self, tiles: LoraTiles) -> LoraPlan:
        """A plan for tiles that were made elsewhere (on a GPU)."""
        return LoraPlan(self._stacks, self._pages, tiles, {})

    def plan(self, row_tokens: tuple[int, ...], row_slots: tuple[int, ...]) -> LoraPlan | None:
        """The plan of a step with these rows."""
        row_slots = with_rank(row_slots, self._host_pages)
        pages = [self._host_pages[slot] for slot in row_slots if slot >= 0]
        if not pages:
            return None
        # A slot that is written again has another tuple of pages, be they the same pages.
        same = (
            self._last is not None
            and self._last[0] == row_tokens
            and self._last[1] == row_slots
            and all(old is new for old, new in zip(self._last[2], pages, strict=True))
        )
        if not same:
            self._plan = plan_lora(self._stacks, self._pages, row_tokens, row_slots)
            self._last = (row_tokens, row_slots, pages)
        return self._plan
