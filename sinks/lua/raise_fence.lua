-- Raises the fence and forgets the records of the cells before it, a bounded number a call.
--
-- ARGV: epoch, entries seen, new fence (ms), how many records to forget at most.
-- Reply: {fence, last entry, number of records still to forget}. The fence only grows; a lower one changes nothing.
-- A crash between two calls leaves records below the fence: they take no postings, and the next call, with
-- any fence, forgets them.

local refused = refusal()
if refused then return refused end

local fence = call('GET', 'frozen_before_ms') or '0'
local raised = tonumber(ARGV[3]) > tonumber(fence)
if raised then fence = ARGV[3] end
local below = '(' .. fence
local frozen = call('ZRANGEBYSCORE', 'cells', '-inf', below, 'LIMIT', 0, tonumber(ARGV[4]))

if raised then
  call('SET', 'frozen_before_ms', fence)
  append(now_ms(), 'fence', fence)
end
for _, cell in ipairs(frozen) do
  call('DEL', 'cell:' .. cell)
end
if #frozen > 0 then
  call('ZREM', 'cells', unpack(frozen))
end
return {fence, last_entry(), call('ZCOUNT', 'cells', '-inf', below)}
