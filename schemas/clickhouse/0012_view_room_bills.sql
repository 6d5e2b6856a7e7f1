-- What each member of a room was charged, summed over room_bill_lines. `settled` is that of settlement_totals.
CREATE VIEW IF NOT EXISTS {database}.room_bills
AS SELECT
    bills.room_id AS room_id,
    bills.user_id AS user_id,
    bills.total_share_us AS share_us,
    CAST(round(toDecimal128(bills.total_share_us, 12) / 60000000, 9), 'Decimal(38, 9)') AS share_minutes,
    sum(bills.total_share_us) OVER (PARTITION BY bills.scope) AS room_total_us,
    bills.cells AS cells,
    bills.first_window_start_ms AS first_window_start_ms,
    bills.last_window_start_ms AS last_window_start_ms,
    ifNull(endings.settled, false) AS settled,
    bills.scope AS scope
FROM
(
    SELECT
        scope,
        room_id,
        user_id,
        sum(share_us) AS total_share_us,
        count() AS cells,
        min(window_start_ms) AS first_window_start_ms,
        max(window_start_ms) AS last_window_start_ms
    FROM {database}.room_bill_lines
    GROUP BY scope, room_id, user_id
) AS bills
LEFT JOIN {database}.settlement_totals AS endings ON bills.scope = endings.scope
COMMENT 'Bill per room and member, in service microseconds; share_minutes is rounded, for people'
