"""A server may have as many connections as the system allows."""

from __future__ import annotations

import resource

from adaplex_server.cli.descriptors import MOST, raise_limit


def test_the_soft_limit_becomes_the_hard_one() -> None:
    soft, hard = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        assert raise_limit() == (MOST if hard == resource.RLIM_INFINITY else min(hard, MOST))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (raise_limit(), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
