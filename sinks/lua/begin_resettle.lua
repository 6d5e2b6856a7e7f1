-- Takes the next token, which voids all older ones.
--
-- ARGV: epoch, entries seen.
-- Reply: {last entry, token, fence (ms), clock (ms), fence of the last complete run (ms), up to which append time
--   it was complete (ms)}.
-- A crash after it leaves a token that nobody uses.

local refused = refusal()
if refused then return refused end

local token = call('HINCRBY', 'resettle', 'token', 1)
call('HSET', 'resettle', 'step', 0)
local done = call('HMGET', 'resettle', 'frozen_before_ms', 'appended_before_ms')
return {last_entry(), format('%.0f', token), call('GET', 'frozen_before_ms') or '0', now_ms(), done[1] or '0', done[2] or '0'}
