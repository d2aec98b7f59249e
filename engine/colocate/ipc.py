"""Messages between the main process and its offline worker: msgpack frames over a unix socket pair. No pickle, no listener.

A frame is a 4-byte little-endian length and one tagged message. The main process must never wait for a frozen worker, so it
sends through `Sender`, which has a thread of its own.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
from contextlib import suppress

import msgspec

from engine.build import Memory
from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.timeline import Span
from engine.types import Submit, TokenOut

logger = logging.getLogger(__name__)

_MAX_FRAME = 1 << 28


class Start(msgspec.Struct, tag="start", frozen=True):
    """Main to worker, first: what to load and run."""

    config: EngineConfig
    memory: Memory


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """Worker to main: the model is loaded."""


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """Worker to main, last: why it cannot go on. `fatal`: starting it again would end the same way."""

    message: str
    fatal: bool


class Put(msgspec.Struct, tag="put", frozen=True):
    """Main to worker: a request."""

    submit: Submit


class Drop(msgspec.Struct, tag="drop", frozen=True):
    """Main to worker: end a request."""

    id: str


class Pause(msgspec.Struct, tag="pause", frozen=True):
    """Main to worker: run no steps from now on, or run them again."""

    on: bool


class Spin(msgspec.Struct, tag="spin", frozen=True):
    """Main to worker: make visible progress until the next frame, for the gate's probe."""


class Rest(msgspec.Struct, tag="rest", frozen=True):
    """Main to worker: nothing; ends a spin."""


class Outs(msgspec.Struct, tag="outs", frozen=True):
    """Worker to main: what one step produced, and the launches since the last such message."""

    outs: list[TokenOut]
    spans: list[Span] = []


Frame = Start | Ready | Failed | Put | Drop | Pause | Spin | Rest | Outs

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def check(submit: Submit) -> None:
    """Raise InvalidRequest for a request that cannot be written, or that the reader would not understand."""
    try:
        _decoder.decode(_encoder.encode(Put(submit)))
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"the request cannot be sent to the offline model: {error}") from error


def send(sock: socket.socket, frame: Frame) -> None:
    """Write one frame, waiting for the reader if need be. Raises OSError if there is none any more."""
    data = _encoder.encode(frame)
    sock.sendall(len(data).to_bytes(4, "little") + data)


def receive(sock: socket.socket) -> Frame | None:
    """The next frame; None at the end of the stream (also in the middle of a frame: the writer died)."""
    head = _exactly(sock, 4)
    if head is None:
        return None
    size = int.from_bytes(head, "little")
    if size > _MAX_FRAME:
        raise ValueError(f"a frame of {size} bytes")
    body = _exactly(sock, size)
    return None if body is None else _decoder.decode(body)


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        try:
            part = sock.recv(min(size - len(parts), 1 << 20))
        except ConnectionError:
            return None
        if not part:
            return None
        parts += part
    return bytes(parts)


class Sender:
    """Sends frames in order from a thread of its own, so that `put` never waits, however long the reader is frozen."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="offline-sender", daemon=True)
        self._thread.start()

    def put(self, frame: Frame) -> None:
        self._frames.put(frame)

    def close(self) -> None:
        """End both directions, and wait for the thread: the descriptor can then be closed without it writing elsewhere."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._frames.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (frame := self._frames.get()) is not None:
            try:
                send(self._sock, frame)
            except OSError:
                return  # the worker is gone; whoever reads from it sees the same
