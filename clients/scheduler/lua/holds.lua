-- Admission: places and removes holds, each in one step. Made for plain EVALSHA from any language; it stands alone.
--
-- ARGV: 'admit', account, session, amount (us), how long it lasts (ms), epoch seen, outbox entries seen
--   Reply: {answer, epoch, entries, balance (us), held (us), floor (us), expiry (Unix ms)}, all strings.
--     OK              the session has exactly this hold
--     AT_FLOOR        balance - held <= floor; the session has no hold
--     TOO_MANY_HOLDS  the account has 4096 sessions; the session has no hold
--     NOT_READY       the Redis has no epoch, or is older than what the caller has seen; nothing was done
--   The caller gives the largest epoch that it was told and the most entries that it was told in it, 0 and 0 when
--   it knows nothing: so a Redis that lost its end cannot admit by old balances.
-- ARGV: 'release', account, session
--   Reply: {RELEASED or NO_HOLD, held (us)}. It works without an epoch too: it can only give back.
-- ARGV: 'sweep', most accounts to look at
--   Reply: {number of expired holds that were collected, MORE or DONE}
-- Errors: ARGUMENT ..., with nothing done.
--
-- Laws:
-- - To admit a session again is to release it and to ask anew: a repeat of a call whose answer was lost gives what
--   the first call would give now, and a refused session has no hold.
-- - `held_us` of the balance is a copy, for readers, of the field '/total' beside the holds, by which this script
--   decides. Both are written in one step. Where a rebuild has removed the balance and with it the copy, or an empty
--   Redis has neither, the next call writes what the holds say.
-- - Time is the server's. A hold is dead at its expiry, and counts until the next call for its account, or until a
--   sweep: every admission also collects from two other accounts.
-- - Everything is read and checked first and written last. No number here but the balance and the floor passes 2^53
--   (4096 holds of at most 1e12 us), and these two are compared in halves.

local call, format, sub = redis.call, string.format, string.sub

local MAX_HOLD_US, MAX_LASTS_MS, MAX_HOLDS = 1e12, 86400000, 4096
local DEFAULT_FLOOR_US = '-18000000000'
local EXPIRING = 'holds_expiring'
local TOTAL = '/total' -- No session id has a slash.
local SWEPT_BY_AN_ADMISSION, COLLECTED_AT_ONCE = 2, 100

local function whole(number) return format('%.0f', number) end

local function refuse(what) return redis.error_reply('ARGUMENT ' .. what) end

local function is_id(text) return text and #text <= 128 and string.find(text, '^[%w._:-]+$') end

local function is_count(text, most)
  return text and #text <= 16 and string.find(text, '^%d+$') and tonumber(text) <= most
end

local time = call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

