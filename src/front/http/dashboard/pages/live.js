// What happens, as the gateway tells it: one stream for the page, which it shares with other windows. Its events go to
// whatever view is there.

import { query, request } from "./api.js";
import { setNow } from "./format.js";
import { follow, leave } from "./shared-stream.js";

const HISTORY_S = 60;
// A page that nobody sees gives its connection back: a browser has few of them for one gateway.
const HIDDEN_MS = 5_000;

// The stream that is followed, or null.
let followed = null;
let wanted = null;
let listener = () => {};
let hiddenTimer = null;
let retryTimer = null;
let whenEnded = () => {};

// Whether the stream that there is has one datasource alone.
const isPartial = () => watched() !== null;

const watched = () => new URLSearchParams(wanted?.split("?")[1]).get("datasource");

// What is known of each datasource, by its id.
export const datasources = new Map();
export const gateway = { health: null, log_end: 0, more: 0, isConnected: false };

export function onEnded(act) {
  whenEnded = act;
}

// Has events of what `parameters` name go to `act(name, data)`. The stream that there is goes on if it is the same.
export function watch(parameters, act) {
  listener = act;
  const path = `/v1/live${query(parameters)}`;
  if (wanted === path && followed === path) return;
  wanted = path;
  open();
}

export function stop() {
  wanted = null;
  close();
  datasources.clear();
  gateway.health = null;
}

function close() {
  clearTimeout(retryTimer);
  leave();
  followed = null;
}

function open() {
  close();
  if (!wanted || document.hidden) return;
  followed = wanted;
  follow(wanted, take, (isRefused) => {
    connected(false);
    // It comes again by itself unless the gateway has said no.
    if (isRefused) {
      followed = null;
      whenEnded(null, again);
    }
  });
}

// What the gateway says to the stream that it has refused.
export const ask = () => request("HEAD", wanted);

// Opens it again after a while.
function again() {
  clearTimeout(retryTimer);
  retryTimer = setTimeout(open, 3000);
}

function connected(is) {
  if (gateway.isConnected === is) return;
  gateway.isConnected = is;
  listener("connection", { isConnected: is });
}

// Ids are names of members: none is inherited.
const bare = (of) => Object.assign(Object.create(null), of);

function take(name, data) {
  for (const members of ["totals", "history"]) if (data[members]) data[members] = bare(data[members]);
  if (name === "tick") data.datasources = bare(data.datasources);
  switch (name) {
    case "hello":
      setNow(data.at);
      list(data);
      gateway.log_end = data.log_end;
      gateway.version = data.version;
      for (const { id } of data.datasources) {
        const known = datasources.get(id);
        const totals = data.totals[id];
        if (totals) Object.assign(known, totals, { last_at: later(totals.last_at, known.last_at) });
        known.history = data.history[id] ?? new Array(HISTORY_S).fill(0);
      }
      connected(true);
      break;
    case "datasources":
      list(data);
      break;
    case "tick":
      tick(data);
      break;
    case "health":
      gateway.health = data;
      break;
    case "end":
      close();
      connected(false);
      whenEnded(data.reason, again);
      return;
    default:
  }
  listener(name, data);
}

function list(data) {
  for (const [id, known] of datasources) {
    const of = data.datasources.find((listed) => listed.id === id);
    if (of ? of.incarnation !== known.incarnation : !isPartial()) datasources.delete(id);
  }
  for (const of of data.datasources) {
    const fresh = { accepted: 0, refused: 0, last_at: null, history: new Array(HISTORY_S).fill(0), newest: new Map() };
    datasources.set(of.id, Object.assign(datasources.get(of.id) ?? fresh, of));
  }
  if (!isPartial()) gateway.more = data.more;
}

const later = (a, b) => (!b || (a && a > b) ? a : b);

function tick(data) {
  setNow(data.at);
  const got = Object.values(data.datasources).reduce((sum, of) => sum + of.records, 0);
  // What was not looked at is taken to be as the rest.
  const scale = got && data.unread ? (got + data.unread) / got : 1;
  data.scale = scale;
  gateway.log_end = data.log_end;
  for (const [id, known] of datasources) {
    const of = data.datasources[id];
    if (!of && isPartial() && watched() !== id) continue;
    known.history.push(of && data.seconds > 0 ? Math.round((of.records * scale) / Math.max(1, data.seconds)) : 0);
    while (known.history.length > HISTORY_S) known.history.shift();
    if (!of) continue;
    known.accepted += Math.round(of.records * scale);
    known.last_at = of.last_at;
    for (const record of of.newest) known.newest.set(record.topic, record);
    while (known.newest.size > 50) known.newest.delete(known.newest.keys().next().value);
  }
}

// Records a second, over the last few seconds.
export function rateOf(known) {
  const last = known.history.slice(-5);
  return last.reduce((sum, n) => sum + n, 0) / 5;
}

document.addEventListener("visibilitychange", () => {
  clearTimeout(hiddenTimer);
  hiddenTimer = null;
  if (document.hidden) {
    hiddenTimer = setTimeout(close, HIDDEN_MS);
  } else if (wanted && !followed) {
    open();
  }
});

// A page that comes back with the Back button follows again.
addEventListener("pagehide", close);
addEventListener("pageshow", ({ persisted }) => {
  if (persisted && wanted && !followed) open();
});
