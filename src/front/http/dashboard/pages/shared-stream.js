// One stream for all windows that show the same. A browser has six connections for one gateway over HTTP/1.1, and a stream
// takes one for good: with one for each window, the seventh would wait for ever. The windows talk over a channel of the
// browser: one of those that want a stream has it open and passes its events on; the others take them. Whoever joins has it
// opened anew, because its first event says how everything is. A window that goes says so; one that is gone without a word
// is missed after some seconds, because the gateway says something each second.

// Other requests of the windows need connections too.
const STREAMS_MAX = 4;
// How long a window waits for somebody else's stream before it opens one.
const JOIN_MS = 300;
// Who has said nothing for so long is gone.
const SILENT_MS = 4_000;
const NAMES = ["hello", "datasources", "tick", "health", "keys", "refusals", "end"];

const id = `${Math.random()}`.slice(2) + Date.now();
const channel = typeof BroadcastChannel === "undefined" ? null : new BroadcastChannel("headgate-live");

// What this window wants, and to whom what comes of it goes: `take(name, data)` and `fail(isRefused)`.
let path = null;
let take = () => {};
let fail = () => {};
// The stream, if it is this window's to have open.
let stream = null;
// When each of the others' streams was last heard of, by its path: { by, at }.
const others = new Map();
let timer = null;
// Whether there are other windows, as far as is known.
let hasCompany = false;
const loadedAt = Date.now();

// Follows a stream from now on.
export function follow(wanted, onEvent, onFailure) {
  leave();
  [path, take, fail] = [wanted, onEvent, onFailure];
  if (!channel || (!hasCompany && Date.now() - loadedAt > JOIN_MS)) return open();
  say({ join: path });
  wait(JOIN_MS);
}

// Follows none any more.
export function leave() {
  clearTimeout(timer);
  if (stream) {
    stream.close();
    stream = null;
    say({ left: path });
  }
  path = null;
}

function say(words) {
  channel?.postMessage({ ...words, by: id });
}

// Looks after a while whether somebody has the stream.
function wait(ms) {
  clearTimeout(timer);
  timer = setTimeout(look, ms + Math.random() * JOIN_MS);
}

function look() {
  if (path === null || stream) return;
  const now = Date.now();
  for (const [of, { at }] of others) if (now - at > SILENT_MS) others.delete(of);
  if (others.has(path)) return wait(SILENT_MS);
  if (others.size >= STREAMS_MAX) return wait(SILENT_MS);
  open();
}

function open() {
  const [wanted, opened] = [path, new EventSource(path)];
  stream?.close();
  stream = opened;
  const isPresent = () => stream === opened && path === wanted;
  for (const name of NAMES) {
    opened.addEventListener(name, (event) => {
      if (!isPresent()) return;
      say({ path: wanted, name, data: event.data });
      if (name === "end") {
        opened.close();
        stream = null;
      }
      take(name, JSON.parse(event.data));
    });
  }
  opened.onerror = () => {
    if (!isPresent()) return;
    const isRefused = opened.readyState === EventSource.CLOSED;
    if (isRefused) stream = null;
    say({ path: wanted, failed: isRefused });
    fail(isRefused);
  };
}

if (channel) {
  channel.onmessage = ({ data: { by, isNew, isHere, join, left, path: of, name, data, failed } }) => {
    hasCompany = true;
    if (isNew) say({ isHere: true });
    if (isNew || isHere) return;
    if (join !== undefined) {
      if (stream && join === path) open();
    } else if (left !== undefined) {
      others.delete(left);
      if (left === path && !stream) wait(0);
    } else if (failed !== undefined) {
      others.delete(of);
      if (of !== path || stream) return;
      fail(failed);
    } else {
      others.set(of, { by, at: Date.now() });
      if (of !== path) return;
      // Two have opened it at once: one of them goes on.
      if (stream) {
        if (by > id) return;
        stream.close();
        stream = null;
      }
      if (name === "end") others.delete(of);
      else wait(SILENT_MS);
      take(name, JSON.parse(data));
    }
  };
  addEventListener("pagehide", leave);
  say({ isNew: true });
}
