-- Posts changes of frozen cells, all or none.
--
-- ARGV: epoch, entries seen, outbox bound, token, step, number of cells; then per cell: window start (ms),
--   metadata (JSON), and the changes of all accounts but platform/revenue: "account=change;account=change" (us).
-- Reply: 'FULL' when the outbox is at its bound (nothing was done), else {last entry, answer} with POSTED, REPEATED
--   (this token's step was carried out before) or STALE (the token is not the newest; nothing was done).
-- Errors: NOT_FROZEN, OVER_LIMIT or STEP, with nothing done: the caller has a bug or the books a fault.

local refused = refusal()
if refused then return refused end

local known = call('HMGET', 'resettle', 'token', 'step')
if known[1] ~= ARGV[4] then return {last_entry(), 'STALE'} end
if known[2] == ARGV[5] then return {last_entry(), 'REPEATED'} end
if tonumber(known[2]) + 1 ~= tonumber(ARGV[5]) then
  return redis.error_reply('STEP expected ' .. known[2] .. ' + 1, found ' .. ARGV[5])
end
if call('XLEN', 'ledger') >= tonumber(ARGV[3]) then return 'FULL' end

local frozen_before = tonumber(call('GET', 'frozen_before_ms') or '0')
local lines, metadata = {}, {}
local function reason_of() return 'resettle' end

local index = 7
for _ = 1, tonumber(ARGV[6]) do
  local start, meta, wanted = ARGV[index], ARGV[index + 1], ARGV[index + 2]
  index = index + 3
  if tonumber(start) >= frozen_before then
    return redis.error_reply('NOT_FROZEN ' .. meta .. ' does not lie before the fence')
  end
  local names, changes, count, rest = {}, {}, 0, 0
  for account, change in string.gmatch(wanted, '([^=;]+)=([^;]+)') do
    count = count + 1
    names[count], changes[count] = account, tonumber(change)
    rest = rest + changes[count]
  end
  if rest ~= 0 then
    count = count + 1
    names[count], changes[count] = 'platform/revenue', -rest
  end
  if not stage(names, changes, count, lines, format('%d', #metadata), reason_of, tonumber(start)) then
    return redis.error_reply('OVER_LIMIT ' .. meta .. ' would take a balance out of its range')
  end
  metadata[#metadata + 1] = meta
end

-- From here on only writes.
local at = now_ms()
write_accounts(at)
call('HSET', 'resettle', 'step', ARGV[5])
append(at,
  'cells', '[' .. table.concat(metadata, ',') .. ']',
  'lines', '[' .. table.concat(lines, ',') .. ']',
  'endings', '[]')
return {last_entry(), 'POSTED'}
