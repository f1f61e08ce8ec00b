"""Tells of jobs' events by HTTP, signed, to wherever principals want to hear of them and the operator allows."""

from service.webhooks.addresses import AddressGuard, Refused
from service.webhooks.desk import Desk
from service.webhooks.dispatcher import Dispatcher
from service.webhooks.secret_files import SecretFiles, SecretUnreadable
from service.webhooks.sender import Sender

__all__ = ["AddressGuard", "Desk", "Dispatcher", "Refused", "SecretFiles", "SecretUnreadable", "Sender"]
