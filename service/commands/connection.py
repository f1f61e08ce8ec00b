"""From the settings to a client of the service that they name."""

from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from service.client import Client
from service.errors import FieldProblem, InvalidRequest
from service.settings import ClientSettings

_Model = TypeVar("_Model", bound=BaseModel)


def open_client() -> Client:
    """A client of the service at SYNCBN_URL, with the key in SYNCBN_API_TOKEN. Raises: InvalidRequest."""
    settings = checked(ClientSettings)
    return Client(str(settings.url), settings.api_token.get_secret_value() if settings.api_token else None)


def checked(build: Callable[[], _Model]) -> _Model:
    """What ``build`` returns. Raises: InvalidRequest with every wrong field where pydantic finds any."""
    try:
        return build()
    except ValidationError as error:
        raise InvalidRequest(
            [FieldProblem("/" + "/".join(map(str, e["loc"])), e["type"], e["msg"]) for e in error.errors()]
        ) from None
