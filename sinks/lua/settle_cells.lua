-- Posts cells: the difference between each new vector and the last one, and any endings of scopes.
--
-- ARGV: epoch, entries seen, outbox bound, number of cells, number of endings; then per cell: cell id, window
--   start (ms), revision, metadata (JSON), and the vector: all accounts but platform/revenue, sorted, as
--   "account=amount;account=amount" (us); then per ending its JSON.
-- Reply: 'FULL' when the outbox is at its bound (nothing was done), else {fence, last entry, answer, answer, ...}
--   with POSTED, OLDER, FROZEN or OVER_LIMIT per cell.
-- Errors: EPOCH ... when this is not the Redis that the caller means; nothing was done.

local refused = refusal()
if refused then return refused end
if call('XLEN', 'ledger') >= tonumber(ARGV[3]) then return 'FULL' end

local gmatch, find, insert = string.gmatch, string.find, table.insert
local fence = call('GET', 'frozen_before_ms') or '0'
local frozen_before = tonumber(fence)
local reply = {fence, ''}
-- What this call writes: records by cell id, their windows, metadata and lines of the outbox entry.
local records, starts, metadata, lines = {}, {}, {}, {}
local at = now_ms()

local reasons = {u = 'charge', n = 'credit', p = 'revenue'}
local function reason_of(account) return reasons[sub(account, 1, 1)] end
local names, changes = {}, {}

-- The changes from the old vector to the new one, as `names` and `changes`, revenue last; returns how many.
local function difference(old, new)
  local count, rest = 0, 0
  local function change(account, amount)
    count = count + 1
    names[count], changes[count] = account, amount
    rest = rest + amount
  end
  if old == '' then
    for account, amount in gmatch(new, '([^=;]+)=([^;]+)') do
      if amount ~= '0' then change(account, tonumber(amount)) end
    end
  else
    local known, seen = {}, {}
    for account, amount in gmatch(old, '([^=;]+)=([^;]+)') do known[account] = tonumber(amount) end
    for account, amount in gmatch(new, '([^=;]+)=([^;]+)') do
      seen[account] = true
      local moved = tonumber(amount) - (known[account] or 0)
      if moved ~= 0 then change(account, moved) end
    end
    local gone = {}
    for account, amount in pairs(known) do
      if not seen[account] and amount ~= 0 then insert(gone, account) end
    end
    -- Whoever left the split goes back to zero.
    table.sort(gone)
    for _, account in ipairs(gone) do change(account, -known[account]) end
  end
  if rest ~= 0 then change('platform/revenue', -rest) end
  return count
end

-- Each call into Redis costs more than what it does: what can be read or written at once is, by so many keys.
local AT_ONCE = 1000

local stored = {}
local cells = tonumber(ARGV[4])
for first = 1, cells, AT_ONCE do
  local keys = {}
  for cell = first, math.min(first + AT_ONCE - 1, cells) do insert(keys, 'cell:' .. ARGV[cell * 5 + 1]) end
  for offset, record in ipairs(call('MGET', unpack(keys))) do
    stored[ARGV[(first + offset - 1) * 5 + 1]] = record
  end
end

local function post(cell, start, revision, meta, vector)
  if tonumber(start) < frozen_before then return 'FROZEN' end
  local record = records[cell] or stored[cell]
  local old = ''
  if record then
    local cut = find(record, '|', 1, true)
    local known = tonumber(sub(record, 1, cut - 1))
    local number = tonumber(revision)
    old = sub(record, cut + 1)
    if number < known then return 'OLDER' end
    -- The same log up to the same place gives the same vector; another one came by another interleaving of
    -- partitions, and goes out again with the next revision.
    if number == known then return old == vector and 'POSTED' or 'OLDER' end
  end
  local count = difference(old, vector)
  if not stage(names, changes, count, lines, format('%d', #metadata), reason_of, tonumber(start)) then return 'OVER_LIMIT' end
  if count > 0 then insert(metadata, meta) end
  records[cell], starts[cell] = revision .. '|' .. vector, start
  return 'POSTED'
end

local index = 6
for _ = 1, cells do
  insert(reply, post(ARGV[index], ARGV[index + 1], ARGV[index + 2], ARGV[index + 3], ARGV[index + 4]))
  index = index + 5
end

local endings = {}
for _ = 1, tonumber(ARGV[5]) do
  insert(endings, ARGV[index])
  index = index + 1
end

-- From here on only writes. All of them happen or none: the script is one unit in the append-only file.
write_accounts(at)
local pairs_to_set, scores = {}, {}
local function write_records()
  if #scores > 0 then
    call('MSET', unpack(pairs_to_set))
    call('ZADD', 'cells', unpack(scores))
    pairs_to_set, scores = {}, {}
  end
end
for cell, record in pairs(records) do
  insert(pairs_to_set, 'cell:' .. cell)
  insert(pairs_to_set, record)
  insert(scores, starts[cell])
  insert(scores, cell)
  if #scores >= 2 * AT_ONCE then write_records() end
end
write_records()
if #lines > 0 or #endings > 0 then
  append(at,
    'cells', '[' .. table.concat(metadata, ',') .. ']',
    'lines', '[' .. table.concat(lines, ',') .. ']',
    'endings', '[' .. table.concat(endings, ',') .. ']')
end
reply[2] = last_entry()
return reply
