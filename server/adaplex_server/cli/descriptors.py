"""As many connections as the system lets a process have. Owns nothing."""

from __future__ import annotations

import resource

MOST = 65536


def raise_limit() -> int:
    """Raise the soft limit of open files, often 1024, to the hard one, but not above MOST; the limit that holds now.
    Each connection takes one, and a server without any left can neither answer nor start its engine again.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinite = resource.RLIM_INFINITY
    wanted = MOST if hard == infinite else min(hard, MOST)
    if soft == infinite or soft >= wanted:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted
