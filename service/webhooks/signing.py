"""How a receiver knows that a message comes from this service, and when it was sent."""

import hmac

from pydantic import SecretStr

VERSION = "v1"


def signature(secret: SecretStr, timestamp: str, body: bytes) -> str:
    """``v1=`` and the HMAC-SHA256 (RFC 2104), in hex, of timestamp, a dot and the body.

    The timestamp is signed too, so that a receiver may refuse a message that someone has kept and sends again.
    """
    key = secret.get_secret_value().encode()
    return f"{VERSION}={hmac.new(key, timestamp.encode() + b'.' + body, 'sha256').hexdigest()}"
