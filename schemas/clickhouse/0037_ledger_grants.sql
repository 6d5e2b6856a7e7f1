-- By how much a line changed what is left of the account's grants: how a charge was split over them. Empty for
-- whatever was paid from the rest of the balance.
ALTER TABLE {database}.ledger
    ADD COLUMN IF NOT EXISTS grants Map(String, Int64) COMMENT 'grant id -> change in service microseconds'
