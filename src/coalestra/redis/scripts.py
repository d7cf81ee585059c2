"""What is decided on the server, in one atomic step for each key, and the names things have there.

A resource is one hash, so that its value and its lease change together, also in a cluster:

====  ======================================================================================
``d``  the value, as bytes of the codec
``v``  its version
``r``  its authority rank
``o``  when it was observed, in seconds: of the source's clock if it is dated, else as ``t``
``w``  when it counts in the write order: as dated, else when its reading began
``t``  when it was stored, in seconds of the server's clock
``u``  ``1`` if the value has no date of its own
``l``  the token of the lease on the next value; gone once it is used, released or removed
``x``  when the lease ends, in milliseconds of the server's clock
====  ======================================================================================

Laws:

1. A value replaces another by rank, then by when it counts; equal ones by ``replace equal``;
   ``force`` always does. So does whatever holds a lease on an entry found outdated or unreadable.
2. What has no date of its own is dated by the server as it is stored. An event counts as of then,
   later than all without a date before it; a fetch as of the beginning of its reading.
3. Who stores with a token that is no longer the lease of the key stores nothing, unless what he has
   is dated, and newer than what is there.
4. A value that is stored without a lease (a publication), and an invalidation, remove the lease.
5. Every change is told on the channel of its prefix within the same step, and told first: who may
   not tell changes nothing.
6. An entry whose numbers are none counts as missing, for its key alone.
7. What arrives after its time limit is neither stored, as its key may have been invalidated since,
   nor granted a lease, which would reach nobody.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Final
from urllib.parse import unquote_to_bytes

from coalestra.core.keys import AS_IT_IS, ResourceKey

MOST_NAME_BYTES: Final = 200
"""A key with a longer text goes by a digest of it. No text of a key begins with the mark."""
_DIGEST_MARK = "#"


def head_of(prefix: str) -> str:
    """Return what the names under a prefix begin with, and those under no other prefix do."""
    return prefix.replace(":", "/") + ":"  # or "a:b" would begin like a name under "a"


def name_of(prefix: str, key: ResourceKey) -> str:
    """Return the server's name of a key: no two keys share one, and none is long."""
    text = key.canonical
    if len(text) > MOST_NAME_BYTES:
        digest = hashlib.blake2b(text.encode(), digest_size=20).hexdigest()
        text = f"{_DIGEST_MARK}{digest}"
    return head_of(prefix) + text


def key_of(canonical: str) -> ResourceKey:
    """Return the key with this canonical text."""
    parts, _, pairs = canonical.partition("?")
    namespace, name, *subject = map(_unquoted, parts.split(":"))
    split = (pair.split("=") for pair in pairs.split("&") if pair)
    qualifiers = [(_unquoted(name), _unquoted(value)) for name, value in split]
    which = subject[0] if subject else ""
    return ResourceKey(namespace, name, which, qualifiers, normalizer=AS_IT_IS)


def _unquoted(text: str) -> str:
    return unquote_to_bytes(text.replace("+", " ")).decode("utf-8", "surrogatepass")


STORED: Final = b"s"
"""A value was stored, in the place of whatever was there."""
INVALIDATED: Final = b"i"
"""A key was invalidated."""
RELEASED: Final = b"r"
"""A lease was given back without a value; the next one may have it."""
FAILED: Final = b"f"
"""A lease was given back because no source had a value."""
CLEARED: Final = b"c"
"""Every key was invalidated."""


def message_of(data: bytes) -> tuple[bytes, str, str]:
    """Return what a message says: what happened, the version that is there now, and a key's text.

    It is a letter, the length of the version, the version, and the text. Raises ValueError if it is
    none.
    """
    size = int(data[1:4])
    return data[:1], data[4 : 4 + size].decode(), data[4 + size :].decode()


@cache
def whole(script: str) -> tuple[str, str]:
    """Return the text of a script with what all of them share, and how the server knows it."""
    text = _SHARED + script
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


