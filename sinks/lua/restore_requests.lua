-- Writes first results of money commands as the ledger knows them, while a rebuild is under way.
--
-- ARGV: coming epoch, entries, then for each request: id, digest of the body, amount (us) that was moved, balance
--   after (us), outcome, when (ms), number of its outbox entry.

local refused = refusal()
if refused then return refused end

for i = 3, #ARGV, 7 do
  call('HSET', 'request:' .. ARGV[i], 'digest', ARGV[i + 1], 'amount_us', ARGV[i + 2], 'balance_us', ARGV[i + 3],
    'outcome', ARGV[i + 4], 'at_ms', ARGV[i + 5], 'entry', ARGV[i + 6])
  call('ZADD', 'requests', ARGV[i + 5], ARGV[i])
end
return last_entry()
