"""The engine process: `python -m adaplex_server.engine FD`, where FD is its end of the socket pair.

The first frame is the EngineSettings; then Progress, and Ready or Failed. The end of the file means that the API
process is gone: the process ends at once, whatever it is doing, so that no orphan holds the device. SIGTERM does not
end it: a service manager that sends one to every process of the server must not cut what is still being drained.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading

import msgspec

from adaplex_adapters.errors import StartupError
from adaplex_server.engine.assembly import start_engine
from adaplex_server.engine.engine import Inbox
from adaplex_server.engine.messages import Failed, Ready, ToEngine
from adaplex_server.engine.settings import EngineSettings
from adaplex_server.engine.wire import FrameReader, send

log = logging.getLogger("adaplex.engine")


def main(fd: int) -> int:
    """Serve until Shutdown; the exit status."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s engine %(levelname)s %(message)s")
    sock = socket.socket(fileno=fd)
    frames = FrameReader(sock)
    settings = frames.read(msgspec.msgpack.Decoder(EngineSettings))
    if settings is None:
        return 1
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_read, args=(frames, inbox), name="frames", daemon=True).start()
    try:
        engine, info = start_engine(settings, inbox, lambda message: send(sock, message))
    except StartupError as error:
        send(sock, Failed(type(error).__name__, error.message))
        return error.exit_code
    send(sock, Ready(info))
    engine.run()
    return 0


def _read(frames: FrameReader, inbox: Inbox) -> None:
    """All frames into the inbox; at their end, or at one that cannot be read, the process ends."""
    decoder = msgspec.msgpack.Decoder(ToEngine)
    try:
        while (message := frames.read(decoder)) is not None:
            inbox.put(message)
    except Exception:
        log.exception("the frames of the API process cannot be read; ending")
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    status = main(int(sys.argv[1]))
    sys.stderr.flush()
    # Not sys.exit: the reader thread sits in a read that only the end of the process stops.
    os._exit(status)
