"""How much memory there is, and how much a run took."""

from __future__ import annotations

import resource

import torch


def available_bytes(device: torch.device) -> int:
    """Free memory now: the GPU's, or the machine's that can be had without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def resident_bytes() -> int:
    """Memory that this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def reset_peak(device: torch.device) -> None:
    """Measure a GPU's peak from here on; a process's peak on the CPU cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most that was held: on a GPU by tensors since `reset_peak`, on a CPU by the process since it began."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
