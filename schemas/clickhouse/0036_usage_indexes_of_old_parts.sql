-- For what was stored before; the server does it in the background.
ALTER TABLE {database}.usage_events
    MATERIALIZE INDEX IF EXISTS by_utterance
