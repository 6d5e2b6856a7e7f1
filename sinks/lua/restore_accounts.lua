-- Writes accounts as the ledger knows them, while a rebuild is under way.
--
-- ARGV: coming epoch, entries, then for each account: name, balance (us), number of its last line, floor (us),
--   grants as the scripts keep them, or an empty string.
-- Of an older Redis the sessions that it admitted go on, and so do their holds.

local refused = refusal()
if refused then return refused end

local at = now_ms()
for i = 3, #ARGV, 5 do
  local key = 'balance:{' .. ARGV[i] .. '}'
  call('HSET', key, 'balance_us', ARGV[i + 1], 'seq', ARGV[i + 2], 'floor_us', ARGV[i + 3], 'updated_at_ms', at)
  call('HSETNX', key, 'held_us', '0')
  call('HDEL', key, 'grants', 'beyond_us')
  if ARGV[i + 4] ~= '' then
    call('HSET', key, 'grants', ARGV[i + 4], 'beyond_us', '0')
    for _, grant in ipairs(grants_of({grants = ARGV[i + 4]})) do
      call('ZADD', 'grants', format('%.0f', grant.expires), ARGV[i] .. '|' .. grant.id)
    end
  end
end
return last_entry()
