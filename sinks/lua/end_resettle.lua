-- Remembers up to where a resettle was complete; nothing when a newer one has taken over.
--
-- ARGV: epoch, entries seen, token, fence (ms), append time (ms) before which everything was considered.
-- Reply: {last entry}.

local refused = refusal()
if refused then return refused end

if call('HGET', 'resettle', 'token') == ARGV[3] then
  call('HSET', 'resettle', 'frozen_before_ms', ARGV[4], 'appended_before_ms', ARGV[5])
end
return {last_entry()}
