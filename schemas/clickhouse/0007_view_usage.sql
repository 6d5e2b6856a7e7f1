-- The usage that counts, one row per utterance, for every question about usage.
--
-- An identity belongs to its earliest occurrence among usage and lifecycle events together; usage that lost it
-- to a lifecycle event is left out. Only sources that report both kinds can clash so, which keeps that join
-- small. `late` marks usage that was appended when the fence already stood past its window: it is not in the
-- live bill and is settled by `metering resettle`. The clauses `SETTINGS` keep FINAL whole across months whatever
-- the session or the profile of the reader says.
CREATE VIEW IF NOT EXISTS {database}.usage
AS SELECT
    events.time AS time,
    events.window_start AS window_start,
    events.scope AS scope,
    events.session_id AS session_id,
    events.room_id AS room_id,
    events.user_id AS user_id,
    events.node_id AS node_id,
    events.utterance_id AS utterance_id,
    events.audio_ms AS audio_ms,
    events.asr_time_ms AS asr_time_ms,
    events.nmt_time_ms AS nmt_time_ms,
    events.tts_time_ms AS tts_time_ms,
    events.gpu_active_time_ms AS gpu_active_time_ms,
    events.source_lang AS source_lang,
    events.target_lang AS target_lang,
    events.cost_us AS cost_us,
    events.credit_us AS credit_us,
    events.rate_version AS rate_version,
    toBool(ifNull(fence.frozen_before_ms > events.window_start_ms, false)) AS late,
    events.source AS source,
    events.id AS id,
    events.partition AS partition,
    events.offset AS offset,
    events.time_ms AS time_ms,
    events.window_start_ms AS window_start_ms,
    events.appended_at_ms AS appended_at_ms
FROM
(
    SELECT
        *,
        time,
        window_start,
        precedence,
        1 AS every_row
    FROM {database}.usage_events FINAL
    SETTINGS defer_partition_pruning_after_final = 1, do_not_merge_across_partitions_select_final = 0
) AS events
LEFT JOIN
(
    SELECT scope, source, id, toNullable(max(precedence)) AS precedence
    FROM {database}.lifecycle_events
    WHERE source IN (SELECT DISTINCT source FROM {database}.usage_events)
    GROUP BY scope, source, id
) AS claims ON events.scope = claims.scope AND events.source = claims.source AND events.id = claims.id
ASOF LEFT JOIN
(
    SELECT
        1 AS every_row,
        moved_at_ms,
        toNullable(max(max(frozen_before_ms)) OVER (ORDER BY moved_at_ms)) AS frozen_before_ms
    FROM {database}.fence_moves
    GROUP BY moved_at_ms
) AS fence ON events.every_row = fence.every_row AND events.appended_at_ms >= fence.moved_at_ms
WHERE NOT ifNull(claims.precedence > events.precedence, false)
COMMENT 'Usage that counts, one row per utterance, with the label late'
