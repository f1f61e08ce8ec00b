"""The REST API: thin routes over the store. The only part that knows FastAPI."""

from service.api.app import create_app

__all__ = ["create_app"]
