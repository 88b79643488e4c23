// Who is connected over MQTT, and the sessions of those that are away: how far behind each is, and its way out.

import { get, of, post, query } from "./api.js";
import { button, fill, h, notify, refill, table } from "./dom.js";
import { confirm } from "./dialogs.js";
import { age, count, until } from "./format.js";

export function clientsPanel(place, datasource) {
  const list = h("div", {}, h("p", { class: "muted" }, "…"));
  fill(place, h("div", { class: "panel-head" }, h("h2", {}, "MQTT clients")), list);

  async function load() {
    const [{ sessions, next }, { keys }] = await Promise.all([
      get(of(datasource, "sessions") + query({ publishers: true, limit: 500 })),
      get(of(datasource, "keys")),
    ]);
    // Which key each was seen with last.
    const uses = new Map();
    for (const key of keys) {
      for (const user of key.users) {
        const known = uses.get(user.client_id);
        if (user.client_id && user.transport === "mqtt" && (!known || known.at < user.at)) uses.set(user.client_id, { ...user, key });
      }
    }
    sessions.sort((a, b) => Number(b.connected) - Number(a.connected) || a.client_id.localeCompare(b.client_id));
    refill(list, table("Clients", [
      { name: "Client" }, { name: "State" }, { name: "Key" }, { name: "Behind", class: "value" }, { name: "In flight", class: "value" }, { name: "", class: "act" },
    ], sessions.map((session) => {
      const use = uses.get(session.client_id);
      return {
        cells: [
          h("div", {}, h("span", { class: "wrap" }, session.client_id), use?.address ? h("div", {}, h("small", {}, use.address)) : null),
          stateOf(session),
          use ? h("div", {}, h("code", {}, use.key.id), h("div", {}, h("small", {}, `used ${age(use.at)}`))) : h("span", { class: "muted" }, "–"),
          session.subscriber ? count(session.behind) : h("span", { class: "muted" }, "–"),
          session.subscriber ? count(session.in_flight) : h("span", { class: "muted" }, "–"),
          session.connected ? button("Disconnect", () => disconnect(session), { class: "danger", "aria-label": `Disconnect ${session.client_id}` }) : "",
        ],
      };
    }), "Nobody is connected over MQTT, and no session waits for its client."),
    next ? h("p", { class: "muted" }, "Only the first 500 are shown.") : null);
  }

  function disconnect(session) {
    confirm("Disconnect the client", {
      words: [`The connection of ${session.client_id} is closed now.`, "Most clients come back by themselves: revoke the key to keep one out."],
      submit: "Disconnect",
      act: async () => {
        await post(of(datasource, "sessions", session.client_id, "disconnect"));
        notify("The connection is closed.");
        await load();
      },
    });
  }

  const reload = () => load().catch((error) => {
    if (error.status !== 401) notify(error.message, true);
  });
  reload();
  return { reload };
}

function stateOf(session) {
  const badge = (words, kind) => h("span", { class: `badge ${kind}` }, words);
  if (!session.connected) return h("div", {}, badge("away", "plain"), h("small", {}, session.expires_at ? ` session ends ${until(session.expires_at)}` : " session kept"));
  return h("div", {}, badge("connected", "good"),
    session.still_since ? h("small", { class: "trouble" }, ` stands still for ${age(session.still_since).replace(" ago", "")}`) : h("small", {}, session.subscriber ? " subscriber" : " publisher"));
}
