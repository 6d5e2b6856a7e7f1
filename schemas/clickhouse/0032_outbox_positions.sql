-- How far the outbox is stored. A row is written after all rows of the entries it speaks of, in every table, so it may
-- be behind and is never ahead: what a rebuild takes for complete. Several tables cannot be written in one step.
CREATE TABLE IF NOT EXISTS {database}.outbox_positions
(
    epoch UInt64 COMMENT 'which Redis wrote the entry',
    entry UInt64 COMMENT 'number of the last entry that is stored whole',
    at_ms Int64 COMMENT 'when the entry was written, clock of Redis, milliseconds since the Unix epoch'
)
ENGINE = ReplacingMergeTree(entry)
PARTITION BY tuple()
ORDER BY epoch
COMMENT 'How far the outbox is stored'
