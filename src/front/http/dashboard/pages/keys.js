// The keys of a datasource, or of all datasources (`*`): what each may do, who uses it, and what ends it.

import { get, of, post, query, remove } from "./api.js";
import { button, field, fill, h, notify, refill, select, table } from "./dom.js";
import { confirm, formDialog, showSecret } from "./dialogs.js";
import { limitsButton, limitsList } from "./limits.js";
import { age, count, localInput, payload, plural, time, until } from "./format.js";

const GRACES = [["0", "none: the old key ends at once"], ["3600", "1 hour"], ["86400", "24 hours"], ["604800", "7 days"]];
const PREVIEW_MAX = 1000;

export function keysPanel(place, datasource) {
  const list = h("div", {}, h("p", { class: "muted" }, "…"));
  fill(place, h("div", { class: "panel-head" }, h("h2", {}, datasource === "*" ? "Keys for all datasources" : "Keys"),
    h("div", { class: "tools" }, button("New key", () => createKey(), { class: "primary" }))),
  datasource === "*" ? h("p", { class: "muted" }, "These keys are good for every datasource: for backends that read all, for gateways that carry many devices, and for administration.") : null,
  list);

  async function load() {
    const { keys } = await get(of(datasource, "keys"));
    keys.sort((a, b) => (a.created_at < b.created_at ? 1 : -1));
    refill(list, table("Keys", [
      { name: "Key" }, { name: "May" }, { name: "State" }, { name: "Last use" }, { name: "Messages", class: "value" }, { name: "", class: "act" },
    ], keys.map((key) => ({ cells: [nameOf(key), key.scopes.join(", "), stateOf(key), useOf(key), countsOf(key), actionsOf(key)] })),
    "No key: nothing can be published or read here. Make one."));
  }

  const reload = () => load().catch((error) => {
    if (error.status !== 401) notify(error.message, true);
  });

  function createKey() {
    const label = h("input", { type: "text", autocomplete: "off", maxlength: "200", placeholder: "what it is for" });
    const scope = (name, words, checked) => {
      const input = h("input", { type: "checkbox", id: `scope-${name}`, checked });
      input.checked = checked;
      return [input, h("label", { class: "check", for: `scope-${name}` }, input, ` ${words}`)];
    };
    const [ingest, ingestLine] = scope("ingest", "Publish (ingest)", true);
    const [subscribe, subscribeLine] = scope("subscribe", "Read (subscribe)", false);
    const [admin, adminLine] = scope("admin", "Manage (admin)", false);
    const ends = select([["", "never"], ["604800", "in 7 days"], ["2592000", "in 30 days"], ["7776000", "in 90 days"], ["31536000", "in a year"]], "");
    const scopes = () => Object.entries({ ingest, subscribe, admin }).filter(([, input]) => input.checked).map(([name]) => name);
    formDialog("New key", {
      parts: [field("Label", label), h("fieldset", {}, h("legend", {}, "It may"), ingestLine, subscribeLine, adminLine), field("Expires", ends)],
      submit: "Create",
      isReady: () => scopes().length > 0,
      act: async () => {
        const body = { label: label.value.trim(), scopes: scopes() };
        if (ends.value) body.expires_at = new Date(Date.now() + Number(ends.value) * 1000).toISOString();
        const made = (await post(of(datasource, "keys"), body)).body;
        showSecret("The new key", made.key, made.connect, reload);
        reload();
      },
    });
  }

  function actionsOf(key) {
    const name = key.label || key.id;
    const label = (act) => ({ "aria-label": `${act} ${name}` });
    return h("div", { class: "buttons" },
      key.state === "rotating"
        ? button("Undo rotation", () => undo(key), label("Undo rotation of"))
        : key.state === "active" ? button("Rotate", () => rotate(key), label("Rotate")) : null,
      limitsButton(of(datasource, "keys", key.id), { isKey: true, limits: () => key.limits, whenSet: reload, ...label("Limits of") }),
      button("Quarantine", () => quarantine(key), label("Quarantine what came in with")),
      button("Revoke", () => revoke(key), { class: "danger", ...label("Revoke") }));
  }

  function rotate(key) {
    const grace = select(GRACES, "86400");
    formDialog("Rotate the key", {
      parts: [h("p", {}, `A new key takes the place of ${key.label || key.id}. Both work until the grace ends; the list shows who still uses the old one.`), field("Grace", grace)],
      submit: "Rotate",
      act: async () => {
        const made = (await post(of(datasource, "keys", key.id, "rotate"), { grace_seconds: Number(grace.value) })).body;
        showSecret("The new key", made.key, made.connect, reload);
        reload();
      },
    });
  }

  function undo(key) {
    confirm("Undo the rotation", {
      words: `${key.label || key.id} lives on, and the key that took its place (${key.replaced_by}) ends at once.`,
      submit: "Undo rotation",
      act: async () => {
        await post(of(datasource, "keys", key.id, "rotate"), { undo: true });
        notify("The rotation is undone.");
        await load();
      },
    });
  }

  function revoke(key) {
    confirm("Revoke the key", {
      words: [
        `${key.label || key.id} ends at once and for good.`,
        key.connections ? `${plural(key.connections, "connection")} with it will be closed.` : "Nobody is connected with it now.",
        "If it has leaked, quarantine what came in with it as well.",
      ],
      submit: "Revoke",
      act: async () => {
        const { status, body } = await remove(of(datasource, "keys", key.id));
        if (status === 202) notify(body.detail, true);
        else notify("The key is revoked: nothing more comes in with it.");
        await load();
      },
    });
  }

  // What a key let in since a time is taken away from every reader, after it was shown what that is.
  function quarantine(key) {
    const since = h("input", { type: "datetime-local", step: "60", max: localInput(new Date(Date.now() + 60_000)), value: localInput(new Date(Math.max(Date.now() - 86_400_000, Date.parse(key.created_at)))) });
    const preview = h("div", { class: "preview", "aria-live": "polite" });
    let isLooked = false;
    const at = () => new Date(since.value);
    const opened = formDialog("Quarantine what came in with a key", {
      wide: true,
      parts: [
        h("p", {}, `Every record that ${key.label || key.id} let in since this time is withheld from all readers. It is kept, and can be given back.`),
        field("Since", since),
        preview,
        h("p", {}, button("Give back what is withheld of this key", async () => {
          const { body } = await post(of(datasource, "keys", key.id, "quarantine"), { undo: true });
          opened.close();
          notify(`Given back to readers. ${plural(body.records, "record")} of this key remain in quarantine.`);
        }, { class: "quiet" })),
      ],
      submit: "Quarantine",
      isDangerous: true,
      isReady: () => isLooked,
      act: async () => {
        const { body } = await post(of(datasource, "keys", key.id, "quarantine"), { since: at().toISOString() });
        notify(`${plural(body.records, "record")} of ${plural(body.topics.length, "topic")} are in quarantine.`);
      },
    });
    async function look() {
      isLooked = false;
      opened.check();
      if (Number.isNaN(at().valueOf())) return;
      fill(preview, h("p", { class: "muted" }, "Looking …"));
      try {
        fill(preview, await previewOf(key, at()));
        isLooked = true;
      } catch (error) {
        fill(preview, h("p", { class: "trouble" }, error.message));
      }
      opened.check();
    }
    since.addEventListener("change", look);
    look();
  }

  async function previewOf(key, since) {
    if (datasource === "*") return h("p", {}, "Records of every datasource that this key let in are taken.");
    const page = await get(of(datasource, "records") + query({ key_id: key.id, from: since.toISOString(), order: "newest", limit: PREVIEW_MAX }));
    const { records } = page;
    if (!records.length && !page.next) return h("p", {}, "Nothing that is stored came in with it since then.");
    const topics = new Map();
    for (const { topic } of records) topics.set(topic, (topics.get(topic) ?? 0) + 1);
    const most = [...topics].sort((a, b) => b[1] - a[1]);
    return [
      h("p", {}, h("strong", {}, `${page.next ? "More than " : ""}${plural(records.length, "record")}`), ` of ${plural(topics.size, "topic")}, ${time(records.at(-1)?.received_at)} to ${time(records[0]?.received_at)}.`),
      table("Topics", [{ name: "Topic" }, { name: "Records", class: "value" }], most.slice(0, 5).map(([topic, n]) => ({ cells: [topic, count(n)] })), ""),
      h("p", { class: "muted" }, "The newest of them:"),
      table("Examples", [{ name: "Received" }, { name: "Topic" }, { name: "Payload" }], records.slice(0, 3).map((record) => ({ cells: [time(record.received_at), record.topic, payload(record)] })), ""),
    ];
  }

  reload();
  return { reload };
}

