-- The last known balance of every account: what the ledger says, a moment behind the live one in Redis.
CREATE OR REPLACE VIEW {database}.balances
AS SELECT
    account,
    argMax(balance_after_us, seq) AS balance_us,
    CAST(round(toDecimal128(balance_us, 12) / 60000000, 9), 'Decimal(38, 9)') AS balance_minutes,
    sum(change_us) AS changes_us,
    count() AS lines,
    max(seq) AS last_seq,
    argMax(posted_at, seq) AS last_posted_at,
    argMax(epoch, seq) AS last_epoch
FROM {database}.ledger_lines
GROUP BY account
COMMENT 'Balance per account in service microseconds; balance_us = changes_us and lines = last_seq in a whole chain'
