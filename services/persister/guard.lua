-- Writes a record unless what is there must stand. Reads only the head of what
-- is there: a record's first four members come first and in a fixed order.
--
-- KEYS[1]  the record's key
-- ARGV     1 record  2 status  3 accepted_at  4 subscriber_id  5 expiry, Unix ms
-- Returns  created | written | superseded | foreign | unreadable
--
-- Of two records the larger of (is it ready, accepted_at, pending last) stands.
-- Times are of fixed width, so comparing text compares time; equals are
-- rewritten.
local function rank(status, accepted_at)
  return (status == 'ready' and '1' or '0') .. accepted_at .. (status == 'pending' and '0' or '1')
end
local head = redis.call('GETRANGE', KEYS[1], 0, 159)
if head ~= '' then
  local status, accepted_at, subscriber_id =
    string.match(head, '^{"schema":%d+,"status":"([a-z_]+)","accepted_at":"([^"]+)","subscriber_id":(%d+)[,}]')
  if not status then return 'unreadable' end
  if subscriber_id ~= ARGV[4] then return 'foreign' end
  if rank(status, accepted_at) > rank(ARGV[2], ARGV[3]) then return 'superseded' end
end
redis.call('SET', KEYS[1], ARGV[1], 'PXAT', ARGV[5])
return head == '' and 'created' or 'written'
