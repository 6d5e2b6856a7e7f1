-- Each scope that came to its end, with what the ledger holds for it. `settled` is false again once something
-- was posted for a later revision: the scope was reopened, and its next end will supersede the record. Repairs
-- (resettle) do not count for that: they change what is owed, not whether the scope is over.
CREATE OR REPLACE VIEW {database}.settlement_totals
AS SELECT
    endings.scope AS scope,
    endings.session_id AS session_id,
    endings.room_id AS room_id,
    endings.reason AS reason,
    endings.first_event_ms AS first_event_ms,
    endings.last_event_ms AS last_event_ms,
    toBool(endings.revision >= ifNull(sums.live_revision, 0)) AS settled,
    ifNull(sums.charged_us, 0) AS charged_us,
    CAST(round(toDecimal128(charged_us, 12) / 60000000, 9), 'Decimal(38, 9)') AS charged_minutes,
    ifNull(sums.credited_us, 0) AS credited_us,
    ifNull(sums.platform_us, 0) AS platform_us,
    ifNull(sums.payers, 0) AS payers,
    ifNull(sums.cells, 0) AS cells,
    endings.revision AS revision,
    endings.posted_at AS posted_at
FROM {database}.settlements AS endings FINAL
LEFT JOIN
(
    SELECT
        scope,
        -sumIf(amount_us, startsWith(account, 'user/')) AS charged_us,
        sumIf(amount_us, startsWith(account, 'node/')) AS credited_us,
        sumIf(amount_us, startsWith(account, 'platform/')) AS platform_us,
        uniqExactIf(account, startsWith(account, 'user/') AND amount_us != 0) AS payers,
        uniqExact(cell_id) AS cells,
        max(revision) AS live_revision
    FROM
    (
        SELECT
            scope,
            account,
            cell_id,
            sum(change_us) AS amount_us,
            maxIf(revision, reason != 'resettle') AS revision
        FROM {database}.ledger_lines
        WHERE cell_id != ''
        GROUP BY scope, account, cell_id
    )
    GROUP BY scope
) AS sums ON endings.scope = sums.scope
COMMENT 'Ended scopes with their sums over the ledger, in service microseconds; charged_minutes is for people'
