"""What the API asks about webhooks: whether one may be made, and to have one tried."""

from datetime import UTC, datetime

from service.errors import FieldProblem, TooManyRequests
from service.jobs import Principal, Role, Webhook, WebhookDelivery, WebhookOrder
from service.webhooks.addresses import AddressGuard, Refused
from service.webhooks.messages import trial_message
from service.webhooks.secret_files import SecretFiles, SecretUnreadable
from service.webhooks.sender import Sender

MAX_TRIALS = 16
"""At once, of this service: each may hold a connection for as long as a try may take."""

_RESOLVE_S = 5.0


class Desk:
    """Judges orders by the same guard and secrets that deliveries go by."""

    def __init__(self, guard: AddressGuard, secrets: SecretFiles, sender: Sender) -> None:
        self._guard = guard
        self._secrets = secrets
        self._sender = sender
        self._num_trials = 0

    async def problems(self, order: WebhookOrder, asker: Principal) -> list[FieldProblem]:
        """Why ``asker`` may not have such a webhook; a name is only resolved when all else is right."""
        found = self._secret_problems(order.secret, asker)
        if order.all and not asker.role.includes(Role.ADMIN):
            found.append(FieldProblem("/all", "admins_only", "only admins are told of everyone's jobs; leave it out"))
        if found:
            return found
        try:
            await self._guard.addresses(order.url, _RESOLVE_S)
        except Refused as error:
            return [FieldProblem("/url", "address_not_allowed", str(error))]
        return []

    async def trial(self, hook: Webhook) -> WebhookDelivery:
        """What comes of a message of no importance, sent now. Raises TooManyRequests beyond `MAX_TRIALS` at once."""
        if self._num_trials >= MAX_TRIALS:
            raise TooManyRequests(f"{MAX_TRIALS} webhooks are being tried just now; wait some seconds", 5.0)
        self._num_trials += 1
        try:
            return await self._sender.send(hook, *trial_message(hook, datetime.now(UTC)))
        finally:
            self._num_trials -= 1

    def _secret_problems(self, name: str, asker: Principal) -> list[FieldProblem]:
        _, _, owner = name.partition("@")
        if owner != asker.name and not asker.role.includes(Role.ADMIN):
            # Whoever could have this signed could send it on to the receiver that the secret is meant for. Nobody
            # learns either which secrets others have.
            text = f"{asker.name} may use secrets named NAME@{asker.name} alone; the service's operator makes them"
            return [FieldProblem("/secret", "secret_not_allowed", text)]
        try:
            self._secrets.read(name)
        except SecretUnreadable as error:
            return [FieldProblem("/secret", "secret_unreadable", str(error))]
        return []
