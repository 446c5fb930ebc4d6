"""The line between the rank that leads and those that follow: commands with tensors over TCP, and each other's end.

A follower waits on its line for as long as nothing is asked, which no collective would do; and a process that dies,
however it dies, closes its line, which the other end learns at once.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upwell.errors import RankError

_HEAD = struct.Struct("<IQ")  # bytes of the JSON part, and of the tensors
_GREETING = struct.Struct("<32sI")  # the job's secret, and a rank
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.int64, torch.uint8)}
_NOTICE_SECONDS = 5.0  # between a collective's failure and word of whose end it was


@dataclass(frozen=True)
class Message:
    """What to do, with JSON values and tensors (in host memory)."""

    name: str
    values: dict[str, Any]
    tensors: list[Tensor]

    def encode(self) -> tuple[bytes, list[memoryview]]:
        parts = [t.detach().cpu().contiguous() for t in self.tensors]
        about = [(str(t.dtype).removeprefix("torch."), list(t.shape)) for t in parts]
        text = json.dumps([self.name, self.values, about], separators=(",", ":")).encode()
        raw = [t.view(-1).view(torch.uint8).numpy().data for t in parts if t.numel()]
        return _HEAD.pack(len(text), sum(len(r) for r in raw)) + text, raw


class Line:
    """One end of a connection. `receive` raises EOFError when the other end is gone."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, head: bytes, raw: Sequence[memoryview]) -> None:
        self._socket.sendall(head)
        for part in raw:
            self._socket.sendall(part)

    def receive(self) -> Message:
        text_bytes, tensor_bytes = _HEAD.unpack(self._read(_HEAD.size))
        name, values, about = json.loads(self._read(text_bytes))
        raw, tensors, at = self._read(tensor_bytes), [], 0
        for dtype, shape in about:
            size = torch.Size(shape).numel() * _DTYPES[dtype].itemsize
            part = torch.frombuffer(raw, dtype=torch.uint8, count=size, offset=at) if size else torch.empty(0)
            # A part may begin at any byte: a copy of its own is aligned.
            tensors.append(part.clone().view(_DTYPES[dtype]).view(shape) if size else torch.empty(shape))
            at += size
        return Message(name, values, tensors)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            try:
                count = self._socket.recv_into(view[done:])
            except OSError as error:
                raise EOFError(str(error)) from None
            if not count:
                raise EOFError("the other end is closed")
            done += count
        return data


