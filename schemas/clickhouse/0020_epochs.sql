-- Each rebuild of Redis: its epoch goes on after this entry. Whatever an older epoch wrote with a higher number was
-- not in the ledger when Redis was rebuilt from it, and does not count, however late it arrives.
CREATE TABLE IF NOT EXISTS {database}.epochs
(
    epoch UInt64 COMMENT 'the epoch that the rebuild announced',
    after_entry UInt64 COMMENT 'the last outbox entry of older epochs that counts',
    at_ms Int64 COMMENT 'when the rebuild began, milliseconds since the Unix epoch'
)
ENGINE = ReplacingMergeTree
PARTITION BY tuple()
ORDER BY (epoch, after_entry)
COMMENT 'Rebuilds of Redis'
