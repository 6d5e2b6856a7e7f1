ALTER TABLE {database}.fence_moves
    ADD COLUMN IF NOT EXISTS entry UInt64 DEFAULT 0 COMMENT 'number of the outbox entry that brought the row'
