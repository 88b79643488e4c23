// The datasources as cards: how much each gets now, what came last and when. And the form that makes a new one.

import { get, of, post } from "./api.js";
import { button, field, fill, h, setText } from "./dom.js";
import { formDialog, showSecret } from "./dialogs.js";
import { age, count, members, payload, plural, rate } from "./format.js";
import { datasources, gateway, rateOf } from "./live.js";
import { isGatewayAdmin } from "./session.js";
import { sparkline } from "./sparkline.js";

const VALUES_MAX = 4;
// Of so many cards the newest values are asked for when the page opens; the others have theirs when something comes.
const ASKED_MAX = 24;

export function datasourcesView(main) {
  const cards = new Map();
  const grid = h("div", { class: "cards" });
  const search = h("input", { type: "search", placeholder: "Find", "aria-label": "Find a datasource", oninput: () => arrange() });
  const summary = h("p", { class: "muted", id: "summary" }, "…");
  const create = isGatewayAdmin() ? button("New datasource", () => createDialog(), { class: "primary" }) : null;
  fill(main,
    h("div", { class: "title" }, h("h1", {}, "Datasources"), summary, h("div", { class: "tools" }, search, create)),
    grid);

  let isKnown = false;
  function arrange() {
    const wanted = search.value.trim().toLowerCase();
    const shown = [...datasources.values()]
      .filter((known) => !wanted || `${known.name} ${known.id}`.toLowerCase().includes(wanted))
      .sort((a, b) => a.name.localeCompare(b.name));
    for (const known of shown) if (!cards.has(known.id)) cards.set(known.id, card(known));
    for (const id of cards.keys()) if (!datasources.has(id)) cards.delete(id);
    search.hidden = datasources.size < 6;
    if (create) create.hidden = !datasources.size;
    if (!isKnown && !datasources.size) return;
    const elements = shown.map((known) => cards.get(known.id).element);
    if (!elements.length) {
      fill(grid, datasources.size ? h("p", { class: "empty" }, "No datasource has this in its name.") : welcome());
      return;
    }
    if (elements.length !== grid.children.length || elements.some((made, i) => made !== grid.children[i])) fill(grid, elements);
  }

  function draw() {
    let sum = 0;
    for (const known of datasources.values()) {
      sum += rateOf(known);
      cards.get(known.id)?.draw(known);
    }
    const more = gateway.more ? ` (the first ${count(datasources.size)} of ${count(datasources.size + gateway.more)})` : "";
    setText(summary, `${plural(datasources.size, "datasource")}${more} · ${rate(sum)} messages/s`);
  }

  async function askNewest() {
    for (const known of [...datasources.values()].slice(0, ASKED_MAX)) {
      if (known.newest.size) continue;
      try {
        const { topics } = await get(of(known.id, "latest"));
        for (const { topic, payload: newest, payload_encoding, received_at } of topics.slice(0, 50)) {
          if (!known.newest.has(topic)) known.newest.set(topic, { topic, payload: newest, payload_encoding, received_at });
          if (!known.last_at || received_at > known.last_at) known.last_at = received_at;
        }
        cards.get(known.id)?.draw(known);
      } catch (error) {
        if (error.status === 401) return;
      }
    }
  }

  if (datasources.size) {
    isKnown = true;
    arrange();
    draw();
    askNewest();
  }
  return {
    on(name) {
      if (name === "hello" || name === "datasources") {
        isKnown = true;
        arrange();
        draw();
        askNewest();
      } else if (name === "tick") {
        draw();
      }
    },
  };
}

function welcome() {
  return h("div", { class: "welcome" },
    h("h2", {}, "No datasource yet"),
    h("p", {}, "A datasource is one stream of readings: a machine, a room, a site. It comes with a key for its device, and with lines to paste."),
    isGatewayAdmin() ? button("Create the first one", () => createDialog(), { class: "primary" }) : null);
}

function card(known) {
  const spark = sparkline();
  const speed = h("strong", { class: "number" }, "0");
  const last = h("span", {}, "…");
  const total = h("span", {}, "");
  const values = h("dl", { class: "values" });
  const element = h("article", { class: "card" },
    h("div", { class: "card-head" },
      h("h2", {}, h("a", { href: `#/datasources/${encodeURIComponent(known.id)}`, title: known.name }, known.name)),
      known.name === known.id ? null : h("span", { class: "id" }, known.id)),
    h("div", { class: "card-rate" }, h("div", {}, speed, h("span", { class: "unit" }, " messages/s")), spark.element),
    values,
    h("div", { class: "card-foot" }, last, total));
  return {
    element,
    draw(now) {
      setText(speed, rate(rateOf(now)));
      setText(last, now.last_at ? `Last message ${age(now.last_at)}` : "No message yet");
      setText(total, now.accepted ? `${count(now.accepted)} accepted` : "");
      element.classList.toggle("silent", !now.last_at);
      spark.draw(now.history);
      drawValues(values, now.newest);
    },
  };
}

// The newest values of a few topics: the members of each payload by their names, numbers before texts, or the payload
// itself. Every topic has its turn before one has a second line.
function drawValues(place, newest) {
  const topics = [...newest.values()].sort((a, b) => a.topic.localeCompare(b.topic)).slice(0, VALUES_MAX);
  const of_ = topics.map((record) => {
    if (record.payload_encoding || record.omitted_bytes) return [[record.topic, payload(record)]];
    const found = members(record.payload).sort((a, b) => Number(b[2]) - Number(a[2]));
    return found.map(([name, text]) => [name && name !== "value" ? `${record.topic} ${name}` : record.topic, text]);
  });
  let left = VALUES_MAX;
  const taken = of_.map(() => 0);
  for (let turn = 0; turn < VALUES_MAX; turn += 1) {
    of_.forEach((found, i) => {
      if (left > 0 && found.length > turn) {
        taken[i] += 1;
        left -= 1;
      }
    });
  }
  const lines = of_.flatMap((found, i) => found.slice(0, taken[i]));
  while (place.children.length > 2 * lines.length) place.lastChild.remove();
  lines.forEach(([name, text], i) => {
    if (!place.children[2 * i]) place.append(h("dt", {}, h("bdi", {})), h("dd", {}));
    setText(place.children[2 * i].firstElementChild, name);
    setText(place.children[2 * i + 1], text);
  });
}

export function createDialog() {
  const name = h("input", { type: "text", required: true, autocomplete: "off", maxlength: "200", placeholder: "Press 4" });
  const id = h("input", { type: "text", autocomplete: "off", spellcheck: "false", autocapitalize: "off", placeholder: "made from the name" });
  const reads = h("input", { type: "checkbox", id: "reads" });
  formDialog("New datasource", {
    parts: [
      field("Name", name),
      field("Id", id, "Lower case letters, digits and hyphens. It is in topics and URLs and does not change."),
      h("label", { class: "check", for: "reads" }, reads, " Its first key may also read (subscribe)"),
    ],
    submit: "Create",
    isReady: () => name.value.trim() !== "",
    act: async () => {
      const body = { name: name.value.trim(), scopes: reads.checked ? ["ingest", "subscribe"] : ["ingest"] };
      if (id.value.trim()) body.id = id.value.trim();
      const made = (await post("/v1/datasources", body)).body;
      showSecret(`The key of ${made.datasource.name}`, made.key, made.connect, () => {
        location.hash = `#/datasources/${encodeURIComponent(made.datasource.id)}`;
      });
    },
  });
}
