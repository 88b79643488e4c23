// One stream for all windows that show the same. A browser has six connections for one gateway over HTTP/1.1, and a stream
// takes one for good: with one for each window, the seventh would wait for ever. The windows talk over a channel of the
// browser. A window opens its stream, whose first event says how everything is; if another window has had one like it for
// longer, it closes its own again and takes what that one passes on. A window that goes says so; one that is gone without a
// word is missed after some seconds, because the gateway says something each second.

// Other requests of the windows need connections too.
const STREAMS_MAX = 4;
// How long a stream may say nothing before it is taken to be gone.
const SILENT_MS = 4_000;
// So that not all of those who miss a stream open one at once.
const SPREAD_MS = 300;
// How long a new window waits for the others to say which streams they have.
const ANSWER_MS = 50;
const NAMES = ["hello", "datasources", "tick", "health", "keys", "refusals", "end"];

const id = `${Math.random()}`.slice(2) + Date.now();
const channel = typeof BroadcastChannel === "undefined" ? null : new BroadcastChannel("headgate-live");

// What this window wants, and to whom what comes of it goes: `take(name, data)` and `fail(isRefused)`.
let path = null;
let take = () => {};
let fail = () => {};
// Its own stream, if it has one, since when, and whether it has said how everything is.
let stream = null;
let since = 0;
let isBegun = false;
// Whether this window knows how everything is: what another one passes on is only what happens since.
let isTold = false;
// When the streams of other windows were last heard of, by their paths.
const others = new Map();
let timer = null;
// The window whose stream this one takes.
let source = null;

// Follows a stream from now on.
export function follow(wanted, onEvent, onFailure) {
  leave();
  [path, take, fail, isTold] = [wanted, onEvent, onFailure, false];
  if (!channel) return look();
  say({ asks: true });
  timer = setTimeout(look, ANSWER_MS);
}

// Follows none any more.
export function leave() {
  clearTimeout(timer);
  if (stream) {
    drop();
    say({ left: path });
  }
  [path, source] = [null, null];
}

function drop() {
  stream?.close();
  stream = null;
}

function say(words) {
  channel?.postMessage({ ...words, by: id });
}

function wait(ms) {
  clearTimeout(timer);
  timer = setTimeout(look, ms + Math.random() * SPREAD_MS);
}

// Opens the stream, unless this window has it, or the browser has too many.
function look() {
  if (path === null || stream) return;
  const now = Date.now();
  for (const [of, at] of others) if (now - at > SILENT_MS) others.delete(of);
  if (others.size >= STREAMS_MAX && !others.has(path)) wait(SILENT_MS);
  else open();
}

function open() {
  const [wanted, opened] = [path, new EventSource(path)];
  [stream, since, isBegun, source] = [opened, Date.now(), false, null];
  const isPresent = () => stream === opened && path === wanted;
  for (const name of NAMES) {
    opened.addEventListener(name, (event) => {
      if (!isPresent()) return;
      [isBegun, isTold] = [true, true];
      say({ path: wanted, since, name, data: event.data });
      if (name === "end") drop();
      take(name, JSON.parse(event.data));
    });
  }
  opened.onerror = () => {
    if (!isPresent()) return;
    const isRefused = opened.readyState === EventSource.CLOSED;
    if (isRefused) drop();
    say({ path: wanted, since, failed: isRefused });
    fail(isRefused);
  };
}

// What another window says of its stream.
function hear({ by, asks, has, left, path: of, since: at, name, data, failed }) {
  if (asks) {
    if (stream) say({ has: path });
    return;
  }
  if (has !== undefined) {
    others.set(has, Date.now());
    return;
  }
  if (left !== undefined || failed !== undefined || name === "end") others.delete(left ?? of);
  else others.set(of, Date.now());
  if ((left ?? of) !== path) return;
  // What becomes of a stream that this window does not take is nothing to it.
  if ((left !== undefined || failed !== undefined || name === "end") && by !== source) return;
  const isOlder = left === undefined && (at < since || (at === since && by < id));
  // Of two streams the younger one goes, once its window knows how everything is.
  if (stream && isOlder && isBegun && failed === undefined) drop();
  if (stream) return;
  isTold ||= name === "hello";
  if (!isTold) return;
  if (left !== undefined) {
    wait(0);
  } else if (failed !== undefined) {
    fail(failed);
    if (path === of && !failed) wait(SILENT_MS);
  } else {
    source = by;
    wait(SILENT_MS);
    if (name === "end") clearTimeout(timer);
    take(name, JSON.parse(data));
  }
}

if (channel) channel.onmessage = ({ data }) => hear(data);
