-- Posts cells: the difference between each new vector and the last one, and any endings of scopes.
--
-- ARGV: epoch, outbox bound, number of cells, number of endings; then per cell: cell id, window start (ms),
--   revision, metadata (JSON), number of amounts, and that many pairs of account and amount (us), all accounts
--   but platform/revenue; then per ending its JSON.
-- Reply: 'FULL' when the outbox is at its bound (nothing was done), else {fence, answer, answer, ...} with
--   POSTED, OLDER, FROZEN or OVER_LIMIT per cell.
-- Errors: EPOCH ... when this is not the Redis that the caller means; nothing was done.

local mismatch = epoch_mismatch(ARGV[1])
if mismatch then return mismatch end
if call('XLEN', 'ledger') >= tonumber(ARGV[2]) then return 'FULL' end

local fence = call('GET', 'frozen_before_ms') or '0'
local frozen_before = tonumber(fence)
local reply = {fence}
local records, vectors, metadata, lines = {}, {}, {}, {}
local live_cells = {}
local at = now_ms()

local function read_record(cell)
  local known = vectors[cell]
  if known then return known end
  known = {revision = -1, amounts = {}}
  local stored = call('GET', 'cell:' .. cell)
  if stored then
    local cut = string.find(stored, '|', 1, true)
    known.revision = tonumber(sub(stored, 1, cut - 1))
    for account, amount in string.gmatch(sub(stored, cut + 1), '([^=;]+)=([^;]+)') do
      known.amounts[account] = amount
    end
  end
  vectors[cell] = known
  return known
end

local function same_amounts(left, right)
  for account, amount in pairs(left) do
    if right[account] ~= amount then return false end
  end
  for account in pairs(right) do
    if not left[account] then return false end
  end
  return true
end

local reasons = {u = 'charge', n = 'credit', p = 'revenue'}

-- Stages the changes of one cell; returns false, with nothing staged, when a balance would leave its range.
local function stage(order, old, new)
  local staged, rest = {}, 0
  local function change_by(account, change)
    local state = account_state(account)
    local after = add(state.balance, change)
    if not after then return false end
    staged[#staged + 1] = {account, state, change, after}
    return true
  end
  for _, account in ipairs(order) do
    local difference = tonumber(new[account] or '0') - tonumber(old[account] or '0')
    if difference ~= 0 then
      if not change_by(account, format('%.0f', difference)) then return false end
      rest = rest + difference
    end
  end
  if rest ~= 0 and not change_by('platform/revenue', format('%.0f', -rest)) then return false end
  if #staged > 0 then
    local reference = format('%d', #metadata)
    for _, change in ipairs(staged) do
      local account, state = change[1], change[2]
      local before = state.balance
      state.balance, state.seq, state.changed = change[4], state.seq + 1, true
      lines[#lines + 1] = line(account, state, change[3], before, reasons[sub(account, 1, 1)], reference)
    end
  end
  return true, #staged > 0
end

local index = 5
for _ = 1, tonumber(ARGV[3]) do
  local cell, start, revision = ARGV[index], ARGV[index + 1], ARGV[index + 2]
  local meta, count = ARGV[index + 3], tonumber(ARGV[index + 4])
  index = index + 5
  local new, order = {}, {}
  for _ = 1, count do
    new[ARGV[index]] = ARGV[index + 1]
    order[#order + 1] = ARGV[index]
    index = index + 2
  end
  local answer = 'POSTED'
  if tonumber(start) < frozen_before then
    answer = 'FROZEN'
  else
    local known = read_record(cell)
    local number = tonumber(revision)
    if number < known.revision then
      answer = 'OLDER'
    elseif number == known.revision then
      -- The same log up to the same place gives the same vector; another one came by another interleaving of
      -- partitions, and goes out again with the next revision.
      if not same_amounts(known.amounts, new) then answer = 'OLDER' end
    else
      local gone = {}
      for account in pairs(known.amounts) do
        if not new[account] then gone[#gone + 1] = account end
      end
      table.sort(gone)
      for _, account in ipairs(gone) do order[#order + 1] = account end
      local fits, posted = stage(order, known.amounts, new)
      if fits then
        if posted then metadata[#metadata + 1] = meta end
        for _, account in ipairs(gone) do order[#order] = nil end
        local record = {}
        for position, account in ipairs(order) do record[position] = account .. '=' .. new[account] end
        records[cell] = revision .. '|' .. table.concat(record, ';')
        vectors[cell] = {revision = number, amounts = new}
        live_cells[cell] = start
      else
        answer = 'OVER_LIMIT'
      end
    end
  end
  reply[#reply + 1] = answer
end

local endings = {}
for _ = 1, tonumber(ARGV[4]) do
  endings[#endings + 1] = ARGV[index]
  index = index + 1
end

-- From here on only writes. All of them happen or none: the script is one unit in the append-only file.
write_accounts(at)
for cell, record in pairs(records) do
  call('SET', 'cell:' .. cell, record)
  call('ZADD', 'cells', live_cells[cell], cell)
end
if #lines > 0 or #endings > 0 then
  call('XADD', 'ledger', '*', 'epoch', ARGV[1], 'at', at,
    'cells', '[' .. table.concat(metadata, ',') .. ']',
    'lines', '[' .. table.concat(lines, ',') .. ']',
    'endings', '[' .. table.concat(endings, ',') .. ']')
end
return reply
