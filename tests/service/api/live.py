"""The API behind a real socket, as clients meet it."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from service.api.patience import cut_off_slow_readers


@contextmanager
def listening(app: FastAPI, port: int = 0, send_timeout_s: float = 30) -> Iterator[str]:
    """Serve ``app`` on a loopback port; yields its URL and leaves no thread behind."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        cut_off_slow_readers(listener, send_timeout_s)
        listener.listen(128)
        config = uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            _wait_until_started(server, thread)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            app.state.parts.stopping.set()
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def _wait_until_started(server: uvicorn.Server, thread: threading.Thread) -> None:
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
