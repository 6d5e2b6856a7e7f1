"""Alembic's scripts: one file a revision. An applied file never changes; whoever wants more adds one."""
