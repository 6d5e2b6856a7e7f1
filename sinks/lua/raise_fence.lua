-- Raises the fence and forgets the records of the cells before it, a bounded number a call.
--
-- ARGV: epoch, new fence (ms), how many records to forget at most.
-- Reply: {fence, number of records still to forget}. The fence only grows; a lower one changes nothing.
-- A crash between two calls leaves records below the fence: they take no postings, and the next call, with
-- any fence, forgets them.

local mismatch = epoch_mismatch(ARGV[1])
if mismatch then return mismatch end

local fence = call('GET', 'frozen_before_ms') or '0'
local raised = tonumber(ARGV[2]) > tonumber(fence)
if raised then fence = ARGV[2] end
local below = '(' .. fence
local frozen = call('ZRANGEBYSCORE', 'cells', '-inf', below, 'LIMIT', 0, tonumber(ARGV[3]))

if raised then
  call('SET', 'frozen_before_ms', fence)
  call('XADD', 'ledger', '*', 'epoch', ARGV[1], 'at', now_ms(), 'fence', fence)
end
for _, cell in ipairs(frozen) do
  call('DEL', 'cell:' .. cell)
end
if #frozen > 0 then
  call('ZREM', 'cells', unpack(frozen))
end
return {fence, call('ZCOUNT', 'cells', '-inf', below)}