_SHARED = """
local function tell(channel, letter, version, identity)
  local head = letter .. string.format('%03d', #version)
  return redis.call('PUBLISH', channel, head .. version .. identity)
end
local function clock()
  local now = redis.call('TIME')
  return tonumber(now[1]) + tonumber(now[2]) / 1000000
end
local function text(seconds)
  return string.format('%.6f', seconds)
end
local function fields(key, ...)
  local got, has = redis.pcall('HMGET', key, ...), {}
  if got.err then
    redis.call('DEL', key)
    got = redis.call('HMGET', key, ...)
  end
  for i, name in ipairs({...}) do has[name] = got[i] end
  local function odd(name)
    return has[name] ~= nil and not tonumber((has[name] or ''):match('^%S+$'))
  end
  local damaged = has.d and (has.v == false or odd('r') or odd('o') or odd('w') or odd('t'))
  local unleased = has.l and odd('x')
  for i, name in ipairs({...}) do
    local of_lease = name == 'l' or name == 'x'
    if of_lease and unleased or damaged and not of_lease then got[i] = false end
  end
  return got, damaged
end
local replica = {err = 'READONLY this server is a read only replica'}
local function refused(done)
  return type(done) == 'table' and done.err:find('READONLY', 1, true)
end
local function entry(first, second, o, t, u, v, d)
  if not d then return first .. ' ' .. second .. ' - - - 0 ' end
  return table.concat({first, second, o, t, u == '1' and '1' or '0', #v, v .. d}, ' ')
end
"""

READ: Final = """
-- ARGV: until when leases are given, token, lease in ms, the reader's time; then for each key:
-- mode, age still of use, a space, and the version that is of no use. Modes: 'g' get, 'l' lease
-- unless of use, 'f' lease in any case. Answers the server's time, then an entry for each key,
-- after h(it), l(eased), w(ait) or m(iss) and for how many ms the lease of another one lasts; '!'
-- marks one that is damaged. A replica answers nothing, as it may know less than its primary.
local now, token = clock(), ARGV[2]
local late, lasting, reader = now > tonumber(ARGV[1]), tonumber(ARGV[3]), tonumber(ARGV[4])
local answers = {text(now)}
for i, key in ipairs(KEYS) do
  local mode, age, unlike = ARGV[4 + i]:match('^(.)(%S+) (.*)$')
  local got, damaged = fields(key, 'd', 'v', 'o', 't', 'u', 'l', 'x')
  local d, v, o, t, u, l, x = unpack(got)
  local state, left = 'm', 0
  if d and v ~= unlike and mode ~= 'f' then
    local since = (u == '1') and now or reader
    if since - tonumber(o) <= tonumber(age) then state = 'h' end
  end
  if mode ~= 'g' and state == 'm' and not late then
    if l and l ~= token and mode ~= 'f' and tonumber(x) > now * 1000 then
      state = 'w'
      left = math.ceil(tonumber(x) - now * 1000)
    else
      local done = redis.pcall('HSET', key, 'l', token, 'x', text(now * 1000 + lasting))
      if type(done) == 'number' then
        local ttl = redis.call('PTTL', key)
        if (ttl < 0 and not d) or (ttl >= 0 and ttl < lasting) then
          redis.call('PEXPIRE', key, lasting)
        end
        state = 'l'
      end
    end
  end
  answers[#answers + 1] = entry(damaged and state .. '!' or state, left, o, t, u, v, d)
end
-- Of nothing, and last, as the first write of a script is what a full server refuses.
if refused(redis.pcall('HDEL', KEYS[1], '-')) then return replica end
return answers
"""

