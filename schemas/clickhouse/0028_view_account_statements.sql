-- Every line of every account, with the balance before and after; order by account, seq.
CREATE OR REPLACE VIEW {database}.account_statements
AS SELECT
    account,
    seq,
    posted_at,
    reason,
    change_us,
    balance_before_us,
    balance_after_us,
    CAST(round(toDecimal128(change_us, 12) / 60000000, 9), 'Decimal(38, 9)') AS change_minutes,
    CAST(round(toDecimal128(balance_before_us, 12) / 60000000, 9), 'Decimal(38, 9)') AS balance_before_minutes,
    CAST(round(toDecimal128(balance_after_us, 12) / 60000000, 9), 'Decimal(38, 9)') AS balance_after_minutes,
    scope,
    cell_id,
    session_id,
    room_id,
    rate_version,
    request_id,
    actor,
    note,
    revision,
    epoch,
    posted_at_ms,
    entry
FROM {database}.ledger_lines
ORDER BY account, seq
COMMENT 'Lines of every account in service microseconds; the minutes are rounded, for people'
