"""Prompts in pieces beside the rows that decode, or in one large step."""

from __future__ import annotations

import itertools

from adaplex_server.engine.prompt_share import prompt_share


def test_short_prompts_are_read_in_cheap_steps() -> None:
    assert prompt_share(128, 40, 8192, [80]) == 88
    assert prompt_share(128, 64, 8192, [64] * 8) == 64
    assert prompt_share(128, 0, 8192, [300]) == 128
    assert prompt_share(128, 0, 32, [20]) == 32


def test_a_burst_or_a_long_prompt_is_read_at_once() -> None:
    assert prompt_share(128, 64, 8192, [64] * 8 + [1]) == 8192
    assert prompt_share(128, 0, 8192, [512]) == 8192


def test_a_step_full_of_decoding_rows_leaves_no_cheap_room() -> None:
    assert prompt_share(128, 120, 8192, [20]) == 8192


def test_no_more_prompts_are_looked_at_than_needed() -> None:
    assert prompt_share(128, 64, 8192, itertools.repeat(100)) == 8192
