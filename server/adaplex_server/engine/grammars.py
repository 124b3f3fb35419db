"""Makes the grammars of rows, off the thread that makes the steps. Owns the compiled ones, and the rows that wait.

A row with a constraint comes to the scheduler only with its guide, so that no step waits for a grammar. The library is
imported with the first grammar: an engine without any, as in a benchmark, does not need it.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adaplex_adapters.errors import AdaplexError, InternalError, InvalidRequest
from adaplex_server.bases.tokenizer import load_tokenizer
from adaplex_server.engine.guide import Guide
from adaplex_server.engine.messages import Submit
from adaplex_server.vocabulary import Constraint

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

_KEPT = 128
"""Compiled grammars kept for the next row that wants them."""
_MASK_THREADS = 8


@dataclass(frozen=True)
class Guided:
    """A row may begin: its guide, or why there is none. Comes back through the engine's inbox."""

    row: int
    guide: Guide | None
    error: AdaplexError | None = None


class Grammars:
    """folder: of the base, for its tokenizer, which is read when the first grammar is wanted. vocab_size: columns of
    the logits. eos: the model's end tokens. done: called from a thread with what has been made.
    """

    def __init__(self, folder: Path, vocab_size: int, eos: frozenset[int], done: Callable[[Guided], None]) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._eos = sorted(eos)
        self._done = done
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammars")
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._workers: LLExecutor | None = None
        self._kept: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._waiting: dict[int, Submit] = {}

    def want(self, message: Submit) -> None:
        """Have the guide of a row with a constraint made; the row waits here until `take`."""
        assert message.sampling.constraint is not None
        self._waiting[message.row] = message
        self._threads.submit(self._make, message.row, message.sampling.constraint)

    def take(self, row: int) -> Submit | None:
        """The waiting row; None if it has been taken before."""
        return self._waiting.pop(row, None)

    def guide(self, constraint: Constraint) -> Guide:
        """A guide at the grammar's beginning. Raises InvalidRequest. May be called from any thread."""
        from adaplex_server.engine.grammar import build_matcher

        with self._lock:
            found = self._kept.get(constraint)
            if found is not None:
                self._kept.move_to_end(constraint)
            tokenizer, workers = self._prepared()
        if found is None:
            found = build_matcher(tokenizer, constraint)
            with self._lock:
                self._kept[constraint] = found
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
        return Guide(found.deep_copy(), workers)

    def _make(self, row: int, constraint: Constraint) -> None:
        try:
            made = Guided(row, self.guide(constraint))
        except AdaplexError as error:
            made = Guided(row, None, error)
        except Exception as error:  # told to the row; the thread has nobody else to tell
            made = Guided(row, None, InternalError(f"the grammar failed: {type(error).__name__}: {error!s:.200}"))
        self._done(made)

    def _prepared(self) -> tuple[LLTokenizer, LLExecutor]:
        if self._tokenizer is None or self._workers is None:
            if not self._eos:
                raise InvalidRequest("this base has no end token, which an answer with a constraint needs")
            from llguidance import LLExecutor, LLTokenizer

            described = load_tokenizer(self._folder).backend_tokenizer.to_str()
            self._tokenizer = LLTokenizer(described, n_vocab=self._vocab_size, eos_token=self._eos)
            self._workers = LLExecutor(min(_MASK_THREADS, len(os.sched_getaffinity(0))))
        return self._tokenizer, self._workers