-- What an account has, once up to `most` of its expired holds and that of `session` (if given) are gone.
local function read(account, most, session)
  local holds, amounts = 'holds:{' .. account .. '}', 'hold_amounts:{' .. account .. '}'
  local gone = call('ZRANGEBYSCORE', holds, '-inf', whole(now_ms), 'LIMIT', 0, most)
  local state = {
    account = account, balance_key = 'balance:{' .. account .. '}', holds = holds, amounts = amounts,
    expired = #gone, released = false, gone = gone,
    count = call('ZCARD', holds), total = tonumber(call('HGET', amounts, TOTAL) or '0'),
  }
  if session then
    local expiry = call('ZSCORE', holds, session)
    if expiry and tonumber(expiry) > now_ms then
      state.released = true
      gone[#gone + 1] = session
    end
  end
  if #gone > 0 then
    for _, amount in ipairs(call('HMGET', amounts, unpack(gone))) do
      state.total = state.total - tonumber(amount or '0')
    end
    state.count = state.count - #gone
  end
  if state.count == 0 then state.total = 0 end
  local stored = call('HMGET', state.balance_key, 'balance_us', 'held_us', 'floor_us')
  state.has_balance = stored[1]
  state.balance, state.held, state.floor = stored[1] or '0', stored[2], stored[3] or DEFAULT_FLOOR_US
  return state
end

-- Writes what `read` left; a removal comes first, because a server without memory lets a script go on that has written.
local function write(state, session, amount, expires_at)
  if #state.gone > 0 then
    call('ZREM', state.holds, unpack(state.gone))
    call('HDEL', state.amounts, unpack(state.gone))
  end
  if session then
    state.total = state.total + tonumber(amount)
    call('ZADD', state.holds, expires_at, session)
    call('HSET', state.amounts, session, amount, TOTAL, whole(state.total))
  elseif #state.gone > 0 and state.count == 0 then
    call('DEL', state.amounts)
  elseif #state.gone > 0 then
    call('HSET', state.amounts, TOTAL, whole(state.total))
  end
  local held = whole(state.total)
  if state.held ~= held then
    if held ~= '0' or state.has_balance then
      call('HSET', state.balance_key, 'held_us', held)
    elseif state.held then
      -- An account that nothing was ever posted to has no key.
      call('HDEL', state.balance_key, 'held_us')
    end
  end
  if session or #state.gone > 0 then
    local first = call('ZRANGE', state.holds, 0, 0, 'WITHSCORES')
    if first[1] then
      call('ZADD', EXPIRING, first[2], state.account)
    else
      call('ZREM', EXPIRING, state.account)
    end
  end
  return held
end

local function overdue(most)
  return call('ZRANGEBYSCORE', EXPIRING, '-inf', whole(now_ms), 'LIMIT', 0, most)
end

-- Both halves carry the sign; the low one has nine digits.
local function halves(text)
  local sign = 1
  if sub(text, 1, 1) == '-' then sign, text = -1, sub(text, 2) end
  local cut = math.max(#text - 9, 0)
  return sign * (tonumber(sub(text, 1, cut)) or 0), sign * tonumber(sub(text, cut + 1))
end

local function above_floor(state)
  local balance_high, balance_low = halves(state.balance)
  local floor_high, floor_low = halves(state.floor)
  local held_high, held_low = halves(whole(state.total))
  local high, low = balance_high - floor_high - held_high, balance_low - floor_low - held_low
  local carry = math.floor(low / 1e9)
  high, low = high + carry, low - carry * 1e9
  return high > 0 or (high == 0 and low > 0)
end

local function read_all(accounts)
  local states = {}
  for index, account in ipairs(accounts) do states[index] = read(account, COLLECTED_AT_ONCE) end
  return states
end

local function write_all(states)
  local collected = 0
  for _, state in ipairs(states) do
    if state.expired > 0 then
      write(state)
    else
      call('ZREM', EXPIRING, state.account) -- Its holds went without this script.
    end
    collected = collected + state.expired
  end
  return collected
end

local operation, account, session = ARGV[1], ARGV[2], ARGV[3]

if operation == 'sweep' then
  if not is_count(account, 1000) then return refuse('accounts: 0 to 1000') end
  local collected = write_all(read_all(overdue(tonumber(account))))
  return {whole(collected), #overdue(1) > 0 and 'MORE' or 'DONE'}
end

if not account or sub(account, 1, 5) ~= 'user/' or not is_id(sub(account, 6)) then
  return refuse('account: user/ and 1 to 128 of A-Z a-z 0-9 . _ : -')
end
if not is_id(session) then return refuse('session: 1 to 128 of A-Z a-z 0-9 . _ : -') end

if operation == 'release' then
  local state = read(account, MAX_HOLDS, session)
  return {state.released and 'RELEASED' or 'NO_HOLD', write(state)}
end

if operation ~= 'admit' then return refuse('operation: admit, release or sweep') end
local amount, lasts_ms, seen_epoch, seen_entries = ARGV[4], ARGV[5], ARGV[6], ARGV[7]
if not is_count(amount, MAX_HOLD_US) then return refuse('amount: 0 to 1e12 us') end
if not is_count(lasts_ms, MAX_LASTS_MS) or tonumber(lasts_ms) == 0 then return refuse('lasts: 1 to 86400000 ms') end
if not is_count(seen_epoch, 2 ^ 53) or not is_count(seen_entries, 2 ^ 53) then
  return refuse('epoch and entries: as last told, or 0')
end

local known = call('MGET', 'epoch', 'entries')
local epoch, entries = known[1], known[2] or '0'
if not epoch or tonumber(epoch) < tonumber(seen_epoch)
  or (tonumber(epoch) == tonumber(seen_epoch) and tonumber(entries) < tonumber(seen_entries)) then
  return {'NOT_READY', epoch or '0', entries, '0', '0', '0', '0'}
end

local state = read(account, MAX_HOLDS, session)
local others = {}
for _, other in ipairs(overdue(SWEPT_BY_AN_ADMISSION + 1)) do
  if other ~= account and #others < SWEPT_BY_AN_ADMISSION then others[#others + 1] = other end
end
local swept = read_all(others)
local answer, held, expires_at = 'OK', nil, '0'
if not above_floor(state) then
  answer = 'AT_FLOOR'
elseif state.count >= MAX_HOLDS then
  answer = 'TOO_MANY_HOLDS'
end
if answer == 'OK' then
  expires_at = whole(now_ms + tonumber(lasts_ms))
  held = write(state, session, whole(tonumber(amount)), expires_at)
else
  held = write(state)
end
write_all(swept)
return {answer, epoch, entries, state.balance, held, state.floor, expires_at}
