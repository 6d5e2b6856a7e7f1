-- What each node earned and worked by day (UTC) of the window. `credit_us` is what the ledger credited;
-- `reported_credit_us` is what its usage comes to, which is more while some of it is late or not yet settled.
CREATE OR REPLACE VIEW {database}.node_earnings
AS SELECT
    node_id,
    toDate32(fromUnixTimestamp64Milli(greatest(least(day_start_ms, 10413791999999), -2208988800000), 'UTC')) AS day,
    sum(credited_us) AS credit_us,
    CAST(round(toDecimal128(credit_us, 12) / 60000000, 9), 'Decimal(38, 9)') AS credit_minutes,
    sum(reported_us) AS reported_credit_us,
    sum(gpu_ms) AS gpu_active_time_ms,
    sum(reported) AS utterances,
    day_start_ms
FROM
(
    SELECT
        substring(account, length('node/') + 1) AS node_id,
        window_start_ms - positiveModulo(window_start_ms, 86400000) AS day_start_ms,
        change_us AS credited_us,
        toInt64(0) AS reported_us,
        toUInt64(0) AS gpu_ms,
        toUInt64(0) AS reported
    FROM {database}.ledger_lines
    WHERE cell_id != '' AND startsWith(account, 'node/')
    UNION ALL
    SELECT
        toString(node_id),
        window_start_ms - positiveModulo(window_start_ms, 86400000),
        toInt64(0),
        credit_us,
        toUInt64(gpu_active_time_ms),
        toUInt64(1)
    FROM {database}.usage
)
GROUP BY node_id, day_start_ms
COMMENT 'Earnings per node and day in service microseconds; credit_minutes is rounded, for people'
