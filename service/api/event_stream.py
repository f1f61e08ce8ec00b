"""Server-sent events as an answer: how messages are written, and that leaving ends what makes them."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Send

WORD_OF_LIFE = KEEPALIVE_COMMENT
"""A comment, for readers and for whatever stands between, that the stream lives."""


def message(event: str, data: BaseModel, seq: int | None = None) -> bytes:
    """One message; ``seq`` becomes its ``id``, which a reader names when it comes back."""
    return format_sse_event(event=event, data_str=data.model_dump_json(), id=None if seq is None else str(seq))


class EventStream(StreamingResponse):
    """The messages of a generator, which ends when the reader leaves or is cut off, whatever it waits for then."""

    media_type = "text/event-stream"

    def __init__(self, messages: AsyncGenerator[bytes], status_code: int = 200) -> None:
        # Proxies shall neither keep the messages nor wait for more of them.
        super().__init__(messages, status_code, {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._messages = messages

    async def stream_response(self, send: Send) -> None:
        """Send each message as it comes."""
        async with aclosing(self._messages):
            await super().stream_response(send)
