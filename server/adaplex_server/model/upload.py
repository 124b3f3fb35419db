"""Small tables of numbers to the device without waiting for it: every other way from a list makes the host wait until
the device has done all that it was given.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

Numbers = Sequence[int] | Sequence[float] | Sequence[bool] | Sequence[Sequence[int]] | np.ndarray


def upload(values: Numbers, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The values as a tensor on the device, in the current stream's order."""
    if device.type == "cpu":
        return torch.as_tensor(values, dtype=dtype)
    host = torch.as_tensor(values, dtype=dtype)
    # The allocator of pinned memory gives this piece to nobody before the copy is done.
    return host.pin_memory().to(device, non_blocking=True)


def download(values: torch.Tensor) -> torch.Tensor:
    """The values in pinned host memory, to be read when an event that is recorded after this has passed; on a CPU the
    tensor itself.
    """
    if not values.is_cuda:
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
