"""How alembic runs here: always in the transaction that `osteo_daemon.jobs.database` opened, never from a shell."""

from __future__ import annotations

from alembic import context

from osteo_daemon.jobs.schema import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
