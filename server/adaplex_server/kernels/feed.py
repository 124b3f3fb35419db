"""The tokens of a step between two steps: those that the step before chose go in, and the likeliest ones come out.

Source of a row: its place in the step before, or negative where the host has given the token.
"""

from __future__ import annotations

import torch


def feed_tokens(tokens: torch.Tensor, sources: torch.Tensor, chosen: torch.Tensor) -> None:
    """tokens [R] int64: those with a source (sources [R] int32) become chosen[source] (chosen int64), in place."""
    if tokens.is_cuda:
        from adaplex_server.kernels.gpu import feed as gpu

        gpu.feed_tokens(tokens, sources, chosen)
        return
    tokens.copy_(torch.where(sources >= 0, chosen[sources.clamp(min=0).long()], tokens))


def likeliest(logits: torch.Tensor, kept: torch.Tensor, best: torch.Tensor, tokens: torch.Tensor) -> None:
    """logits [R, V] float32 are copied to kept [R, V]; best [R] int64 becomes the likeliest token (the lowest of
    equals), or -1 where a logit is not finite; tokens [R] int64 the same, but there any token. R may be 0.
    """
    if logits.is_cuda:
        from adaplex_server.kernels.gpu import feed as gpu

        gpu.likeliest(logits, kept, best, tokens)
        return
    kept.copy_(logits)
    found = logits.argmax(-1)
    tokens.copy_(found)
    best.copy_(found.masked_fill(~logits.isfinite().all(-1), -1))
