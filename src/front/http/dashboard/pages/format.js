// How numbers, times and payloads are shown.

const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { maximumFractionDigits: 1, notation: "compact" });
const clock = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const timeOfDay = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });

// The gateway's clock minus this browser's, in milliseconds.
let skewMs = 0;
export function setNow(at) {
  skewMs = Date.parse(at) - Date.now();
}

export const count = (n) => whole.format(n);
export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

export function rate(perSecond) {
  if (!perSecond) return "0";
  if (perSecond < 0.1) return "< 0.1";
  return perSecond < 10 ? perSecond.toFixed(1) : short.format(perSecond);
}

export function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (n >= 1024 && i < units.length - 1) {
    n /= 1024;
    i += 1;
  }
  return `${i && n < 10 ? n.toFixed(1) : Math.round(n)} ${units[i]}`;
}

export const time = (at) => (at ? clock.format(new Date(at)) : "–");
export const tod = (at) => timeOfDay.format(new Date(at));

// How long ago, in one unit.
export function age(at) {
  if (!at) return "never";
  const s = Math.round((Date.now() + skewMs - Date.parse(at)) / 1000);
  if (s < 2) return "now";
  return `${span(s)} ago`;
}

// How long until then.
export function until(at) {
  const s = Math.round((Date.parse(at) - Date.now() - skewMs) / 1000);
  return s <= 0 ? "now" : `in ${span(s)}`;
}

export function span(s) {
  if (s < 120) return `${s} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  if (s < 172800) return `${Math.round(s / 3600)} h`;
  return `${Math.round(s / 86400)} d`;
}

// A value as one line of text.
export function value(of) {
  if (typeof of === "number") return String(Number.isInteger(of) ? of : Number(of.toPrecision(7)));
  return typeof of === "string" ? of : JSON.stringify(of);
}

// A record's payload as one line of text.
export function payload(record) {
  if (record.omitted_bytes) return `(${bytes(record.omitted_bytes)}: too long to show)`;
  const text = value(record.payload);
  return record.payload_encoding ? `${text} (base64)` : text;
}

// The numbers in a payload, by the names that series have: state.rpm for members inside; the payload itself has "".
export function samples(of, name = "", into = new Map(), depth = 0) {
  if (typeof of === "number") into.set(name, of);
  else if (typeof of === "boolean" && name) into.set(name, Number(of));
  else if (of && typeof of === "object" && !Array.isArray(of) && depth < 8) {
    for (const [key, inner] of Object.entries(of)) samples(inner, name ? `${name}.${key}` : key, into, depth + 1);
  }
  return into;
}

// The values in a payload by those names, whatever they are: [name, text, whether it is a number].
export function members(of, name = "", into = [], depth = 0) {
  if (of && typeof of === "object" && !Array.isArray(of) && depth < 8 && Object.keys(of).length) {
    for (const [key, inner] of Object.entries(of)) members(inner, name ? `${name}.${key}` : key, into, depth + 1);
  } else {
    into.push([name, value(of), typeof of === "number" || (typeof of === "boolean" && name !== "")]);
  }
  return into;
}

// For an <input type=datetime-local>, in the browser's zone.
export function localInput(date) {
  const pad = (n) => String(n).padStart(2, "0");
  return `${date.getFullYear()}-${pad(date.getMonth() + 1)}-${pad(date.getDate())}T${pad(date.getHours())}:${pad(date.getMinutes())}`;
}
