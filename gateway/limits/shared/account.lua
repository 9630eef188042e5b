-- One key's account, as gateway/limits/account.py has it, for several gateways. All of a call is one step.
--
-- KEYS: the account (hash), its reservations (sorted set: id, the millisecond in which its lease ends; the tokens that it holds
--   are the last part of the id), the gateways (hash: name, "epoch seq second").
-- ARGV: 1 what: reserve, settle or hold. 2 the gateway, 3 the epoch (which of its connections), 4 the number of the settlement.
--   5 tokens, 6 the lease in milliseconds, 7 the time in microseconds: "" but in tests, the server's clock counts. Behind that
--   reserve: 8 id, 9 to 14 limits, -1 for none: requests in flight, requests a minute, tokens in flight, a minute, a day,
--   a month.
--   settle: 8 requests to be counted, then pairs of an id and whether its request is known to be counted (1) or not (0).
--   hold: the same pairs from 8 on, of requests that are under way.
-- Returns numbers with spaces between them: verdict (0 done, 1 too little is left, 2 of a connection that was replaced),
--   milliseconds, requests in flight, tokens held, requests of the minute and their newest second, tokens of the minute and
--   theirs, day, its tokens, month, its tokens; if too little is left, behind a | each, also the seconds of the minute with their
--   requests, and with their tokens.
local WINDOW, DAY, KEPT, AWAY = 60, 86400, 63 * 86400, 7 * 86400
local account, open, gateways = KEYS[1], KEYS[2], KEYS[3]
local what, gateway, epoch, seq = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local tokens, lease = tonumber(ARGV[5]), tonumber(ARGV[6])

local micros = tonumber(ARGV[7])
if not micros then
  local time = redis.call('TIME')
  micros = tonumber(time[1]) * 1000000 + tonumber(time[2])
end
local second, milli = math.floor(micros / 1000000), math.floor(micros / 1000)

local NAMES = {'held', 'rt', 'rn', 'tt', 'tn', 'oldest', 'day', 'ds', 'month', 'ms'}
local s = {held = -1}  -- of an account that was not there, what is held is known by its reservations: see below
for place, found in ipairs(redis.call('HMGET', account, unpack(NAMES))) do
  s[NAMES[place]] = tonumber(found or s[NAMES[place]] or 0)
end

-- Take the seconds from `first` to `last` out of the minute.
local function take(first, last)
  local requests, taken = 0, 0
  for each = first, last do
    local found = redis.call('HMGET', account, 'r' .. each, 't' .. each)
    if found[1] or found[2] then
      requests, taken = requests + (found[1] or 0), taken + (found[2] or 0)
      redis.call('HDEL', account, 'r' .. each, 't' .. each)
    end
  end
  return requests, taken
end

local function add(kind, amount)
  if amount > 0 then
    redis.call('HINCRBY', account, kind .. second, amount)
    if s.rt + s.tt == 0 then s.oldest = second end
    s[kind .. 't'], s[kind .. 'n'] = s[kind .. 't'] + amount, second
  end
end

local function tokens_of(id)
  return tonumber(string.match(id, '(%d+)$'))
end

local function month_of(day)  -- civil_from_days, http://howardhinnant.github.io/date_algorithms.html
  local z = day + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local mp = math.floor((5 * (doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))) + 2) / 153)
  local month = mp < 10 and mp + 3 or mp - 9
  return (yoe + era * 400 + (month <= 2 and 1 or 0)) * 12 + month - 1
end

-- As Budget.roll: after a clock that was set back over its begin, a period goes on.
local function roll(period, name, spent)
  if period > s[name] then
    s[name], s[spent] = period, 0
  elseif period < s[name] - 1 then
    s[name] = period
  end
end

local newest = math.max(s.rn, s.tn)
if second < newest then  -- the clock was set back: what lies ahead counts from now, and no lease is longer than one
  local requests, taken = take(math.max(s.oldest, second + 1), newest)
  s.rt, s.tt = s.rt - requests, s.tt - taken
  s.rn, s.tn, s.oldest = math.min(s.rn, second), math.min(s.tn, second), math.min(s.oldest, second)
  add('r', requests)
  add('t', taken)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', open, milli + lease, '+inf')) do
    redis.call('ZADD', open, milli + lease, id)
  end
