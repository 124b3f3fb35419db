"""What rows wish of a random token, for the kernel that chooses it (`kernels/choice.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from adaplex_server.engine.randomness import uniform
from adaplex_server.engine.row import Row
from adaplex_server.kernels.choice import choose


def choose_randomly(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """logits [R, V] float32, every row with temperature > 0. Token ids [R] int64."""
    wishes = np.empty((len(rows), 5))
    for i, row in enumerate(rows):
        s = row.sampling
        wishes[i] = (s.temperature, uniform(s.seed, row.generated), s.top_k, s.top_p, s.min_p)
    return choose(logits, wishes)
