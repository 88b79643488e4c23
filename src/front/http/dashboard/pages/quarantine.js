// Messages in quarantine: what failed, why, and sending them again once the reason is gone.

import { get, of, post, query } from "./api.js";
import { button, fill, h, notify, select } from "./dom.js";
import { confirm } from "./dialogs.js";
import { count, payload, plural, time } from "./format.js";
import { mayManage } from "./session.js";

const PERIODS = [["3600", "last hour"], ["86400", "last 24 hours"], ["604800", "last 7 days"], ["", "all"]];
const PAGE = 100;

export function quarantinePanel(place, datasource) {
  let period = "604800";
  let records = [];
  let next = null;
  const chosen = new Set();
  const list = h("div", {});
  const since = select(PERIODS, period, (to) => {
    period = to;
    reload();
  });
  since.setAttribute("aria-label", "Received");
  const some = button("Send chosen again", () => redrive({ ids: [...chosen] }), { disabled: true });
  const all = button("Send all again", () => confirm("Send all again", {
    words: "Everything in quarantine that failed a schema or a limit goes through intake again. What still fails stays.",
    submit: "Send all again",
    act: () => redrive({}),
  }));
  fill(place, h("div", { class: "panel-head" }, h("h2", {}, "Quarantine"), h("div", { class: "tools" }, since, mayManage(datasource) ? [some, all] : null)),
    h("p", { class: "muted" }, "Messages that came with a good key and failed validation or a limit, and records that are withheld because their key has leaked."),
    list);

  async function page(after) {
    const from = period ? new Date(Date.now() - Number(period) * 1000).toISOString() : undefined;
    return get(of(datasource, "quarantine") + query({ from, after_offset: after, limit: PAGE }));
  }

  async function load() {
    const first = await page();
    records = first.records;
    next = first.next;
    chosen.clear();
    draw();
  }

  function draw() {
    some.disabled = !chosen.size;
    fill(list, records.length ? records.map(entry) : h("p", { class: "empty" }, next === null ? "Nothing is in quarantine in this time." : "Nothing here yet: look further."),
      next === null ? null : button("More", async () => {
        const more = await page(next);
        records = [...records, ...more.records];
        next = more.next;
        draw();
      }));
  }

  function entry(record) {
    const box = h("input", { type: "checkbox", "aria-label": `Choose the message at offset ${record.offset}`, disabled: record.cause === "key" || record.redriven_offset !== null });
    box.checked = chosen.has(record.offset);
    box.addEventListener("change", () => {
      if (box.checked) chosen.add(record.offset);
      else chosen.delete(record.offset);
      some.disabled = !chosen.size;
    });
    const reason = record.detail ?? (record.cause === "key" ? "Withheld: its key has leaked." : record.cause);
    const where = [record.pointer ? `at ${record.pointer}` : null, record.keyword, record.schema_version ? `schema version ${record.schema_version}` : null].filter(Boolean).join(", ");
    return h("article", { class: "refusal" },
      h("div", { class: "refusal-head" }, mayManage(datasource) ? box : null, h("h3", { class: "wrap" }, record.topic), h("span", { class: "muted" }, `offset ${count(record.offset)}, ${time(record.received_at)}`)),
      h("p", { class: "wrap" }, h("span", { class: "badge warn" }, record.cause), " ", reason, where ? h("small", {}, ` (${where})`) : null),
      record.redriven_offset === null ? null : h("p", { class: "muted" }, `Sent again: it is the record at offset ${count(record.redriven_offset)}.`),
      h("pre", { tabindex: "0" }, payload(record)),
      h("small", { class: "muted" }, `key ${record.key_id}, ${record.transport}`));
  }

  async function redrive(which) {
    const sum = { redriven: 0, duplicates: 0, failing: 0 };
    let body;
    do {
      ({ body } = await post(of(datasource, "quarantine", "redrive"), which));
      for (const name of Object.keys(sum)) sum[name] += body[name];
    } while (body.more && body.redriven + body.duplicates > 0);
    const parts = [`${plural(sum.redriven, "message")} let in`];
    if (sum.duplicates) parts.push(`${count(sum.duplicates)} were in already`);
    if (sum.failing) parts.push(`${count(sum.failing)} still fail${body.errors[0] ? `: ${body.errors[0].detail}` : ""}`);
    notify(`${parts.join(", ")}.`, sum.failing > 0);
    await load();
    // Storage is a moment behind the log.
    setTimeout(() => place.isConnected && reload(), 1500);
  }

  const reload = () => load().catch((error) => {
    if (error.status !== 401) notify(error.message, true);
  });
  reload();
  return { reload };
}
