"""An engine process without a model: it answers each row with its adapter's revision, so that a wrong adapter is seen.

`python fake_engine.py FD`. A row's text is "<revision or base>/<seed>." over and over, one byte a token. The
environment steers it: FAKE_STEP (seconds a step), FAKE_FAIL (message of Failed), FAKE_CRASH (ends after Ready),
FAKE_REFUSE (LoadAdapter fails), FAKE_LOG (a file that gets one line for each message), FAKE_BURST (tokens a step),
FAKE_MUTE (says nothing about rows).
"""

from __future__ import annotations

import json
import os
import queue
import socket
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from adaplex_server.engine import messages as m
from adaplex_server.engine.settings import EngineSettings
from adaplex_server.engine.wire import FrameReader, send

STEP = float(os.environ.get("FAKE_STEP", "0.001"))
BURST = int(os.environ.get("FAKE_BURST", "1"))


@dataclass
class Row:
    message: m.Submit
    text: str
    sent: int = 0


@dataclass
class FakeEngine:
    sock: socket.socket
    settings: EngineSettings
    rows: dict[int, Row] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    ends: list[m.RowEnd] = field(default_factory=list)

    def __post_init__(self) -> None:
        vocabulary = json.loads((Path(self.settings.base) / "tokenizer.json").read_text())["model"]["vocab"]
        self.letters = {letter: token for letter, token in vocabulary.items() if len(letter) == 1}
        self.vocab_size = len(vocabulary)

    def ready(self) -> None:
        send(self.sock, m.Progress("pretending", 0.5))
        info = m.EngineInfo(os.getpid(), "cpu", "float32", "none", 100_000, 4, 8, 16, 64, 1, self.vocab_size)
        send(self.sock, m.Ready(info))

    def handle(self, message: m.ToEngine) -> bool:
        """False on Shutdown."""
        if path := os.environ.get("FAKE_LOG"):
            with open(path, "a") as log:
                log.write(f"{type(message).__name__} {getattr(message, 'row', getattr(message, 'revision', ''))}\n")
        if isinstance(message, m.Submit):
            if message.revision is not None:
                self.read(message.revision)
            self.rows[message.row] = Row(message, f"{message.revision or 'base'}/{message.sampling.seed}.")
        elif isinstance(message, m.Cancel):
            if self.rows.pop(message.row, None):
                self.ends.append(m.RowEnd(message.row, "cancelled"))
        elif isinstance(message, m.LoadAdapter):
            if os.environ.get("FAKE_REFUSE"):
                send(self.sock, m.AdapterFailed(message.call, message.revision, "InvalidAdapter", "refused on purpose"))
            else:
                self.read(message.revision)
                send(self.sock, m.AdapterLoaded(message.call, message.revision, 1.0, 100, 0.01))
        elif isinstance(message, m.DropAdapter):
            self.known.discard(message.revision)
            send(self.sock, m.AdapterDropped(message.call, message.revision, 100))
        return not isinstance(message, m.Shutdown)

    def read(self, revision: str) -> None:
        """As the real one: from the store, when it is not known yet."""
        assert revision in self.known or (Path(self.settings.store) / "revisions" / revision).is_dir(), (
            "not in the store"
        )
        self.known.add(revision)

    def step(self) -> None:
        tokens: list[m.RowToken] = []
        for row_id, row in list(self.rows.items()):
            for _ in range(BURST):
                if row.sent == row.message.sampling.max_tokens:
                    del self.rows[row_id]
                    self.ends.append(m.RowEnd(row_id, "length"))
                    break
                letter = row.text[row.sent % len(row.text)]
                tokens.append(m.RowToken(row_id, self.letters[letter]))
                row.sent += 1
        if (tokens or self.ends) and not os.environ.get("FAKE_MUTE"):
            stats = m.EngineStats(0, len(self.rows), 3, 1, 64, len(self.known), 8, 64, 1, 0, 0, 0, 0, 1, 0.1)
            send(self.sock, m.StepDone(tokens, self.ends, stats))
            self.ends = []


def read_all(reader: FrameReader, inbox: queue.Queue) -> None:
    decoder = msgspec.msgpack.Decoder(m.ToEngine)
    while (message := reader.read(decoder)) is not None:
        inbox.put(message)
    os._exit(0)


def main(fd: int) -> int:
    sock = socket.socket(fileno=fd)
    reader = FrameReader(sock)
    settings = reader.read(msgspec.msgpack.Decoder(EngineSettings))
    print("the fake engine starts", file=sys.stderr, flush=True)
    if failure := os.environ.get("FAKE_FAIL"):
        send(sock, m.Failed("StartupError", failure))
        return 2
    engine = FakeEngine(sock, settings)
    engine.ready()
    if os.environ.get("FAKE_CRASH"):
        print("crashing on purpose", file=sys.stderr, flush=True)
        return 3
    inbox: queue.Queue = queue.Queue()
    threading.Thread(target=read_all, args=(reader, inbox), daemon=True).start()
    while True:
        try:
            message = inbox.get(timeout=None if not engine.rows and not engine.ends else STEP)
            if not engine.handle(message):
                return 0
            continue
        except queue.Empty:
            engine.step()


if __name__ == "__main__":
    os._exit(main(int(sys.argv[1])))
