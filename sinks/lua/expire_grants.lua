-- Takes back what is left of grants whose end the fence has passed, a bounded number a call.
--
-- ARGV: epoch, entries seen, outbox bound, how many at most.
-- Reply: 'FULL', or {last entry, how many expired}.
-- An expired grant is forgotten, so that a repeat finds nothing to take.

local refused = refusal()
if refused then return refused end
if call('XLEN', 'ledger') >= tonumber(ARGV[3]) then return 'FULL' end

local fence = call('GET', 'frozen_before_ms') or '0'
local expired = call('ZRANGEBYSCORE', 'grants', '-inf', fence, 'LIMIT', 0, tonumber(ARGV[4]))
local counter = 'platform/adjustments'
local lines, ids = {}, {}
for _, member in ipairs(expired) do
  local account, id = string.match(member, '^([^|]+)|(.+)$')
  local state = account_state(account)
  local list, left, kept = grants_of(state), 0, {}
  for _, grant in ipairs(list) do
    if grant.id == id then left = grant.left else kept[#kept + 1] = grant end
  end
  state.list, state.beyond, state.changed = kept, 0, true
  if left > 0 then
    local amount = format('%.0f', left)
    local counter_state = account_state(counter)
    local after, counter_after = add(state.balance, negated(amount)), add(counter_state.balance, amount)
    if not after or not counter_after then
      return redis.error_reply('OVER_LIMIT ' .. member .. ' would take a balance out of its range')
    end
    local before, counter_before = state.balance, counter_state.balance
    local reference = format('%d', #ids)
    ids[#ids + 1] = '"' .. id .. '"'
    state.balance, state.seq = after, state.seq + 1
    lines[#lines + 1] = line(account, state, negated(amount), before, 'adjustment', reference,
      '{"' .. id .. '":-' .. amount .. '}')
    counter_state.balance, counter_state.seq, counter_state.changed = counter_after, counter_state.seq + 1, true
    lines[#lines + 1] = line(counter, counter_state, amount, counter_before, 'adjustment', reference)
  end
end

-- From here on only writes.
if #expired > 0 then
  local at = now_ms()
  write_accounts(at)
  call('ZREM', 'grants', unpack(expired))
  if #lines > 0 then
    append(at,
      'expired', '[' .. table.concat(ids, ',') .. ']',
      'lines', '[' .. table.concat(lines, ',') .. ']')
  end
end
return {last_entry(), #expired}
