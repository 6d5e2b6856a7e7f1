-- One cell's lines, and one money command's, without reading the whole ledger, whose order is that of accounts:
-- 30 ms instead of 300 ms of ten million lines, for 5 % more disk. There is none on scope, since the big accounts have
-- a room's lines everywhere.
ALTER TABLE {database}.ledger
    ADD INDEX IF NOT EXISTS by_cell cell_id TYPE bloom_filter(0.01) GRANULARITY 1,
    ADD INDEX IF NOT EXISTS by_request request_id TYPE bloom_filter(0.01) GRANULARITY 1
