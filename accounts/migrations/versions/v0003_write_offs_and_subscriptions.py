"""Write-offs, planned and closed; and who has which plan."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "write_off_periods",
        sa.Column("period_ms", sa.BigInteger(), nullable=False),
        sa.Column("planned_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("period_ms", name=op.f("pk_write_off_periods")),
    )
    op.create_table(
        "write_off_transfers",
        sa.Column("period_ms", sa.BigInteger(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("user_id", sa.String(length=128), nullable=False),
        sa.Column("node_id", sa.String(length=128), nullable=False),
        sa.Column("amount_us", sa.BigInteger(), nullable=False),
        sa.Column("closed_at_ms", sa.BigInteger(), nullable=True),
        sa.Column("outcome", sa.String(length=16), nullable=True),
        sa.Column("moved_us", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["period_ms"],
            ["write_off_periods.period_ms"],
            name=op.f("fk_write_off_transfers_period_ms"),
        ),
        sa.PrimaryKeyConstraint("period_ms", "position", name=op.f("pk_write_off_transfers")),
        sa.UniqueConstraint(
            "period_ms", "user_id", "node_id", name=op.f("uq_write_off_transfers_period_ms_user_id_node_id")
        ),
    )
    op.create_index(
        op.f("ix_write_off_transfers_closed_at_ms"), "write_off_transfers", ["closed_at_ms"], unique=False
    )
    op.create_table(
        "subscriptions",
        sa.Column("user_id", sa.String(length=128), nullable=False),
        sa.Column("plan", sa.String(length=32), nullable=False),
        sa.Column("issued_period_ms", sa.BigInteger(), nullable=False),
        sa.Column("subscribed_at_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.user_id"], name=op.f("fk_subscriptions_user_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("user_id", "plan", name=op.f("pk_subscriptions")),
    )


def downgrade() -> None:
    """Remove the tables."""
    op.drop_table("subscriptions")
    op.drop_table("write_off_transfers")
    op.drop_table("write_off_periods")
