"""Rows that have begun: their order, who gives up pages for whom, and the audit."""

from __future__ import annotations

import pytest

from adaplex_server.engine.adapter_slots import AdapterSlots
from adaplex_server.engine.begun import BegunRows
from adaplex_server.engine.leaving import Leaving
from adaplex_server.engine.page_pool import PagePool
from adaplex_server.engine.prefix_cache import PrefixCache
from adaplex_server.engine.row import Row
from adaplex_server.engine.row_pages import RowPages
from adaplex_server.vocabulary import SamplingParams

PAGE = 8


class World:
    """Begun rows over so many pages (the first is nobody's), and rows of one full page each."""

    def __init__(self, pages: int) -> None:
        cache = PrefixCache(PagePool(pages), PAGE, False)
        leaving = Leaving(cache, AdapterSlots(1, 1, 1))
        self.pages = RowPages(cache, leaving, PAGE)
        self.begun = BegunRows(self.pages, leaving)

    def row(self, arrival: int) -> Row:
        sampling = SamplingParams(max_tokens=100)
        tokens = list(range(1, PAGE + 1))
        row = Row(arrival, tokens, PAGE, sampling, None, None, 0, arrival, 100, state="waiting")
        assert self.begun.begin(row)
        row.computed = row.settled = PAGE
        row.tokens.append(9)
        return row

    def running(self) -> list[int]:
        self.begun.check_integrity()
        return [row.id for row in self.begun.running]


def test_the_last_row_in_order_gives_up_its_pages_and_begins_again() -> None:
    world = World(6)
    second, first, third = (world.row(arrival) for arrival in (2, 1, 3))
    assert world.running() == [1, 2, 3]
    assert all(world.begun.grow(row) for row in (third, first)), "two pages were free"
    assert world.begun.grow(second) and world.running() == [1, 2]
    assert world.begun.preempted == world.begun.preemptions == 1
    assert third.state == "preempted" and third.pages == [] and third.computed == 0
    assert not world.begun.begin(third), "two pages are wanted, one is left"
    world.begun.end(first)
    assert world.begun.next_preempted() is third and world.begun.begin(third)
    assert world.running() == [2, 3] and world.begun.next_preempted() is None


def test_a_row_that_finds_no_other_victim_gives_up_itself() -> None:
    world = World(4)
    first, last = world.row(1), world.row(2)
    assert world.begun.grow(first)
    assert not world.begun.grow(last) and world.running() == [1]
    assert not world.begun.grow(last), "it does not run any more"


def test_nobody_gives_up_pages_while_some_come_free_by_themselves() -> None:
    world = World(4)
    first, last = world.row(1), world.row(2)
    assert world.begun.grow(last)
    last.unsettled, last.settled = 1, 0
    world.begun.end(last)
    assert not world.begun.grow(first) and world.running() == [1] and world.begun.preemptions == 0


def test_the_audit_sees_a_row_in_the_wrong_list() -> None:
    world = World(3)
    world.row(1).state = "preempted"
    with pytest.raises(AssertionError, match="not running"):
        world.begun.check_integrity()
