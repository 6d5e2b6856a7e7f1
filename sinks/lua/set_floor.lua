-- Gives an account a floor of its own.
--
-- ARGV: epoch, entries seen, outbox bound, account, floor (us).
-- Reply: 'FULL', or {last entry}. The same floor again changes nothing.

local refused = refusal()
if refused then return refused end
if call('XLEN', 'ledger') >= tonumber(ARGV[3]) then return 'FULL' end

local account, floor = ARGV[4], ARGV[5]
local state = account_state(account)
if state.floor ~= floor then
  local at = now_ms()
  state.changed, state.floor_before, state.floor = true, state.floor or DEFAULT_FLOOR_US, floor
  write_accounts(at)
  call('HSET', 'balance:{' .. account .. '}', 'floor_us', floor)
  append(at, 'floor', '["' .. account .. '","' .. floor .. '"]')
end
return {last_entry()}