class Lead:
    """Rank 0's end: a line to each follower, watched. The first failure is kept in `error`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.error: RankError | None = None
        self._listeners: list[Callable[[RankError], None]] = []
        self._secret = secrets.token_hex(16)
        self._lines: dict[int, Line] = {}
        self._answers: queue.SimpleQueue[tuple[int, Message]] = queue.SimpleQueue()
        self._failed, self._door, self._closing = threading.Event(), threading.Lock(), False
        self._server: socket.socket | None = None

    def listen(self, host: str) -> str:
        """Open the door; returns what followers need to come in: "host port secret"."""
        self._server = socket.create_server((host, 0), backlog=self.size)
        self._server.settimeout(0.2)
        return f"{host} {self._server.getsockname()[1]} {self._secret}"

    def accept(self, seconds: float, check: Callable[[], None]) -> None:
        """Wait for all followers. `check` is called now and then, to raise when one can't come any more."""
        assert self._server is not None
        until = time.monotonic() + seconds
        while len(self._lines) < self.size - 1:
            check()
            if time.monotonic() > until:
                missing = sorted(set(range(1, self.size)) - set(self._lines))
                raise RankError(f"rank {missing[0]} of {self.size} didn't come within {seconds:g} s")
            try:
                connection, _ = self._server.accept()
            except TimeoutError:
                continue
            connection.settimeout(seconds)
            try:
                secret, rank = _GREETING.unpack(bytes(Line(connection)._read(_GREETING.size)))
            except EOFError:
                continue
            if not hmac.compare_digest(secret, self._secret.encode()) or not 0 < rank < self.size:
                connection.close()
                continue
            connection.settimeout(None)
            self._lines[rank] = Line(connection)
        self._server.close()
        for rank, line in self._lines.items():
            threading.Thread(target=self._watch, args=(rank, line), daemon=True, name=f"upwell-rank-{rank}").start()

    def tell(self, name: str, values: dict[str, Any], tensors: Sequence[Tensor] = ()) -> None:
        """Tell all followers to do something. Raises RankError where one is gone."""
        head, raw = Message(name, values, list(tensors)).encode()
        with self._door:
            for rank, line in self._lines.items():
                try:
                    if self.error is not None:
                        raise self.error
                    line.send(head, raw)
                except OSError:
                    self._fail(f"rank {rank} of {self.size} ended")
                    raise self.reason() from None

    def answers(self) -> dict[int, Message]:
        """One message of each follower. Raises RankError where one fails instead."""
        found: dict[int, Message] = {}
        while len(found) < self.size - 1:
            try:
                rank, message = self._answers.get(timeout=0.2)
                found[rank] = message
            except queue.Empty:
                if self.error is not None:
                    raise self.error from None
        return found

    def reason(self) -> RankError:
        """Why a collective failed: whose end it was, where that is known or soon will be."""
        self._failed.wait(_NOTICE_SECONDS)
        if self.error is None:
            self._fail(f"the exchange between the {self.size} ranks failed")
        assert self.error is not None
        return self.error

    def on_failure(self, listener: Callable[[RankError], None]) -> None:
        """Call it, on any thread, once a rank is gone."""
        self._listeners.append(listener)
        if self.error is not None:
            listener(self.error)

    def fail(self, what: str) -> RankError:
        """This rank can't go on with the others."""
        self._fail(what)
        assert self.error is not None
        return self.error

    def close(self) -> None:
        """Let the followers end; nothing is told any more."""
        if not self._closing and self.error is None:
            self._closing = True
            with contextlib.suppress(RankError):
                self.tell("stop", {})
        self._closing = True
        for line in self._lines.values():
            line.close()

    def _watch(self, rank: int, line: Line) -> None:
        while True:
            try:
                message = line.receive()
            except EOFError:
                if not self._closing:
                    self._fail(f"rank {rank} of {self.size} ended")
                return
            if message.name == "failed":
                self._fail(f"rank {rank} of {self.size} failed: {message.values['what']}")
                return
            self._answers.put((rank, message))

    def _fail(self, what: str) -> None:
        if self.error is not None:
            return
        self.error = RankError(what, "its part of the model is gone: start again")
        self._failed.set()
        for line in self._lines.values():  # the others end too, and with them every exchange that waits
            line.close()
        for listener in self._listeners:
            listener(self.error)


class Follow:
    """A follower's end. Commands are read by a thread, so that rank 0's end is noticed in the middle of a step."""

    def __init__(self, address: str, rank: int, ended: Callable[[], None] = lambda: os._exit(1)) -> None:
        host, port, secret = address.split()
        connection = socket.create_connection((host, int(port)), timeout=60)
        connection.settimeout(None)
        connection.sendall(_GREETING.pack(secret.encode(), rank))
        self._line, self._ended = Line(connection), ended
        self._commands: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True, name="upwell-follow").start()

    def receive(self) -> Message:
        return self._commands.get()

    def answer(self, values: dict[str, Any], tensors: Sequence[Tensor] = ()) -> None:
        self._line.send(*Message("answer", values, list(tensors)).encode())

    def fail(self, what: str) -> None:
        """Tell rank 0 why this rank ends."""
        with contextlib.suppress(OSError):
            self._line.send(*Message("failed", {"what": what}, []).encode())

    def close(self) -> None:
        self._line.close()

    def _read(self) -> None:
        while True:
            try:
                message = self._line.receive()
            except EOFError:
                self._ended()
                return
            self._commands.put(message)
            if message.name == "stop":
                return
