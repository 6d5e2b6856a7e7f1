-- Each time the fence was raised. The whole row is the identity: a repeat changes nothing, and no move can
-- hide another. The view usage labels as late what was appended after a move for a window before it.
CREATE TABLE IF NOT EXISTS {database}.fence_moves
(
    moved_at_ms Int64 COMMENT 'clock of Redis, milliseconds since the Unix epoch',
    frozen_before_ms Int64 COMMENT 'windows that start before it are frozen, milliseconds since the Unix epoch',
    epoch UInt64 COMMENT 'which Redis moved it'
)
ENGINE = ReplacingMergeTree
PARTITION BY tuple()
ORDER BY (moved_at_ms, frozen_before_ms, epoch)
COMMENT 'Moves of the fence; read with FINAL'
