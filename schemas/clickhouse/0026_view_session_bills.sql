-- What each user was charged for a session without a room, from the ledger. Whoever was charged nothing has no
-- row; `cells` counts the minutes that cost something. `settled` is that of settlement_totals.
CREATE OR REPLACE VIEW {database}.session_bills
AS SELECT
    substring(bills.scope, length('session/') + 1) AS session_id,
    substring(bills.account, length('user/') + 1) AS user_id,
    bills.charged_us AS charged_us,
    CAST(round(toDecimal128(bills.charged_us, 12) / 60000000, 9), 'Decimal(38, 9)') AS charged_minutes,
    sum(bills.charged_us) OVER (PARTITION BY bills.scope) AS session_total_us,
    bills.cells AS cells,
    bills.first_window_start_ms AS first_window_start_ms,
    bills.last_window_start_ms AS last_window_start_ms,
    ifNull(endings.settled, false) AS settled,
    bills.scope AS scope
FROM
(
    SELECT
        scope,
        account,
        sum(cell_charged_us) AS charged_us,
        count() AS cells,
        min(cell_window_start_ms) AS first_window_start_ms,
        max(cell_window_start_ms) AS last_window_start_ms
    FROM
    (
        SELECT scope, account, any(window_start_ms) AS cell_window_start_ms, -sum(change_us) AS cell_charged_us
        FROM {database}.ledger_lines
        WHERE startsWith(scope, 'session/') AND cell_id != '' AND startsWith(account, 'user/')
        GROUP BY scope, account, cell_id
        HAVING cell_charged_us != 0
    )
    GROUP BY scope, account
) AS bills
LEFT JOIN {database}.settlement_totals AS endings ON bills.scope = endings.scope
COMMENT 'Bill per session and user, in service microseconds; charged_minutes is rounded, for people'
