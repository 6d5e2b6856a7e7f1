-- Replaces results of money commands that the ledger has, and that are past the retention, by marks: their request
-- ids stay spent.
--
-- ARGV: epoch, entries seen, retention (ms), how many at most.
-- Reply: {last entry, how many were replaced}.

local refused = refusal()
if refused then return refused end

local before = format('%.0f', tonumber(now_ms()) - tonumber(ARGV[3]))
local in_ledger = tonumber(call('GET', 'ledger_stored') or '0')
local replaced = 0
for _, request_id in ipairs(call('ZRANGEBYSCORE', 'requests', '-inf', before, 'LIMIT', 0, tonumber(ARGV[4]))) do
  local known = call('HMGET', 'request:' .. request_id, 'digest', 'entry')
  if known[2] and tonumber(known[2]) <= in_ledger then
    local bucket, name, body = request_mark(request_id, known[1])
    call('HSET', bucket, name, body)
    call('DEL', 'request:' .. request_id)
    call('ZREM', 'requests', request_id)
    replaced = replaced + 1
  end
end
return {last_entry(), replaced}
