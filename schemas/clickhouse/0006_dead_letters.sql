-- Messages that were refused, with their original bytes. Identity is (topic, log, partition, offset): a topic
-- made anew counts its offsets anew. A message without key or value has NULL there, which is not the same as an empty one.
CREATE TABLE IF NOT EXISTS {database}.dead_letters
(
    topic LowCardinality(String) COMMENT 'Kafka topic of the original message',
    log LowCardinality(String) COMMENT 'id of that topic',
    partition UInt32 COMMENT 'Kafka partition of the original message',
    offset UInt64 COMMENT 'Kafka offset of the original message',
    reason LowCardinality(String) COMMENT 'one of a fixed set of words',
    detail String COMMENT 'what exactly was wrong, for people',
    key Nullable(String) COMMENT 'original key, raw bytes',
    value Nullable(String) COMMENT 'original value, raw bytes',
    appended_at_ms Int64 COMMENT 'append time of the original message, milliseconds since the Unix epoch',
    appended_at DateTime64(3, 'UTC')
        ALIAS fromUnixTimestamp64Milli(greatest(least(appended_at_ms, 10413791999999), -2208988800000), 'UTC')
        COMMENT 'appended_at_ms for people, clamped to 1900..2299'
)
ENGINE = ReplacingMergeTree
PARTITION BY toYYYYMM(fromUnixTimestamp64Milli(greatest(least(appended_at_ms, 4102444799999), 1577836800000), 'UTC'))
ORDER BY (topic, log, partition, offset)
COMMENT 'Refused messages with their original bytes; read with FINAL'