WRITE: Final = """
-- ARGV: until when anything is stored, channel, then for each key: token, flags, rank, time of
-- observation, attempts, latency and lifetime in ms, three lengths and a line's end, then the
-- version that gives way, the version, the key and the value. Flags: f(orce), e(qual ones are
-- replaced), u(ndated), p(revious is wanted), s(tale already, so that the next one need not try in
-- vain as well); '-' is none.
-- Answers the server's time, then for each key what came of it, how many were told, and the entry
-- that is there or was there; or an error.
local latest, channel, now = tonumber(ARGV[1]), ARGV[2], clock()

local function write(key, item)
  if now > latest then return {err = 'LATE nobody waits for it any more'} end
  local stop = item:find('\\n', 1, true)
  local token, flags, rank, observed, attempts, latency, lifetime, a, b, c = item:sub(1, stop - 1)
    :match('^(%S+) (%S+) (%S+) (%S+) (%S+) (%S+) (%S+) (%d+) (%d+) (%d+)$')
  local over = item:sub(stop + 1, stop + a)
  local version = item:sub(stop + a + 1, stop + a + b)
  local identity = item:sub(stop + a + b + 1, stop + a + b + c)
  local got = fields(key, 'd', 'v', 'r', 'o', 't', 'u', 'l', 'w')
  local d, v, r, o, t, u, l, w = unpack(got)
  local undated, forced = flags:find('u', 1, true), flags:find('f', 1, true)
  local stale = flags:find('s', 1, true)
  local leased = token ~= '-'
  local holds = not leased or l == token
  local when = observed
  if undated then
    local began = now - tonumber(latency) / 1000
    if attempts == '0' and d and u == '1' and tonumber(w) >= began then
      began = tonumber(w) + 0.000001
    end
    observed, when = text(now), text(began)
  end
  local status, again = 'stored', d and v == version  -- of which a part may have been refused
  if d and not again and not forced and not (holds and over ~= '' and over == v) then
    local mine, theirs = tonumber(rank), tonumber(r)
    if mine < theirs then status = 'ignored_lower_authority'
    elseif mine == theirs then
      local later = tonumber(when) - tonumber(w)
      if later < 0 then status = 'ignored_older'
      elseif later == 0 and not flags:find('e', 1, true) then status = 'ignored_duplicate' end
    end
  end
  if not holds and not again and (undated or not d or status ~= 'stored') then
    return entry('ignored_older', 0, o, t, u, v, d)
  end
  if status ~= 'stored' then
    if leased then
      redis.call('HDEL', key, 'l', 'x')
      tell(channel, stale and 'f' or 'r', v, identity)
    end
    return entry(status, 0, o, t, u, v, d)
  end
  if stale then tell(channel, 'f', version, identity) end
  local told = tell(channel, 's', version, identity)
  if not again then
    local value = item:sub(stop + a + b + c + 1)
    local done = redis.pcall('HSET', key, 'd', value, 'v', version, 'r', rank, 'o', observed,
      'w', when, 't', text(now), 'u', undated and '1' or '0')
    if type(done) ~= 'number' then return done end
  end
  if holds or not again then redis.call('HDEL', key, 'l', 'x') end
  redis.call('PEXPIRE', key, lifetime)
  if flags:find('p', 1, true) and not again then return entry('stored', told, o, t, u, v, d) end
  return entry('stored', told)
end

local answers = {text(now)}
for i, key in ipairs(KEYS) do
  local came = write(key, ARGV[i + 2])
  if refused(came) then return replica end
  answers[#answers + 1] = came
end
return answers
"""

INVALIDATE: Final = """
-- ARGV: channel, then each key's text. Answers how many were told.
local told = 0
for i, key in ipairs(KEYS) do
  told = told + tell(ARGV[1], 'i', '', ARGV[i + 1])
  redis.call('DEL', key)
end
return told
"""

UNLINK: Final = "return redis.call('UNLINK', unpack(KEYS))"

RELEASE: Final = """
-- ARGV: channel, letter of the news, then each key's token and text. Answers how many were held.
local held = 0
for i, key in ipairs(KEYS) do
  local got = fields(key, 'l', 'v')
  local l, v = unpack(got)
  if l == ARGV[2 * i + 1] then
    redis.call('HDEL', key, 'l', 'x')
    tell(ARGV[1], ARGV[2], v or '', ARGV[2 * i + 2])
    held = held + 1
  end
end
return held
"""

RENEW: Final = """
-- ARGV: lease in ms, then each key's token. Answers how many are still held.
local held, lasting, now = 0, tonumber(ARGV[1]), clock() * 1000
for i, key in ipairs(KEYS) do
  if fields(key, 'l')[1] == ARGV[i + 1] then
    redis.call('HSET', key, 'x', text(now + lasting))
    local left = redis.call('PTTL', key)
    if left >= 0 and left < lasting then redis.call('PEXPIRE', key, lasting) end
    held = held + 1
  end
end
return held
"""
