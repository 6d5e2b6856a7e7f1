-- Shared by every script of the family; put in front of each by sinks/balances.py.
--
-- Laws: a script reads and checks everything first and writes last, because one that fails midway keeps what
-- it wrote. Amounts travel and are stored as decimal strings: Lua numbers are doubles, exact only below 2^53.
-- A script runs only on the Redis it was meant for (the epoch), and appends at most one entry to the outbox.

local call, format, sub = redis.call, string.format, string.sub

local function epoch_mismatch(expected)
  local epoch = call('GET', 'epoch')
  if epoch == expected then return nil end
  return redis.error_reply('EPOCH expected ' .. expected .. ', found ' .. (epoch or 'none'))
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
      seq = tonumber(stored[2] or '0'),
      floor = stored[3],
      held = stored[4],
      changed = false,
    }
    accounts[account] = state
  end
  return state
end

local function write_accounts(at)
  for account, state in pairs(accounts) do
    if state.changed then
      local key, seq = 'balance:{' .. account .. '}', format('%.0f', state.seq)
      if state.floor and state.held then
        call('HSET', key, 'balance_us', state.balance, 'seq', seq, 'updated_at_ms', at)
      else
        call('HSET', key, 'balance_us', state.balance, 'seq', seq, 'updated_at_ms', at,
          'floor_us', state.floor or '-18000000000', 'held_us', state.held or '0')
      end
    end
  end
end

-- One ledger line as a JSON array. Account names cannot hold a character that JSON escapes.
local function line(account, state, change, before, reason, reference)
  return '["' .. account .. '",' .. format('%.0f', state.seq) .. ',"' .. change .. '","' .. before
    .. '","' .. state.balance .. '","' .. reason .. '",' .. reference .. ']'
end
