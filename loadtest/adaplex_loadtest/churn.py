"""Adapters that come, are loaded again and go while requests run: uploads and deletes through the API."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter
from pathlib import Path

import httpx

from adaplex_adapters.errors import InvalidRequest

FILES = ("adapter_config.json", "adapter_model.safetensors")


class Churn:
    """Uploads copies of some adapters' folders as churn-NAME, again and again, and deletes them now and then. Owns the
    counts of what it did and of what was refused.

    With the same content a name is answered as before; so what is asked of churn-NAME can be checked while it changes.
    Half of the uploads have another dropout in their configuration, which changes their revision and no answer.
    """

    def __init__(self, url: str, folders: dict[str, Path], seed: int = 0) -> None:
        self.done: Counter[str] = Counter()
        self._url = url
        self._folders = folders
        self._rng = random.Random(seed)
        self._numbers = itertools.count(1)

    @property
    def names(self) -> tuple[str, ...]:
        """What it loads."""
        return tuple(f"churn-{name}" for name in self._folders)

    async def load_all(self) -> None:
        """Each name once, so that all can be asked. Raises InvalidRequest if one is refused."""
        async with httpx.AsyncClient(timeout=120) as client:
            for name in self._folders:
                await self._upload(client, name)
        if self.done["uploads"] < len(self._folders):
            raise InvalidRequest(f"adapters are not taken: {dict(self.done)}")

    async def run(self, pause: float) -> None:
        """Until cancelled, a change every `pause` seconds."""
        async with httpx.AsyncClient(timeout=120) as client:
            while True:
                await asyncio.sleep(self._rng.expovariate(1 / pause))
                name = self._rng.choice(list(self._folders))
                try:
                    if self._rng.random() < 0.3:
                        await self._delete(client, name)
                    await self._upload(client, name)
                except httpx.TransportError as error:
                    self.done[type(error).__name__] += 1

    async def clear(self) -> None:
        """Delete all that was loaded."""
        async with httpx.AsyncClient(timeout=120) as client:
            for name in self._folders:
                await self._delete(client, name)

    async def _upload(self, client: httpx.AsyncClient, name: str) -> None:
        parts = [("files", (file, (self._folders[name] / file).read_bytes())) for file in FILES]
        if self._rng.random() < 0.5:
            config = json.loads(parts[0][1][1])
            if "lora_dropout" in config:  # other kinds are loaded again as they are
                config["lora_dropout"] = next(self._numbers) / 1e6
            parts[0] = ("files", (FILES[0], json.dumps(config).encode()))
        answer = await client.post(f"{self._url}/v1/adapters", data={"name": f"churn-{name}"}, files=parts)
        self.done["uploads" if answer.is_success else f"upload HTTP {answer.status_code}"] += 1

    async def _delete(self, client: httpx.AsyncClient, name: str) -> None:
        answer = await client.delete(f"{self._url}/v1/adapters/churn-{name}")
        self.done["deletes" if answer.is_success else f"delete HTTP {answer.status_code}"] += 1
