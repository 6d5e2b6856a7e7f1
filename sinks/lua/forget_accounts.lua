-- Removes those of the balances that were not restored, while a rebuild is under way.
--
-- ARGV: coming epoch, entries, then keys of balances.
-- Reply: {last entry, how many were removed}.

local refused = refusal()
if refused then return refused end

local forgotten = 0
for i = 3, #ARGV do
  if call('HEXISTS', ARGV[i], 'seq') == 0 then forgotten = forgotten + call('UNLINK', ARGV[i]) end
end
return {last_entry(), forgotten}
