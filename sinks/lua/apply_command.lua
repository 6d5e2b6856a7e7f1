-- Carries out one money command as a double posting, once for each request id.
--
-- ARGV: epoch, entries seen, outbox bound, request id, digest of the body, kind (top_up, adjustment, write_off, grant),
--   account, counter account (a node's for a write-off, or when it pays a top-up), amount (us), who and why as JSON
--   strings ("request id","actor","reason"); of a grant also priority, from and expires (ms).
-- What came of it goes to the outbox even when nothing moved, so that a rebuild knows it too.
-- Reply: 'FULL', or {last entry, outcome, amount (us) that was moved, balance after (us)} with outcome APPLIED, REPLAYED
--   (same id, same body: the first result), ARCHIVED (likewise, but only the ledger has the result), CONFLICT (same
--   id, another body), OVER_LIMIT or INSUFFICIENT (the node has less than it should pay).
-- Errors: EPOCH ... when this is not the Redis that the caller means; nothing was done.

local refused = refusal()
if refused then return refused end

local request = 'request:' .. ARGV[4]
local stored = call('HMGET', request, 'digest', 'amount_us', 'balance_us', 'outcome')
if stored[1] then
  local repeated = stored[4] == 'APPLIED' and 'REPLAYED' or stored[4]
  return {last_entry(), stored[1] == ARGV[5] and repeated or 'CONFLICT', stored[2], stored[3]}
end
local bucket, name, body = request_mark(ARGV[4], ARGV[5])
local mark = call('HGET', bucket, name)
if mark then return {last_entry(), mark == body and 'ARCHIVED' or 'CONFLICT', '0', '0'} end
if call('XLEN', 'ledger') >= tonumber(ARGV[3]) then return 'FULL' end

local kind, account, counter, amount = ARGV[6], ARGV[7], ARGV[8], ARGV[9]
local state, counter_state = account_state(account), account_state(counter)

if kind == 'write_off' then
  -- The amount is a maximum: never more than the debt, never more than the node has.
  local most = math.min(tonumber(amount), -tonumber(state.balance), tonumber(counter_state.balance))
  -- Amounts are bounded well below 2^53, so the smallest of the three is exact whenever it is not the amount.
  amount = most > 0 and format('%.0f', most) or '0'
end

local lines, outcome = {}, 'APPLIED'
if amount ~= '0' then
  local after, counter_after = add(state.balance, amount), add(counter_state.balance, negated(amount))
  if not after or not counter_after or account == counter then
    amount, outcome = '0', 'OVER_LIMIT'
  elseif kind == 'top_up' and sub(counter, 1, 5) == 'node/' and sub(counter_after, 1, 1) == '-' then
    amount, outcome = '0', 'INSUFFICIENT'
  elseif kind == 'grant' and #grants_of(state) >= 32 then
    amount, outcome = '0', 'OVER_LIMIT'
  else
    local before, counter_before = state.balance, counter_state.balance
    local reason, grants = kind, nil
    if kind == 'grant' then
      local list = grants_of(state)
      list[#list + 1] = {id = ARGV[4], priority = tonumber(ARGV[11]), from = tonumber(ARGV[12]),
        expires = tonumber(ARGV[13]), amount = tonumber(amount), left = tonumber(amount)}
      sort_grants(list)
      state.beyond = 0
      reason, grants = 'adjustment', '{"' .. ARGV[4] .. '":' .. amount .. '}'
    end
    state.balance, state.seq, state.changed = after, state.seq + 1, true
    lines[1] = line(account, state, amount, before, reason, '0', grants)
    counter_state.balance, counter_state.seq, counter_state.changed = counter_after, counter_state.seq + 1, true
    lines[2] = line(counter, counter_state, negated(amount), counter_before, reason, '0')
  end
end

-- From here on only writes.
local at = now_ms()
write_accounts(at)
call('HSET', request, 'digest', ARGV[5], 'amount_us', amount, 'balance_us', state.balance, 'outcome', outcome,
  'at_ms', at, 'entry', format('%.0f', tonumber(call('GET', 'entries') or '0') + 1))
call('ZADD', 'requests', at, ARGV[4])
if kind == 'grant' and outcome == 'APPLIED' then call('ZADD', 'grants', ARGV[13], account .. '|' .. ARGV[4]) end
append(at,
  'grant', kind == 'grant' and '[' .. ARGV[11] .. ',' .. ARGV[12] .. ',' .. ARGV[13] .. ']' or 'null',
  'command', '[' .. ARGV[10] .. ',"' .. ARGV[5] .. '","' .. kind .. '","' .. account .. '","' .. amount .. '","'
    .. state.balance .. '","' .. outcome .. '"]',
  'lines', '[' .. table.concat(lines, ',') .. ']')
return {last_entry(), outcome, amount, state.balance}
