"""What Alembic runs around the steps: on the connection, and in the transaction, that `service.store.upgrade` gives."""

from alembic import context

from service.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
context.run_migrations()
