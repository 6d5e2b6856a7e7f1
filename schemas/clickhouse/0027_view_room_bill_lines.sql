-- Each member's share of each minute of a room, from the ledger. A member whose share came to nothing (who left
-- the split after a correction, or whose minute cost less than a microsecond a head) has no row.
CREATE OR REPLACE VIEW {database}.room_bill_lines
AS SELECT
    substring(scope, length('room/') + 1) AS room_id,
    substring(account, length('user/') + 1) AS user_id,
    cell_id,
    cell_window_start_ms AS window_start_ms,
    fromUnixTimestamp64Milli(greatest(least(window_start_ms, 10413791999999), -2208988800000), 'UTC') AS window_start,
    share_us,
    sum(share_us) OVER (PARTITION BY cell_id) AS cell_total_us,
    count() OVER (PARTITION BY cell_id) AS payers,
    postings,
    rates AS rate_version,
    scope
FROM
(
    SELECT
        scope,
        account,
        cell_id,
        any(window_start_ms) AS cell_window_start_ms,
        -sum(change_us) AS share_us,
        count() AS postings,
        argMax(rate_version, seq) AS rates
    FROM {database}.ledger_lines
    WHERE startsWith(scope, 'room/') AND cell_id != '' AND startsWith(account, 'user/')
    GROUP BY scope, account, cell_id
    HAVING share_us != 0
)
COMMENT 'Share per room, minute and member, in service microseconds; postings counts the ledger lines behind it'
