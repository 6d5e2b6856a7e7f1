-- Minutes that were given for a while. What is left of a grant is the sum of what ledger lines say of it.
CREATE TABLE IF NOT EXISTS {database}.grants
(
    account String,
    grant_id String COMMENT 'request id of the command that gave it',
    priority Int64 COMMENT 'the smallest is spent first',
    from_ms Int64 COMMENT 'windows from then on, milliseconds since the Unix epoch',
    expires_ms Int64 COMMENT 'windows before then',
    amount_us Int64 COMMENT 'service microseconds',
    note String COMMENT 'the words given with the command',
    epoch UInt64 COMMENT 'which Redis gave it',
    entry UInt64 COMMENT 'number of the outbox entry that brought the row',
    granted_at_ms Int64 COMMENT 'clock of Redis, milliseconds since the Unix epoch'
)
ENGINE = ReplacingMergeTree(epoch)
PARTITION BY tuple()
ORDER BY (account, grant_id)
COMMENT 'Grants; read with FINAL'
