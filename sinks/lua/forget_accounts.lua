-- Removes those of the balances that were not restored, while a rebuild is under way. Where something is held, only
-- that stays: a new user may have been admitted before anything was posted.
--
-- ARGV: coming epoch, entries, then keys of balances.
-- Reply: {last entry, how many were removed}.

local refused = refusal()
if refused then return refused end

local forgotten = 0
for i = 3, #ARGV do
  local stored = call('HMGET', ARGV[i], 'seq', 'held_us')
  if not stored[1] then
    if (stored[2] or '0') == '0' then
      forgotten = forgotten + call('UNLINK', ARGV[i])
    else
      call('HDEL', ARGV[i], 'balance_us', 'floor_us', 'updated_at_ms')
    end
  end
end
return {last_entry(), forgotten}
