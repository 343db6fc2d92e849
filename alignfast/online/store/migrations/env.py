"""Run by Alembic, over the connection that `database.migrate` hands it, inside its transaction."""

from alembic import context

from alignfast.online.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=context.config.attributes["version_table"],
)
context.run_migrations()
