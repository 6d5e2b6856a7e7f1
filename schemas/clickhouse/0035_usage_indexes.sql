-- One utterance by its own id, whatever scope it is in; the order of the table is that of scopes. 50 ms instead of
-- 600 ms of five million utterances, for 2 % more disk.
ALTER TABLE {database}.usage_events
    ADD INDEX IF NOT EXISTS by_utterance utterance_id TYPE bloom_filter(0.01) GRANULARITY 1
