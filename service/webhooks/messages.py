"""What is told of an event, and under which name, the same at every try."""

import secrets
from datetime import datetime

from service.jobs import TEST_EVENT, Webhook, WebhookMessage
from service.store import Pending


def message_of(told: Pending) -> tuple[str, WebhookMessage]:
    """The delivery's name, the same at every try to tell this webhook of this event, and the message."""
    event = told.event
    message = WebhookMessage(
        id=f"{told.job_id}.{event.seq}",
        type=event.type,
        job_id=told.job_id,
        seq=event.seq,
        time=event.time,
        body=event.body,
        job=told.job,
    )
    return f"{told.hook.id}.{message.id}", message


def trial_message(hook: Webhook, now: datetime) -> tuple[str, WebhookMessage]:
    """The same of a message that is about no job: each test has a name of its own."""
    message = WebhookMessage(id=f"test_{secrets.token_hex(8)}", type=TEST_EVENT, time=now, body={})
    return f"{hook.id}.{message.id}", message
