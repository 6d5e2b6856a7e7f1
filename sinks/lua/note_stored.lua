-- Notes up to which entry the outbox is stored, and forgets what is stored and past the retention, or at once what
-- is stored beyond half of the bound, so that the retention never fills the outbox by itself.
--
-- ARGV: epoch, the last stored entry as "number@", its id, retention (ms), outbox bound.
-- Reply: number of entries that are left.
-- An outbox that never got so far is another one: see `refusal`.

local refused = refusal()
if refused then return refused end

local keep_from = ARGV[3]
if call('XLEN', 'ledger') <= tonumber(ARGV[5]) / 2 then
  local expired = tonumber(now_ms()) - tonumber(ARGV[4])
  if expired < tonumber(string.match(ARGV[3], '^%d+')) then
    keep_from = format('%.0f-0', expired)
  end
  -- Alerts are read from the same stream. They hold the trimming up to that half and no further: money goes first.
  local alerted = call('GET', 'alerts_sent')
  if alerted and tonumber(string.match(alerted, '^%d+')) < tonumber(string.match(keep_from, '^%d+')) then
    keep_from = alerted
  end
end
-- MINID keeps the entry of that very id: the last one stored stays, which costs nothing.
call('XTRIM', 'ledger', 'MINID', keep_from)
-- After the trimming: a Redis without memory refuses a script's first write if that may take some, and trimming is
-- what would give it back.
local number = string.match(ARGV[2], '^%d+')
if tonumber(call('GET', 'ledger_stored') or '0') < tonumber(number) then
  call('SET', 'ledger_stored', number)
end
return call('XLEN', 'ledger')
