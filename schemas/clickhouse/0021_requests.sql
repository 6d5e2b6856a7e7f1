-- Every money command that was carried out, also one that moved nothing: what makes a request id permanent. Of two
-- rows with one id the first entry counts (`precedence` turns that around, as in usage_events).
CREATE TABLE IF NOT EXISTS {database}.requests
(
    request_id String COMMENT 'made by the client; one request is carried out once',
    digest String COMMENT 'of the body of the command',
    kind LowCardinality(String) COMMENT 'top_up, adjustment or write_off',
    account String,
    amount_us Int64 COMMENT 'what was moved, in service microseconds; 0 when nothing was',
    balance_us Int64 COMMENT 'of the account, afterwards',
    outcome LowCardinality(String) COMMENT 'APPLIED or OVER_LIMIT',
    actor String COMMENT 'who gave the command',
    note String COMMENT 'the words given with the command',
    epoch UInt64 COMMENT 'which Redis carried it out',
    entry UInt64 COMMENT 'number of the outbox entry that brought the row',
    posted_at_ms Int64 COMMENT 'clock of Redis, milliseconds since the Unix epoch'
)
ENGINE = ReplacingMergeTree(epoch)
PARTITION BY tuple()
ORDER BY request_id
COMMENT 'Results of money commands; read with FINAL'
