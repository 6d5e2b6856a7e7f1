-- Each grant with what is left of it, expired ones too.
CREATE VIEW IF NOT EXISTS {database}.grants_left
AS SELECT
    account,
    substring(account, 6) AS user_id,
    grant_id,
    note,
    priority,
    fromUnixTimestamp64Milli(from_ms, 'UTC') AS from_at,
    fromUnixTimestamp64Milli(expires_ms, 'UTC') AS expires_at,
    amount_us,
    CAST(round(toDecimal128(amount_us, 12) / 60000000, 9), 'Decimal(38, 9)') AS amount_minutes,
    ifNull(moved_us, toInt64(0)) AS left_us,
    CAST(round(toDecimal128(left_us, 12) / 60000000, 9), 'Decimal(38, 9)') AS left_minutes
FROM (
    SELECT * FROM {database}.grants FINAL
    WHERE NOT arrayExists(
        rebuilt -> rebuilt.1 > epoch AND rebuilt.2 < entry,
        (SELECT groupArray((epoch, after_entry)) FROM {database}.epochs)
    )
) AS given
LEFT JOIN (
    SELECT account, change.1 AS grant_id, sum(change.2) AS moved_us
    FROM (
        SELECT account, arrayJoin(CAST(grants, 'Array(Tuple(String, Int64))')) AS change
        FROM {database}.ledger FINAL
        WHERE NOT arrayExists(
            rebuilt -> rebuilt.1 > epoch AND rebuilt.2 < entry,
            (SELECT groupArray((epoch, after_entry)) FROM {database}.epochs)
        )
    )
    GROUP BY account, grant_id
) AS moved USING (account, grant_id)
COMMENT 'Grants and what is left of them'
