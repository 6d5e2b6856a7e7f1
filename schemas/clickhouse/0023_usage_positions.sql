-- How far the usage store is in the log: every message before next_offset is stored, or was refused. A row is
-- written after the rows it speaks of, so it may be behind and is never ahead.
CREATE TABLE IF NOT EXISTS {database}.usage_positions
(
    topic LowCardinality(String),
    log LowCardinality(String) COMMENT 'id of the topic: one made anew counts its offsets anew',
    partition UInt32,
    next_offset UInt64,
    appended_at_ms Int64 COMMENT 'append time of the last message before it, milliseconds since the Unix epoch'
)
ENGINE = ReplacingMergeTree(next_offset)
PARTITION BY tuple()
ORDER BY (topic, log, partition)
COMMENT 'How far the usage store is; read with FINAL'
