-- One row per accepted utterance, as it was reported and priced.
--
-- Identity is (scope, source, id) and of several occurrences the one with the smallest (partition, offset)
-- counts: `precedence` turns that around, because the engine keeps the row with the largest version. Two
-- occurrences may carry different times and so lie in different months; FINAL brings them together only while
-- partition pruning waits for it (the server's default since 26.3; the views insist on it).
--
-- `time_ms` may lie anywhere in the years 1 to 9999. The month is therefore that of the time clamped to
-- 2020..2099, so that no event can open thousands of partitions; `time` is clamped to what DateTime64 promises.
CREATE TABLE IF NOT EXISTS {database}.usage_events
(
    scope String COMMENT 'room/<room_id>, or session/<session_id> without a room',
    source LowCardinality(String) COMMENT 'CloudEvents source of the event',
    id String COMMENT 'CloudEvents id; unique within (scope, source)',
    partition UInt32 COMMENT 'Kafka partition of this occurrence, below 65 536',
    offset UInt64 COMMENT 'Kafka offset of this occurrence, below 2^48',
    time_ms Int64 COMMENT 'event time, milliseconds since the Unix epoch',
    window_start_ms Int64 COMMENT 'start of its 60 s window, milliseconds since the Unix epoch',
    session_id String,
    room_id String COMMENT 'empty without a room',
    user_id String COMMENT 'who spoke',
    node_id LowCardinality(String) COMMENT 'who computed, and earns the credit',
    utterance_id String,
    audio_ms Nullable(UInt32) COMMENT 'length of the audio in milliseconds, if reported',
    asr_time_ms UInt32 COMMENT 'speech recognition, milliseconds',
    nmt_time_ms UInt32 COMMENT 'translation, milliseconds',
    tts_time_ms UInt32 COMMENT 'speech synthesis, milliseconds',
    gpu_active_time_ms UInt32 COMMENT 'GPU time, milliseconds',
    source_lang LowCardinality(String) COMMENT 'empty if not reported',
    target_lang LowCardinality(String) COMMENT 'empty if not reported',
    cost_us Int64 COMMENT 'price in service microseconds (60 000 000 = 1 balance minute)',
    credit_us Int64 COMMENT 'credit of the node in service microseconds',
    rate_version LowCardinality(String) COMMENT 'effective_from of the rates that priced it',
    appended_at_ms Int64 COMMENT 'append time at the broker, milliseconds since the Unix epoch',
    precedence UInt64 MATERIALIZED 18446744073709551615 - (partition * 281474976710656 + offset)
        COMMENT '2^64 - 1 - (partition * 2^48 + offset): the earliest occurrence has the largest',
    time DateTime64(3, 'UTC')
        ALIAS fromUnixTimestamp64Milli(greatest(least(time_ms, 10413791999999), -2208988800000), 'UTC')
        COMMENT 'time_ms for people, clamped to 1900..2299',
    window_start DateTime64(3, 'UTC')
        ALIAS fromUnixTimestamp64Milli(greatest(least(window_start_ms, 10413791999999), -2208988800000), 'UTC')
        COMMENT 'window_start_ms for people, clamped to 1900..2299'
)
ENGINE = ReplacingMergeTree(precedence)
PARTITION BY toYYYYMM(fromUnixTimestamp64Milli(greatest(least(time_ms, 4102444799999), 1577836800000), 'UTC'))
ORDER BY (scope, source, id)
COMMENT 'Usage as reported and priced; read it through the view usage'
