-- The lines that count: one per (account, seq), without what older epochs wrote after the entry from which a rebuilt
-- Redis went on. Every question about money goes through here.
CREATE VIEW IF NOT EXISTS {database}.ledger_lines
AS SELECT
    *,
    toInt64OrZero(splitByChar('@', cell_id)[2]) AS window_start_ms
FROM {database}.ledger FINAL
WHERE NOT arrayExists(
    rebuilt -> rebuilt.1 > epoch AND rebuilt.2 < entry,
    (SELECT groupArray((epoch, after_entry)) FROM {database}.epochs)
)
COMMENT 'Ledger lines that count'
