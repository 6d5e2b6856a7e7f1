-- Usage by minute of event time, scope and session (a room's minute has one row per speaking session).
CREATE VIEW IF NOT EXISTS {database}.usage_per_minute
AS SELECT
    any(window_start) AS window_start,
    window_start_ms,
    scope,
    room_id,
    session_id,
    count() AS utterances,
    countIf(late) AS late_utterances,
    sum(asr_time_ms) AS asr_time_ms,
    sum(nmt_time_ms) AS nmt_time_ms,
    sum(tts_time_ms) AS tts_time_ms,
    sum(gpu_active_time_ms) AS gpu_active_time_ms,
    sum(cost_us) AS cost_us,
    sum(credit_us) AS credit_us
FROM {database}.usage
GROUP BY window_start_ms, scope, room_id, session_id
COMMENT 'Usage by minute, scope and session: milliseconds by stage, cost and credit in service microseconds'
