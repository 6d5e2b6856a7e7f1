-- For what was stored before; the server does it in the background.
ALTER TABLE {database}.ledger
    MATERIALIZE INDEX IF EXISTS by_cell,
    MATERIALIZE INDEX IF EXISTS by_request
