"""What one forward is given. Built by the engine for each step; the model only reads it.

Notation: T tokens of all rows, one after another in the order of the rows; R rows; P pages a row at most; L positions
whose logits are wanted. Prefill chunks and decode rows stand side by side: a decode row has one token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NO_ADAPTER = -1


@dataclass(frozen=True)
class VirtualSpan:
    """Tokens [begin, begin + count) of a step are those of the soft prompt in `slot`, from its `first` one on."""

    slot: int
    begin: int
    count: int
    first: int


@dataclass(frozen=True)
class StepBatch:
    """Device tensors of one step, and the host's own copies of what shapes the launches (never read back from the
    device).

    tokens, positions: [T] int64. kv_slots: [T] int64, page * page_size + offset: where the token's key and value are
    written. token_start: [R + 1] int32. context_lens: [R] int32, keys visible to the row's
    last token, this step's included. page_table: [R, P] int32, unused entries 0 (page 0 is never given to a row and
    holds zeros). logit_tokens: [L] int64, indices
    into T, ascending. virtual: those tokens that are no ids but a soft prompt's. row_tokens, row_contexts, row_slots,
    row_logits: token_start differences, context_lens, the rows' slots and how many of the logit_tokens are theirs, on
    the host.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor
    token_start: torch.Tensor
    context_lens: torch.Tensor
    page_table: torch.Tensor
    logit_tokens: torch.Tensor
    row_tokens: tuple[int, ...]
    row_contexts: tuple[int, ...]
    row_slots: tuple[int, ...]
    virtual: tuple[VirtualSpan, ...] = ()
    row_logits: tuple[int, ...] = ()
