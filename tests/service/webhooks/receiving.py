"""A real HTTP receiver of webhooks, which does to each path what its name says, and remembers all that came."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Post:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def name(self) -> str:
        return self.headers["Syncbn-Delivery"]


@dataclass
class Receiver:
    """``fails`` are paths, and texts of bodies, that are answered 500 meanwhile; ``let_go`` ends what hangs."""

    port: int = 0
    posts: list[Post] = field(default_factory=list)
    fails: set[str] = field(default_factory=set)
    let_go: threading.Event = field(default_factory=threading.Event)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def at(self, path: str) -> list[Post]:
        return [post for post in self.posts if post.path == path]

    def wait_for(self, number: int, path: str, timeout_s: float = 30.0) -> list[Post]:
        """The first posts to ``path``, once there are so many."""
        with self.changed:
            enough = self.changed.wait_for(lambda: len(self.at(path)) >= number, timeout_s)
            assert enough, f"{len(self.at(path))} of {number} posts to {path} within {timeout_s} s"
            return self.at(path)[:number]


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"

    def do_POST(self) -> None:
        receiver = self.server.receiver
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if len(body) < int(self.headers["Content-Length"]):
            return  # the sender was told to stop in the middle
        with receiver.changed:
            receiver.posts.append(Post(self.path, dict(self.headers), body))
            receiver.changed.notify_all()
        if self.path == "/hangs":
            receiver.let_go.wait(60)
        elif self.path == "/drips":
            self._drip(b"HTTP/1.1 200 OK\r\nX-Endless: ")
        elif self.path == "/closes":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif self.path == "/floods":
            self._answer(200, b"x" * 50_000_000)
        elif self.path == "/redirects":
            self._answer(302, b"", Location=f"http://127.0.0.1:{receiver.port}/ok")
        else:
            failing = any(mark == self.path or mark.encode() in body for mark in receiver.fails)
            self._answer(500 if failing else 200, b"heard")

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        with suppress(ConnectionError):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    def _drip(self, first: bytes) -> None:
        with suppress(ConnectionError):
            self.wfile.write(first)
            while not self.server.receiver.let_go.wait(0.1):
                self.wfile.write(b"x")

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet."""


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # with the usual 5 the system refuses some of many who come at once

    def __init__(self, receiver: Receiver, tls: ssl.SSLContext | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.receiver = receiver

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A sender that had enough, or believes no certificate, closes the connection."""


@contextmanager
def receiving(tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    receiver = Receiver()
    with _Server(receiver, tls) as server:
        receiver.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield receiver
        finally:
            receiver.let_go.set()
            server.shutdown()
            thread.join(10)
