-- Floors of accounts that have one of their own; of an account's rows the last entry counts.
CREATE TABLE IF NOT EXISTS {database}.floors
(
    account String,
    floor_us Int64 COMMENT 'service microseconds; admission is refused at or below it',
    epoch UInt64 COMMENT 'which Redis set it',
    entry UInt64 COMMENT 'number of the outbox entry that brought the row',
    set_at_ms Int64 COMMENT 'clock of Redis, milliseconds since the Unix epoch'
)
ENGINE = ReplacingMergeTree(entry)
PARTITION BY tuple()
ORDER BY account
COMMENT 'Floors that differ from the default; read with FINAL'
