"""One TCP connection from every process of a training to process 0, silent while all live.

The operating system closes it the moment a process dies, however it dies, so that the others need no timeout to know:
collective operations may wait as long as they like, for a rank that is still reading data or validating. A machine
that is gone without a word is noticed by TCP's keep-alive.
"""

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal

GRACE_SECONDS = 8.0
"""Between the loss of a process and the end of one whose main thread does not notice, in a collective of the GPU."""

_CONNECT_SECONDS = 60.0
_REPORTED = b"r"  # from process 0: somebody is gone, and I say so

Verdict = Literal["lost", "lost and reported"]


class Lifeline:
    """The connections of this process; ``verdict`` is None as long as everybody lives.

    ``share(value)`` gives every process what process 0 calls it with; ``last_words`` is printed by a process that has
    to be ended because its main thread hangs.
    """

    def __init__(self, rank: int, size: int, host: str, share: Callable[[Any], Any], last_words: str) -> None:
        while _pending:
            _pending.pop().cancel()  # whoever trains again does not hang
        self.verdict: Verdict | None = None
        self._known = threading.Event()
        self._ending = False
        self._last_words = last_words
        self._sockets = _listen(size, share) if rank == 0 else [_connect(host, share)]
        self._is_first = rank == 0
        self._thread = threading.Thread(target=self._watch, name="equimd-lifeline", daemon=True)
        self._thread.start()

    def expect_end(self) -> None:
        """From now on processes end because they are done."""
        self._ending = True

    def close(self) -> None:
        """Let go; the others see this process as gone unless they expect the end."""
        self._ending = True
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # which wakes the thread
        self._thread.join(1.0)
        for connection in self._sockets:
            connection.close()
        if self.verdict is not None:
            _later(lambda: os._exit(1))  # what waits for the lost process while Python ends

    def wait_for_verdict(self, seconds: float) -> Verdict | None:
        """Why a collective operation failed, as soon as it is known."""
        self._known.wait(seconds)
        return self.verdict

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._sockets:
                selector.register(connection, selectors.EVENT_READ)
            first = selector.select()[0][0].fileobj
        word = b""
        with contextlib.suppress(OSError):
            word = first.recv(1)  # type: ignore[union-attr]
        if self._ending:
            return
        self.verdict = "lost and reported" if word == _REPORTED else "lost"
        self._known.set()
        for connection in self._sockets if self._is_first else []:
            with contextlib.suppress(OSError):
                connection.sendall(_REPORTED)
        _later(self._end)

    def _end(self) -> None:
        """Files are written whole or not at all, so that nothing is lost by it."""
        if self._ending:
            return
        if self.verdict == "lost":
            print(self._last_words, file=sys.stderr, flush=True)
        os._exit(1)


_pending: list[threading.Timer] = []


def _later(action: Callable[[], None]) -> None:
    timer = threading.Timer(GRACE_SECONDS, action)
    timer.daemon = True
    timer.start()
    _pending.append(timer)


def _listen(size: int, share: Callable[[Any], Any]) -> list[socket.socket]:
    token = secrets.token_hex(16)
    with socket.create_server(("", 0), backlog=size) as server:
        server.settimeout(_CONNECT_SECONDS)
        share((server.getsockname()[1], token))
        connections: list[socket.socket] = []
        while len(connections) < size - 1:
            connection, _ = server.accept()
            connection.settimeout(_CONNECT_SECONDS)
            if secrets.compare_digest(connection.recv(len(token), socket.MSG_WAITALL), token.encode()):
                connections.append(_kept_alive(connection))
            else:
                connection.close()  # a stranger
    return connections


def _connect(host: str, share: Callable[[Any], Any]) -> socket.socket:
    port, token = share(None)
    connection = socket.create_connection((host, port), _CONNECT_SECONDS)
    connection.sendall(token.encode())
    return _kept_alive(connection)


def _kept_alive(connection: socket.socket) -> socket.socket:
    """Ask after five silent seconds and give up nine seconds later, where the system lets us say so."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
