-- Removes the epoch of a Redis that was found to have lost its end, so that every script refuses until a rebuild.
--
-- ARGV: epoch.
-- Reply: how many keys were removed; none when a rebuild has set another epoch meanwhile.

if call('GET', 'epoch') == ARGV[1] then return call('DEL', 'epoch') end
return 0
