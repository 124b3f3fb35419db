"""Frames survive any cut of the stream, and a broken peer is seen."""

from __future__ import annotations

import socket
import threading

import msgspec
import pytest

from adaplex_server.engine.messages import Cancel, Shutdown, Submit, ToEngine
from adaplex_server.engine.wire import MAX_FRAME, FrameReader, pack, send
from adaplex_server.vocabulary import SamplingParams

DECODER = msgspec.msgpack.Decoder(ToEngine)
MESSAGES = [Submit(1, list(range(5000)), SamplingParams(max_tokens=3), "abc", 1.5, 2), Cancel(1), Shutdown()]


@pytest.mark.parametrize("piece", [1, 3, 4096])
def test_messages_arrive_whole(piece: int) -> None:
    ours, theirs = socket.socketpair()
    stream = b"".join(map(pack, MESSAGES))

    def write() -> None:
        for at in range(0, len(stream), piece):
            ours.sendall(stream[at : at + piece])
        ours.close()

    threading.Thread(target=write).start()
    reader = FrameReader(theirs)
    assert [reader.read(DECODER) for _ in range(4)] == [*MESSAGES, None]
    theirs.close()


def test_a_cut_frame_is_the_end_and_nonsense_raises() -> None:
    for broken, error in ((pack(MESSAGES[0])[:-1], None), (b"\x02\0\0\0\xc1\xc1", msgspec.DecodeError)):
        ours, theirs = socket.socketpair()
        ours.sendall(broken)
        ours.close()
        if error is None:
            assert FrameReader(theirs).read(DECODER) is None
        else:
            with pytest.raises(error):
                FrameReader(theirs).read(DECODER)
        theirs.close()
    ours, theirs = socket.socketpair()
    ours.sendall((MAX_FRAME + 1).to_bytes(4, "little"))
    with pytest.raises(ValueError, match="over the limit"):
        FrameReader(theirs).read(DECODER)
    theirs.close()
    with pytest.raises(OSError):
        send(ours, Shutdown())
    ours.close()
