-- Shared by every script of the family; put in front of each by sinks/balances.py.
--
-- Laws: a script reads and checks everything first and writes last, because one that fails midway keeps what
-- it wrote. Amounts travel and are stored as decimal strings: Lua numbers are doubles, exact only below 2^53.
-- A script runs only on the Redis it was meant for (`refusal`), and appends at most one entry to the outbox.

local call, format, sub = redis.call, string.format, string.sub

-- Every script begins with ARGV: epoch, number of the last outbox entry that the caller has seen. Returns the
-- error to answer with when this is not the Redis that the caller means, else nil.
--
-- Fewer entries than somebody saw before means that Redis lost its end. The epoch goes with it, so that from then
-- on every script of every caller refuses, until a rebuild sets a new one. While that rebuild is under way only it
-- knows the coming epoch.
local function refusal()
  local epoch = call('GET', 'epoch') or call('GET', 'rebuilding')
  if epoch ~= ARGV[1] then
    return redis.error_reply('EPOCH expected ' .. ARGV[1] .. ', found ' .. (epoch or 'none'))
  end
  local entries = call('GET', 'entries') or '0'
  if tonumber(entries) < tonumber(ARGV[2]) then
    call('DEL', 'epoch')
    return redis.error_reply('EPOCH lost: the outbox has ' .. entries .. ' entries, ' .. ARGV[2] .. ' were seen')
  end
  return nil
end

-- Filled by `write_accounts`: users whose balance fell past a threshold, as JSON.
local alerts = {}

-- Appends one numbered entry to the outbox; the number grows without gaps, across epochs too.
local function append(at, ...)
  local entry = call('INCR', 'entries')
  if #alerts == 0 then
    call('XADD', 'ledger', '*', 'epoch', ARGV[1], 'entry', entry, 'at', at, ...)
  else
    table.sort(alerts, function(left, right) return left[1] < right[1] end)
    local told = {}
    for index, alert in ipairs(alerts) do told[index] = alert[2] end
    call('XADD', 'ledger', '*', 'epoch', ARGV[1], 'entry', entry, 'at', at,
      'alerts', '[' .. table.concat(told, ',') .. ']', ...)
  end
end

local function last_entry()
  return call('GET', 'entries') or '0'
end

local function now_ms()
  local time = call('TIME')
  return format('%.0f', tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000))
end

local function negated(amount)
  if amount == '0' then return amount end
  if sub(amount, 1, 1) == '-' then return sub(amount, 2) end
  return '-' .. amount
end

-- sign * (high * 1e9 + low) of a decimal string; both parts carry the sign and are exact.
local function parts(text)
  local sign = 1
  if sub(text, 1, 1) == '-' then
    sign = -1
    text = sub(text, 2)
  end
  local cut = math.max(#text - 9, 0)
  local high = tonumber(sub(text, 1, cut)) or 0
  return sign * high, sign * tonumber(sub(text, cut + 1))
end

-- The sum of two decimal strings, exact for results of up to 18 digits; nil beyond.
local function add(left, right)
  if #left <= 15 and #right <= 15 then
    return format('%.0f', tonumber(left) + tonumber(right))
  end
  local left_high, left_low = parts(left)
  local right_high, right_low = parts(right)
  local high, low = left_high + right_high, left_low + right_low
  local carry = math.floor(low / 1e9)
  high, low = high + carry, low - carry * 1e9
  -- Now 0 <= low < 1e9; below zero the magnitude is built from what is missing to the next billion.
  local sign = ''
  if high < 0 then
    sign = '-'
    if low > 0 then high, low = high + 1, 1e9 - low end
    high = -high
  end
  if high >= 1e9 then return nil end
  if high == 0 then
    if low == 0 then return '0' end
    return format('%s%.0f', sign, low)
  end
  return format('%s%.0f%09.0f', sign, high, low)
end

-- Accounts touched by this call: read once, written once.
local accounts = {}

local function account_state(account)
  local state = accounts[account]
  if not state then
    local stored = call('HMGET', 'balance:{' .. account .. '}', 'balance_us', 'seq', 'floor_us', 'held_us')
    state = {
      balance = stored[1] or '0',
      first = stored[1] or '0',
      seq = tonumber(stored[2] or '0'),
      floor = stored[3],
      held = stored[4],
      changed = false,
    }
    accounts[account] = state
  end
  return state
end

-- Doubles are exact near all three thresholds, and far from them they need not be.
local LOW_US, DEFAULT_FLOOR_US = 600000000, '-18000000000'

local function note_alerts(account, state, seq)
  local before, after = tonumber(state.first), tonumber(state.balance)
  local floor = state.floor or DEFAULT_FLOOR_US
  local floor_before = tonumber(state.floor_before or floor)
  local function tell(order, threshold)
    alerts[#alerts + 1] = {account .. order, '["' .. account .. '",' .. seq .. ',"' .. threshold .. '","'
      .. state.balance .. '","' .. floor .. '"]'}
  end
  if before >= LOW_US and after < LOW_US then tell('=1', 'low') end
  if before >= 0 and after < 0 then tell('=2', 'zero') end
  if before > floor_before and after <= tonumber(floor) then tell('=3', 'floor') end
end

-- Before `append`, which takes the alerts along.
local function write_accounts(at)
  for account, state in pairs(accounts) do
    if state.changed then
      if sub(account, 1, 5) == 'user/' then note_alerts(account, state, format('%.0f', state.seq)) end
      local key, seq = 'balance:{' .. account .. '}', format('%.0f', state.seq)
      if state.floor and state.held then
        call('HSET', key, 'balance_us', state.balance, 'seq', seq, 'updated_at_ms', at)
      else
        call('HSET', key, 'balance_us', state.balance, 'seq', seq, 'updated_at_ms', at,
          'floor_us', state.floor or DEFAULT_FLOOR_US, 'held_us', state.held or '0')
      end
    end
  end
end

-- One ledger line as a JSON array. Account names cannot hold a character that JSON escapes.
local function line(account, state, change, before, reason, reference)
  return '["' .. account .. '",' .. format('%.0f', state.seq) .. ',"' .. change .. '","' .. before
    .. '","' .. state.balance .. '","' .. reason .. '",' .. reference .. ']'
end

-- Adds the changes (us, as numbers below 2^53) to the accounts and `lines`, all or none; `reason_of` gives a line's
-- reason by account. False, with nothing staged, when a balance would leave its range.
local afters = {}
local function stage(names, changes, count, lines, reference, reason_of)
  for index = 1, count do
    local after = add(account_state(names[index]).balance, format('%.0f', changes[index]))
    if not after then return false end
    afters[index] = after
  end
  for index = 1, count do
    local account = names[index]
    local state = accounts[account]
    local before = state.balance
    state.balance, state.seq, state.changed = afters[index], state.seq + 1, true
    lines[#lines + 1] = line(account, state, format('%.0f', changes[index]), before, reason_of(account), reference)
  end
  return true
end

-- Where the mark of a request stands that was carried out long ago: key and field of a hash, and the value for a
-- command's body. Short, since they stay for ever.
local function packed(hex)
  return (string.gsub(hex, '..', function(byte) return string.char(tonumber(byte, 16)) end))
end

local function request_mark(request_id, digest)
  local hash = redis.sha1hex(request_id)
  return 'requests:' .. sub(hash, 1, 4), packed(sub(hash, 5, 28)), packed(sub(digest, 1, 16))
end
