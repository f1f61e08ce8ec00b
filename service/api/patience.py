"""How long the service waits for a reader that takes nothing of its answer.

What a connection holds for such a reader is bounded anyway: a stream reads on only when what it told has left. But a
reader that stays away for ever would hold that little, and its connection, for ever. The kernel knows best how long
nothing could be sent, whatever kind of answer it is, and ends the connection: TCP's user timeout (RFC 5482).
"""

import socket

_SUPPORTED = hasattr(socket, "TCP_USER_TIMEOUT")  # on Linux


def cut_off_slow_readers(listener: socket.socket, after_s: float) -> bool:
    """Let every connection of ``listener`` end when nothing of what it is sent was taken for ``after_s``.

    Call before it listens. Returns whether this system can do that; elsewhere only its own, longer patience counts.
    """
    if _SUPPORTED:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1e3 * after_s))
    return _SUPPORTED
