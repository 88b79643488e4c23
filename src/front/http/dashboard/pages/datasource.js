// One datasource: what comes in now, its values over time, its keys, and everything else of it, a tab each.

import { get, of, remove } from "./api.js";
import { button, fill, h, notify, setText } from "./dom.js";
import { confirm } from "./dialogs.js";
import { chartPanel } from "./chart.js";
import { clientsPanel } from "./clients.js";
import { age, count, plural, rate, time } from "./format.js";
import { keysPanel } from "./keys.js";
import { limitsButton, limitsList } from "./limits.js";
import { datasources, rateOf } from "./live.js";
import { quarantinePanel } from "./quarantine.js";
import { refusalsPanel } from "./refusals.js";
import { schemaPanel } from "./schema.js";
import { mayManage } from "./session.js";
import { sparkline } from "./sparkline.js";
import { tailPanel } from "./tail.js";
import { valuesTable } from "./values.js";

const TABS = [
  ["", "Live", false], ["keys", "Keys", true], ["clients", "Clients", true], ["quarantine", "Quarantine", false],
  ["schema", "Schema", false], ["refusals", "Refusals", true], ["settings", "Settings", true],
];

export function datasourceView(main, id, tab, rewatch) {
  const isManager = mayManage(id);
  const path = `#/datasources/${encodeURIComponent(id)}`;
  const name = h("h1", {}, datasources.get(id)?.name ?? id);
  const spark = sparkline();
  const state = h("p", { class: "muted" }, "…");
  const shown = TABS.filter(([, , needsAdmin]) => !needsAdmin || isManager);
  const tabs = h("nav", { class: "tabs", "aria-label": "Of this datasource" }, shown.map(([of_, label]) =>
    h("a", { href: of_ ? `${path}/${of_}` : path, "aria-current": of_ === tab ? "page" : null }, label)));
  const body = h("div", { class: "body" });
  fill(main, h("a", { href: "#/", class: "back" }, "All datasources"),
    h("div", { class: "title" }, name, h("code", {}, id), state, spark.element), tabs, body);
  document.title = `${datasources.get(id)?.name ?? id} · Headgate`;
  // On a telephone not all tabs are in sight.
  tabs.querySelector("[aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });

  const panels = open(body, id, shown.some(([of_]) => of_ === tab) ? tab : "", rewatch);
  let timer = null;
  const soon = (act, ms) => {
    if (act && timer === null) {
      timer = setTimeout(() => {
        timer = null;
        act();
      }, ms);
    }
  };
  const draw = () => {
    const known = datasources.get(id);
    if (!known) return;
    setText(name, known.name);
    setText(state, `${rate(rateOf(known))} messages/s · ${known.last_at ? `last message ${age(known.last_at)}` : "no message yet"}${known.accepted ? ` · ${count(known.accepted)} accepted with its present keys` : ""}`);
    spark.draw(known.history);
  };
  draw();
  return {
    on(event, data) {
      if (event === "hello" || event === "tick") draw();
      const got = event === "tick" ? data.datasources[id] : undefined;
      if (got) panels.take?.(got);
      if (got?.quarantined) soon(panels.onQuarantined, 1500);
      if (event === "keys") soon(panels.onKeys, 300);
      if (event === "refusals") soon(panels.onRefused, 500);
    },
    close() {
      clearTimeout(timer);
      panels.close?.();
    },
  };
}

function open(body, id, tab, rewatch) {
  const panel = (props) => h("section", { class: "panel", ...props });
  if (tab === "") return livePanels(body, id, rewatch);
  const place = tab === "schema" ? h("div") : panel();
  fill(body, place);
  switch (tab) {
    case "keys": {
      const { reload } = keysPanel(place, id);
      return { onKeys: reload };
    }
    case "clients": {
      const { reload } = clientsPanel(place, id);
      return { onKeys: reload };
    }
    case "quarantine": {
      const { reload } = quarantinePanel(place, id);
      return { onQuarantined: reload };
    }
    case "refusals": {
      const { reload } = refusalsPanel(place, id);
      return { onRefused: reload };
    }
    case "schema":
      return schemaPanel(place, id);
    default:
      return settingsPanel(place, id);
  }
}

function livePanels(body, id, rewatch) {
  const over = h("section", { class: "panel" });
  const newest = h("section", { class: "panel" }, h("h2", {}, "Newest values"));
  const place = h("div", {}, h("p", { class: "muted" }, "…"));
  newest.append(place);
  const now = h("section", { class: "panel" });
  fill(body, over, newest, now);
  const chart = chartPanel(over, id);
  const tail = tailPanel(now, (topic) => rewatch(topic));
  const values = valuesTable(place, id, (topic, key) => {
    chart.choose(topic, key);
    over.scrollIntoView({ block: "nearest" });
  });
  values.load().then((numbers) => chart.offer(numbers));
  return {
    take(got) {
      tail.take(got.newest, got.more);
      values.take(got.newest);
      chart.offer(values.numbers());
      chart.take(got.newest);
    },
    close: () => chart.close(),
  };
}

function settingsPanel(place, id) {
  const facts = h("dl", { class: "facts big" });
  const limits = h("div", {});
  let set = {};
  const showLimits = (now) => {
    set = now;
    fill(limits, limitsList(set, "None but the gateway's own."));
  };
  fill(place, h("h2", {}, "Settings"), facts, h("h3", {}, "Limits"), limits,
    h("p", {}, limitsButton(of(id), { isKey: false, limits: () => set, whenSet: showLimits })),
    h("h3", { class: "apart" }, "Delete"),
    h("p", { class: "muted" }, "Its keys end at once and no key reads its records any more."),
    button("Delete the datasource", () => deleteDialog(id), { class: "danger" }));
  get(of(id)).then((datasource) => {
    const shown = [["Name", datasource.name], ["Id", datasource.id], ["Created", time(datasource.created_at)], ["Incarnation", count(datasource.incarnation)]];
    fill(facts, shown.map(([name, text]) => h("div", {}, h("dt", {}, name), h("dd", {}, text))));
    showLimits(datasource.limits);
  }).catch((error) => {
    if (error.status !== 401) notify(error.message, true);
  });
  return {};
}

function deleteDialog(id) {
  const purge = h("input", { type: "checkbox", id: "purge" });
  confirm(`Delete ${id}`, {
    words: ["Its keys end at once, connected clients are closed, and no key reads its records any more. This cannot be undone."],
    more: h("label", { class: "check", for: "purge" }, purge, " Also remove everything that is stored of it (purge)"),
    word: id,
    submit: "Delete",
    act: async () => {
      const { status, body } = await remove(of(id) + (purge.checked ? "?purge=true" : ""));
      location.hash = "#/";
      if (status === 202 && body?.detail) notify(body.detail, true);
      else if (body?.records !== undefined) notify(`${id} is deleted; ${plural(body.records + body.quarantined, "record")} removed${body.done ? "" : " so far: the rest goes on being removed"}.`);
      else notify(`${id} is deleted.`);
    },
  });
}

