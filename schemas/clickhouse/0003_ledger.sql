-- The journal: every change of every balance, drained from the outbox in Redis. Identity is (account, seq);
-- of two lines with one number the one from the higher epoch counts, because a rebuilt Redis goes on from the
-- ledger. One partition: such a pair may be months apart and must meet, and the journal is never dropped by age.
CREATE TABLE IF NOT EXISTS {database}.ledger
(
    account String COMMENT 'user/<id>, node/<id>, platform/revenue, platform/top_ups, platform/adjustments',
    seq Int64 COMMENT 'number of the line within its account, from 1, without gaps',
    change_us Int64 COMMENT 'service microseconds (60 000 000 = 1 balance minute); charges are negative',
    balance_before_us Int64 COMMENT 'service microseconds',
    balance_after_us Int64 COMMENT 'service microseconds',
    reason LowCardinality(String) COMMENT 'charge, credit, revenue, top_up, write_off, adjustment, resettle',
    epoch UInt64 COMMENT 'which Redis wrote it',
    request_id String COMMENT 'the money command, or empty',
    cell_id String COMMENT '<scope>@<window_start_ms>, or empty for a money command',
    revision Int64 COMMENT 'revision of the cell that this line posted',
    scope String COMMENT 'room/<room_id> or session/<session_id>, or empty for a money command',
    session_id String COMMENT 'of a session scope, else empty',
    room_id String COMMENT 'of a room scope, else empty',
    rate_version String COMMENT 'effective_from of the rates, comma-separated if several',
    actor String COMMENT 'who gave a money command',
    note String COMMENT 'the words given with a money command',
    posted_at_ms Int64 COMMENT 'clock of Redis, milliseconds since the Unix epoch',
    posted_at DateTime64(3, 'UTC')
        DEFAULT fromUnixTimestamp64Milli(greatest(least(posted_at_ms, 10413791999999), -2208988800000), 'UTC')
        COMMENT 'posted_at_ms for people',
    window_start_ms Int64 ALIAS toInt64OrZero(splitByChar('@', cell_id)[2])
        COMMENT 'start of the window of the cell, milliseconds since the Unix epoch; 0 for a money command'
)
ENGINE = ReplacingMergeTree(epoch)
PARTITION BY tuple()
ORDER BY (account, seq)
COMMENT 'Every change of every balance; read with FINAL'
