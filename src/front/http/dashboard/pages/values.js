// The newest value of each topic and member, as it comes.

import { get, of, query } from "./api.js";
import { button, h, notify, refill, setText, table } from "./dom.js";
import { age, members, payload, value } from "./format.js";

const ROWS_MAX = 300;

// A table of them in `place`. `whenChart(topic, key)` is called for a number that is to be shown over time.
export function valuesTable(place, datasource, whenChart) {
  const rows = new Map(); // topic and member -> what is shown of it
  let next = null;

  function note(topic, key, of_, received_at, isNumber) {
    const name = JSON.stringify([topic, key]);
    const known = rows.get(name);
    if (known && known.received_at > received_at) return false;
    if (!known && rows.size >= ROWS_MAX) return false;
    rows.set(name, { ...known, topic, key, text: of_, received_at, isNumber });
    return !known;
  }

  function draw() {
    const sorted = [...rows.values()].sort((a, b) => a.topic.localeCompare(b.topic) || a.key.localeCompare(b.key));
    refill(place, table("Newest values", [
      { name: "Topic" }, { name: "Value of" }, { name: "Newest", class: "value" }, { name: "Received", class: "time" }, { name: "", class: "act" },
    ], sorted.map((row) => {
      row.value = h("span", { class: "number" }, row.text);
      row.age = h("span", { title: row.received_at }, age(row.received_at));
      const chart = row.isNumber
        ? button("Chart", () => whenChart(row.topic, row.key), { class: "quiet", "aria-label": `Chart of ${row.topic} ${row.key}` })
        : "";
      return { cells: [row.topic, row.key, row.value, row.age, chart] };
    }), "Nothing stored yet. What comes in is shown here as it comes."),
    next ? h("p", { class: "muted" }, `Only the first ${ROWS_MAX} are shown.`) : null);
  }

  async function load() {
    try {
      let after;
      do {
        const page = await get(of(datasource, "latest") + query({ after_topic: after }));
        for (const { topic, values, payload: newest, payload_encoding, received_at } of page.topics) {
          for (const [key, { value: it, received_at: at, omitted, value_encoding }] of Object.entries(values)) {
            if (omitted || value_encoding) note(topic, key, omitted ? "(too long to show)" : value(it), at, false);
            else for (const [name, text, isNumber] of members(it, key)) note(topic, name, text, at, isNumber);
          }
          if (!Object.keys(values).length) note(topic, "", payload({ payload: newest, payload_encoding }), received_at, typeof newest === "number");
        }
        after = page.next;
        next = page.next;
      } while (after && rows.size < ROWS_MAX);
    } catch (error) {
      if (error.status !== 401) notify(error.message, true);
    }
    draw();
    return [...rows.values()].filter((row) => row.isNumber);
  }

  return {
    load,
    take(records) {
      let isNew = false;
      for (const record of records) {
        if (record.omitted_bytes) continue;
        const found = record.payload_encoding ? [["", payload(record), false]] : members(record.payload);
        for (const [key, text, isNumber] of found) isNew = note(record.topic, key, text, record.received_at, isNumber) || isNew;
      }
      if (isNew) draw();
      for (const row of rows.values()) {
        if (!row.value) continue;
        setText(row.value, row.text);
        setText(row.age, age(row.received_at));
      }
    },
    numbers: () => [...rows.values()].filter((row) => row.isNumber),
  };
}
