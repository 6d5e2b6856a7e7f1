-- Shared by every script of the family; put in front of each by sinks/balances.py.
--
-- Laws: a script reads and checks everything first and writes last, because one that fails midway keeps what
-- it wrote. Amounts travel and are stored as decimal strings: Lua numbers are doubles, exact only below 2^53.
-- A script runs only on the Redis it was meant for (`refusal`), and appends at most one entry to the outbox.

local call, format, sub = redis.call, string.format, string.sub

-- Whether an entry that somebody saw is one that the outbox never had: it is not there, and was not trimmed.
local function never_was(number, id)
  if id == '' or id == call('GET', 'last_entry') or #call('XRANGE', 'ledger', id, id) > 0 then return false end
  local first = call('XRANGE', 'ledger', '-', '+', 'COUNT', 1)[1]
  if not first then return false end
  for field = 1, #first[2], 2 do
    if first[2][field] == 'entry' then return tonumber(first[2][field + 1]) <= tonumber(number) end
  end
  return false
end

-- Every script begins with ARGV: epoch, the last outbox entry that the caller has seen, as "number@id" with its id in
-- the stream, or "number@" when that is not known. Returns the error to answer with when this is not the Redis that
-- the caller means, else nil.
--
-- Fewer entries than somebody saw before means that Redis lost its end; so does another entry in the place of one that
-- was seen: somebody who had seen less went on. The epoch goes with it, so that from then on every script of every
-- caller refuses, until a rebuild sets a new one. While that rebuild is under way only it knows the coming epoch.
local function refusal()
  local epoch = call('GET', 'epoch') or call('GET', 'rebuilding')
  if epoch ~= ARGV[1] then
    return redis.error_reply('EPOCH expected ' .. ARGV[1] .. ', found ' .. (epoch or 'none'))
  end
  local entries = call('GET', 'entries') or '0'
  local seen, id = string.match(ARGV[2], '^(%d+)@(.*)$')
  if tonumber(entries) < tonumber(seen) then
    call('DEL', 'epoch')
    return redis.error_reply('EPOCH lost: the outbox has ' .. entries .. ' entries, ' .. seen .. ' were seen')
  end
  if never_was(seen, id) then
    call('DEL', 'epoch')
    return redis.error_reply('EPOCH lost: entry ' .. seen .. ' was seen as ' .. id .. ', which is not in the outbox')
  end
  return nil
end

-- Filled by `write_accounts`: users whose balance fell past a threshold, as JSON.
local alerts = {}

-- Appends one numbered entry to the outbox; the number grows without gaps, across epochs too.
local function append(at, ...)
  local entry, id = call('INCR', 'entries'), nil
  if #alerts == 0 then
    id = call('XADD', 'ledger', '*', 'epoch', ARGV[1], 'entry', entry, 'at', at, ...)
  else
    table.sort(alerts, function(left, right) return left[1] < right[1] end)
    local told = {}
    for index, alert in ipairs(alerts) do told[index] = alert[2] end
    id = call('XADD', 'ledger', '*', 'epoch', ARGV[1], 'entry', entry, 'at', at,
      'alerts', '[' .. table.concat(told, ',') .. ']', ...)
  end
  call('SET', 'last_entry', id)
end

-- As callers say it: see `refusal`.
local function last_entry()
  return (call('GET', 'entries') or '0') .. '@' .. (call('GET', 'last_entry') or '')
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
    local stored = call('HMGET', 'balance:{' .. account .. '}', 'balance_us', 'seq', 'floor_us', 'held_us', 'grants',
      'beyond_us')
    state = {
      balance = stored[1] or '0',
      first = stored[1] or '0',
      seq = tonumber(stored[2] or '0'),
      floor = stored[3],
      held = stored[4],
      grants = stored[5],
      beyond = stored[6],
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

-- Grants: metering/grants.py says what they are and by which laws they move. Kept as one string, in the order in which
-- they are spent: "id,priority,from,expires,amount,left;..."; read when an account that has any is moved.
local function grants_of(state)
  if not state.list then
    state.list, state.beyond = {}, tonumber(state.beyond or '0')
    for id, priority, from, expires, amount, left in
      string.gmatch(state.grants or '', '([^,;]+),([^,]+),([^,]+),([^,]+),([^,]+),([^,;]+)') do
      state.list[#state.list + 1] = {id = id, priority = tonumber(priority), from = tonumber(from),
        expires = tonumber(expires), amount = tonumber(amount), left = tonumber(left)}
    end
  end
  return state.list
end

local function sort_grants(list)
  table.sort(list, function(one, other)
    if one.priority ~= other.priority then return one.priority < other.priority end
    if one.expires ~= other.expires then return one.expires < other.expires end
    return one.id < other.id
  end)
end

local function grants_text(list)
  local texts = {}
  for index, grant in ipairs(list) do
    texts[index] = grant.id .. ',' .. format('%.0f,%.0f,%.0f,%.0f,%.0f', grant.priority, grant.from, grant.expires,
      grant.amount, grant.left)
  end
  return table.concat(texts, ';')
end

-- Moves the account's grants along with a charge of a window (a change below zero) or what is given back of one.
-- Returns by how much each changed, as JSON; nil for an account whose grants did not move.
local function move_grants(state, change, start)
  local covering, details = {}, {}
  for _, grant in ipairs(grants_of(state)) do
    if grant.from <= start and start < grant.expires then covering[#covering + 1] = grant end
  end
  local function note(grant, moved)
    grant.left = grant.left + moved
    details[#details + 1] = '"' .. grant.id .. '":' .. format('%.0f', moved)
  end
  if #covering == 0 then return nil end
  if change < 0 then
    local need = -change
    for _, grant in ipairs(covering) do
      local taken = math.min(grant.left, need)
      if taken > 0 then
        need = need - taken
        note(grant, -taken)
      end
    end
    state.beyond = state.beyond + need
  else
    local back = math.min(state.beyond, change)
    local given = change - back
    state.beyond = state.beyond - back
    for index = #covering, 1, -1 do
      local some = math.min(covering[index].amount - covering[index].left, given)
      if some > 0 then
        given = given - some
        note(covering[index], some)
      end
    end
  end
  if #details == 0 then return nil end
  return '{' .. table.concat(details, ',') .. '}'
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
      -- Whoever did not read the grants (a top-up) leaves them as they are.
      if state.list and #state.list > 0 then
        call('HSET', key, 'grants', grants_text(state.list), 'beyond_us', format('%.0f', state.beyond))
      elseif state.list and state.grants then
        call('HDEL', key, 'grants', 'beyond_us')
      end
    end
  end
end

-- One ledger line as a JSON array. Account names cannot hold a character that JSON escapes. `grants` are changes of
-- grants by their ids, as JSON, or nil.
local function line(account, state, change, before, reason, reference, grants)
  return '["' .. account .. '",' .. format('%.0f', state.seq) .. ',"' .. change .. '","' .. before
    .. '","' .. state.balance .. '","' .. reason .. '",' .. reference .. (grants and ',' .. grants or '') .. ']'
end

-- Adds the changes (us, as numbers below 2^53) to the accounts and `lines`, all or none; `reason_of` gives a line's
-- reason by account, `start` (ms) is the window's. False, with nothing staged, when a balance would leave its range.
local afters = {}
local function stage(names, changes, count, lines, reference, reason_of, start)
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
    local grants = state.grants and move_grants(state, changes[index], start)
    lines[#lines + 1] = line(account, state, format('%.0f', changes[index]), before, reason_of(account), reference,
      grants)
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