elseif s.rt + s.tt > 0 and s.oldest < second - WINDOW then
  local requests, taken = take(s.oldest, math.min(newest, second - WINDOW - 1))
  s.rt, s.tt, s.oldest = s.rt - requests, s.tt - taken, second - WINDOW
end
local day = math.floor(second / DAY)
local fresh = day ~= s.day
roll(day, 'day', 'ds')
roll(month_of(day), 'month', 'ms')
for _, id in ipairs(redis.call('ZRANGEBYSCORE', open, '-inf', milli)) do
  s.held = s.held - tokens_of(id)
  redis.call('ZREM', open, id)
end
local running = redis.call('ZCARD', open)
if running == 0 then
  s.held = 0
elseif s.held < 0 then  -- the account alone was deleted, or given up for lack of memory
  s.held = 0
  for _, id in ipairs(redis.call('ZRANGE', open, 0, -1)) do s.held = s.held + tokens_of(id) end
end

-- Hold what a request may come to, unless it is held already.
local function hold(id)
  if redis.call('ZADD', open, milli + lease, id) == 1 then
    s.held, running = s.held + tokens_of(id), running + 1
    return true
  end
  return false
end

local mark = redis.call('HGET', gateways, gateway)
local last_epoch, last_seq = string.match(mark or '0 0', '(%d+) (%d+)')
last_epoch, last_seq = tonumber(last_epoch), tonumber(last_seq)
local verdict = 0
if epoch < last_epoch then
  verdict = 2
elseif what == 'reserve' then
  local limit = {}
  for place = 9, 14 do
    local most = tonumber(ARGV[place])
    limit[place - 8] = most < 0 and math.huge or most
  end
  if running >= limit[1] or s.rt >= limit[2] or s.ds >= limit[5] or s.ms >= limit[6]
    or s.held + tokens > math.min(limit[3], limit[4] - s.tt, limit[5] - s.ds, limit[6] - s.ms) then
    verdict = 1
  elseif hold(ARGV[8]) then
    add('r', 1)
  end
elseif what == 'settle' and seq > last_seq then
  local requests = tonumber(ARGV[8])
  for place = 9, #ARGV, 2 do
    if redis.call('ZREM', open, ARGV[place]) == 1 then
      s.held, running = s.held - tokens_of(ARGV[place]), running - 1
    elseif ARGV[place + 1] == '0' then
      requests = requests + 1
    end
  end
  add('r', requests)
  add('t', tokens)
  s.ds, s.ms = s.ds + tokens, s.ms + tokens
  last_seq = seq
elseif what == 'hold' then
  for place = 8, #ARGV, 2 do
    if hold(ARGV[place]) and ARGV[place + 1] == '0' then add('r', 1) end
  end
end

if verdict ~= 2 then
  if not mark then  -- each start of a gateway is another one: those that are away for long are forgotten
    local all = redis.call('HGETALL', gateways)
    for place = 1, #all, 2 do
      if tonumber(string.match(all[place + 1], '(%d+)$')) < second - AWAY then redis.call('HDEL', gateways, all[place]) end
    end
  end
  redis.call('HSET', gateways, gateway, string.format('%d %d %d', epoch, last_seq, second))
end
local saved = {}
for place, name in ipairs(NAMES) do
  saved[2 * place - 1], saved[2 * place] = name, string.format('%.0f', s[name])
end
redis.call('HSET', account, unpack(saved))
redis.call('PEXPIRE', open, 2 * lease)  -- without reservations nothing is held: see above
if fresh or not mark then
  redis.call('EXPIRE', account, KEPT)
  redis.call('EXPIRE', gateways, KEPT)
end

local reply = {verdict, milli, running, s.held, s.rt, s.rn, s.tt, s.tn, s.day, s.ds, s.month, s.ms}
for place, number in ipairs(reply) do reply[place] = string.format('%.0f', number) end
if verdict == 1 then
  local requests, taken = {}, {}
  if s.rt + s.tt > 0 then
    for each = s.oldest, math.max(s.rn, s.tn) do
      local found = redis.call('HMGET', account, 'r' .. each, 't' .. each)
      if found[1] then requests[#requests + 1] = each .. ' ' .. found[1] end
      if found[2] then taken[#taken + 1] = each .. ' ' .. found[2] end
    end
  end
  return table.concat({table.concat(reply, ' '), table.concat(requests, ' '), table.concat(taken, ' ')}, '|')
end
return table.concat(reply, ' ')
