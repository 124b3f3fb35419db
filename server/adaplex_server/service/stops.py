"""Stop strings: text goes in as it is made, text that is safe to send comes out, and a stop string never does.

One pass over the characters with the automaton of Aho and Corasick (1975, "Efficient string matching: an aid to
bibliographic search"). The depth of its present state is the length of the longest end of the text that could begin a
stop string: exactly what must be held back. The cost is one table look-up a character, however many stop strings
there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stops:
    """The automaton of one request's stop strings; shared by its choices.

    step[state]: character -> state. depth[state]: characters matched so far. back[state]: state of the longest proper
    suffix. found[state]: index of the longest stop string that ends here, -1 for none.
    """

    strings: tuple[str, ...]
    step: tuple[dict[str, int], ...]
    depth: tuple[int, ...]
    back: tuple[int, ...]
    found: tuple[int, ...]


def build_stops(strings: Sequence[str]) -> Stops | None:
    """None when there is nothing to look for."""
    if not strings:
        return None
    step: list[dict[str, int]] = [{}]
    depth, found = [0], [-1]
    for index, string in enumerate(strings):
        state = 0
        for character in string:
            if character not in step[state]:
                step[state][character] = len(step)
                step.append({})
                depth.append(depth[state] + 1)
                found.append(-1)
            state = step[state][character]
        if found[state] < 0:
            found[state] = index
    back = [0] * len(step)
    queue = deque(step[0].values())
    while queue:  # breadth first: a suffix is shorter, so its entry is ready
        state = queue.popleft()
        for character, after in step[state].items():
            fallback = back[state]
            while fallback and character not in step[fallback]:
                fallback = back[fallback]
            back[after] = step[fallback].get(character, 0)
            if found[after] < 0:
                found[after] = found[back[after]]
            queue.append(after)
    return Stops(tuple(strings), tuple(step), tuple(depth), tuple(back), tuple(found))


class StopMatcher:
    """The search of one choice. The first stop string to end wins; of several that end at once, the longest."""

    __slots__ = ("_held", "_include", "_state", "_stops", "matched")

    def __init__(self, stops: Stops, *, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """What may be sent now. After a match (`matched` is set) nothing more is to be pushed."""
        stops, state = self._stops, self._state
        step, back, found = stops.step, stops.back, stops.found
        for position, character in enumerate(text):
            while state and character not in step[state]:
                state = back[state]
            state = step[state].get(character, 0)
            if found[state] >= 0:
                return self._match(self._held + text[: position + 1], stops.strings[found[state]])
        self._state = state
        seen = self._held + text
        keep = stops.depth[state]
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep]

    def _match(self, seen: str, string: str) -> str:
        self.matched, self._held = string, ""
        return seen if self._include else seen[: len(seen) - len(string)]

    def flush(self) -> str:
        """End of the text: what was held back was no stop string."""
        held, self._held = self._held, ""
        self._state = 0
        return held
