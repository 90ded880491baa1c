-- One token bucket for all replicas, by the server's clock in microseconds.
-- KEYS[1]: hash of tokens, at (when they were counted) and paused (no call
-- before). ARGV: rate per second, burst, tokens needed for the first call,
-- calls wanted, pause to begin in microseconds (0 for none).
-- Returns the calls granted, microseconds until there may be more, tokens left.
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local rate, burst, need = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local want, pause = tonumber(ARGV[4]), tonumber(ARGV[5])

local h = redis.call('HMGET', KEYS[1], 'tokens', 'at', 'paused')
local at, paused = tonumber(h[2] or now), tonumber(h[3] or 0)
-- What was spent before a bucket is missing is not known: a second's worth.
local tokens = tonumber(h[1] or math.min(burst, math.max(rate, 1)))
if now > at then
  tokens = math.min(burst, tokens + (now - at) / 1000000 * rate)
  at = now
end
if pause > 0 and now + pause > paused then
  paused = now + pause
  tokens, at = 0, paused
end

local got, wait = 0, 0
if paused > now then
  wait = paused - now
else
  got = math.min(want, math.max(0, math.floor(tokens - need + 1 + 1e-9)))
  tokens = tokens - got
  if got < want then
    wait = math.ceil((need - tokens) / rate * 1000000)
  end
end
redis.call('HSET', KEYS[1], 'tokens', string.format('%.9f', tokens), 'at', string.format('%.0f', at), 'paused', string.format('%.0f', paused))
-- Long after its last use a bucket says no more than none at all.
redis.call('PEXPIRE', KEYS[1], math.ceil(math.max(3600000, paused / 1000 - now / 1000 + 3600000)))
return {got, wait, string.format('%.3f', tokens)}