function nameOf(key) {
  const hasLimits = Object.keys(key.limits).length > 0;
  return h("div", {}, key.label ? h("div", {}, key.label) : null, h("code", {}, key.id), hasLimits ? h("small", {}, limitsList(key.limits, "")) : null);
}

function stateOf(key) {
  const badge = (words, kind) => h("span", { class: `badge ${kind}` }, words);
  if (key.state === "rotating") return h("div", {}, badge("retiring", "warn"), h("small", {}, ` ends ${until(key.grace_ends_at)}`));
  if (key.state === "expired") return badge("expired", "bad");
  return h("div", {}, badge("active", "good"), key.expires_at ? h("small", { title: key.expires_at }, ` expires ${until(key.expires_at)}`) : null);
}

function useOf(key) {
  const by = (user) => [user.transport, user.client_id, user.address].filter(Boolean).join(" · ");
  if (!key.last_used) return h("span", { class: "muted" }, "never");
  const others = key.users.slice(1);
  return h("div", {},
    h("div", {}, age(key.last_used.at), key.connections ? h("span", { class: "muted" }, `, ${plural(key.connections, "connection")}`) : null),
    h("small", {}, by(key.last_used)),
    others.length
      ? h("details", {}, h("summary", {}, plural(others.length, "other user")), h("ul", {}, others.map((user) => h("li", {}, `${by(user)}, ${age(user.at)}`))))
      : null);
}

function countsOf(key) {
  return h("div", {}, h("div", { class: "number" }, count(key.accepted)), key.refused ? h("small", { class: "trouble" }, `${count(key.refused)} refused`) : null);
}

