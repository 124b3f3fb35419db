"""The values of a config.json under our names, checked one at a time, with the family's defaults behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaplex_adapters.errors import StartupError
from adaplex_server.model.family import Family


@dataclass(frozen=True)
class ConfigFields:
    """config.json as `raw`. A null counts as left out, but for keys where null says something."""

    raw: Mapping[str, Any]
    family: Family

    def value(self, name: str, default: Any = None) -> Any:
        """What is called `name`, under the first of the family's keys for it that has a value."""
        keys = self.family.keys.get(name, (name,))
        for source in (self.raw, self.family.defaults):
            for key in keys:
                if source.get(key) is not None:
                    return source[key]
        return default

    def switch(self, which: bool | str) -> bool:
        """A family's switch."""
        return which if isinstance(which, bool) else bool(self.value(which, False))

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number, or StartupError."""
        found = self.value(name, default)
        if isinstance(found, bool) or not isinstance(found, int | float) or found <= 0:
            raise StartupError(f"config.json: {self._key(name)} must be a positive number, not {found!r}")
        return float(found)

    def number_if_there(self, name: str) -> float | None:
        """A positive number, None where there is none, or StartupError."""
        return None if self.value(name) is None else self.number(name)

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer, or StartupError."""
        found = self.value(name, default)
        if isinstance(found, bool) or not isinstance(found, int) or found <= 0:
            raise StartupError(f"config.json: {self._key(name)} must be a positive integer, not {found!r}")
        return found

    def _key(self, name: str) -> str:
        """The key that an error should name."""
        keys = self.family.keys.get(name, (name,))
        return next((key for key in keys if key in self.raw), keys[0])
