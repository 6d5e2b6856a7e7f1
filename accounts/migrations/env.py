"""How Alembic runs here: on the connection that `accounts.migrate` hands in, inside its transaction."""

from __future__ import annotations

from alembic import context

from accounts.models import Base

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Base.metadata, compare_type=True)
context.run_migrations()
