-- Sessions and rooms beginning, ending and changing their members. An identity (scope, source, id) belongs to
-- whichever event came first, of either table; `precedence` and the month are those of usage_events.
CREATE TABLE IF NOT EXISTS {database}.lifecycle_events
(
    scope String COMMENT 'room/<room_id>, or session/<session_id> without a room',
    source LowCardinality(String) COMMENT 'CloudEvents source of the event',
    id String COMMENT 'CloudEvents id; unique within (scope, source)',
    partition UInt32 COMMENT 'Kafka partition of this occurrence, below 65 536',
    offset UInt64 COMMENT 'Kafka offset of this occurrence, below 2^48',
    time_ms Int64 COMMENT 'event time, milliseconds since the Unix epoch',
    kind Int8 COMMENT '1 joined, 2 left, 3 room closed, 4 session started, 5 session ended',
    user_id String COMMENT 'empty for room closed',
    session_id String COMMENT 'empty for the room kinds',
    room_id String COMMENT 'empty without a room',
    appended_at_ms Int64 COMMENT 'append time at the broker, milliseconds since the Unix epoch',
    precedence UInt64 MATERIALIZED 18446744073709551615 - (partition * 281474976710656 + offset)
        COMMENT '2^64 - 1 - (partition * 2^48 + offset): the earliest occurrence has the largest',
    time DateTime64(3, 'UTC')
        ALIAS fromUnixTimestamp64Milli(greatest(least(time_ms, 10413791999999), -2208988800000), 'UTC')
        COMMENT 'time_ms for people, clamped to 1900..2299'
)
ENGINE = ReplacingMergeTree(precedence)
PARTITION BY toYYYYMM(fromUnixTimestamp64Milli(greatest(least(time_ms, 4102444799999), 1577836800000), 'UTC'))
ORDER BY (scope, source, id)
COMMENT 'Lifecycle of sessions and rooms; read with FINAL'
