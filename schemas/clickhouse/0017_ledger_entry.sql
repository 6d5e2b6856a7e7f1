-- Which outbox entry brought a line. Entries are numbered without gaps, so the reader of the outbox knows whether
-- Redis still has what it had; what a rebuild left behind is told by it (view ledger_lines).
ALTER TABLE {database}.ledger
    ADD COLUMN IF NOT EXISTS entry UInt64 DEFAULT 0 COMMENT 'number of the outbox entry that brought the line'
