-- That a scope came to its end. An event after that reopens the scope; its next end has a higher revision and
-- supersedes this row. Totals are not kept here: they are sums over the ledger (view settlement_totals).
CREATE TABLE IF NOT EXISTS {database}.settlements
(
    scope String COMMENT 'room/<room_id> or session/<session_id>',
    session_id String COMMENT 'of a session scope, else empty',
    room_id String COMMENT 'of a room scope, else empty',
    reason LowCardinality(String) COMMENT 'ended or timeout',
    first_event_ms Int64 COMMENT 'event time of the first event, milliseconds since the Unix epoch',
    last_event_ms Int64 COMMENT 'event time of the last event, milliseconds since the Unix epoch',
    revision Int64 COMMENT 'of the scope when it ended; it only grows',
    epoch UInt64 COMMENT 'which Redis wrote it',
    posted_at_ms Int64 COMMENT 'clock of Redis, milliseconds since the Unix epoch',
    posted_at DateTime64(3, 'UTC')
        DEFAULT fromUnixTimestamp64Milli(greatest(least(posted_at_ms, 10413791999999), -2208988800000), 'UTC')
        COMMENT 'posted_at_ms for people'
)
ENGINE = ReplacingMergeTree(revision)
PARTITION BY tuple()
ORDER BY scope
COMMENT 'Scopes that came to their end; read with FINAL'
