// The schema of a datasource: what was seen, what is enforced, and setting it.

import { get, of, put } from "./api.js";
import { button, field, fill, h, notify } from "./dom.js";
import { plural } from "./format.js";
import { mayManage } from "./session.js";

export function schemaPanel(place, datasource) {
  const enforced = h("div", {});
  const inferred = h("div", {});
  const editor = h("textarea", { rows: "14", spellcheck: "false", autocapitalize: "off", class: "code" });
  const trouble = h("p", { class: "trouble", role: "alert" });
  const form = mayManage(datasource)
    ? h("form", { class: "panel" }, h("h2", {}, "Set"),
      h("p", { class: "muted" }, "A list of schemas (JSON Schema 2020-12), each for a topic filter; the first that matches a message's topic counts. An empty list enforces none. It holds for every message once it is set; what fails goes into quarantine."),
      field("Schemas", editor),
      trouble,
      h("div", { class: "actions" }, h("button", { class: "primary" }, "Set the schemas")))
    : null;
  fill(place, h("div", { class: "columns" },
    h("div", { class: "body" }, h("section", { class: "panel" }, h("h2", {}, "Enforced"), enforced), form),
    h("section", { class: "panel" }, h("h2", {}, "Inferred"), inferred)));

  form?.addEventListener("submit", async (event) => {
    event.preventDefault();
    fill(trouble);
    try {
      const schemas = parse(editor.value);
      await put(of(datasource, "schema"), { schemas });
      notify(schemas.length ? "The schemas are set." : "No schema is enforced any more.");
      await load();
    } catch (error) {
      fill(trouble, error.message);
    }
  });

  const show = (json) => JSON.stringify(json, null, 2);

  async function load() {
    const answer = await get(of(datasource, "schema"));
    fill(enforced, answer.enforced.length
      ? answer.enforced.map((rule) => [h("h3", {}, h("code", {}, rule.filter), h("small", {}, ` version ${rule.version}`)), h("pre", { tabindex: "0" }, show(rule.schema))])
      : h("p", { class: "empty" }, "None: every payload is let in."));
    const written = answer.enforced.map(({ filter, schema }) => ({ filter, schema }));
    if (form && !editor.value.trim()) editor.value = show(written);
    const propose = (schemas) => button("Use it", () => {
      editor.value = show(schemas);
      editor.focus();
      editor.scrollIntoView({ block: "center" });
    });
    const seen = `From ${plural(answer.records, "record")}${answer.not_json ? `, ${answer.not_json} of them no JSON` : ""}.`;
    fill(inferred, answer.records
      ? [h("p", { class: "muted" }, seen),
        answer.by_topic?.length
          ? answer.by_topic.map((rule) => [h("h3", {}, h("code", { class: "wrap" }, rule.filter)), h("pre", { tabindex: "0" }, show(rule.schema))])
          : h("pre", { tabindex: "0" }, show(answer.inferred)),
        form ? propose(answer.by_topic?.length ? answer.by_topic : [{ filter: "#", schema: answer.inferred }]) : null]
      : h("p", { class: "empty" }, "Nothing was seen yet."));
  }

  load().catch((error) => {
    if (error.status !== 401) notify(error.message, true);
  });
  return {};
}

function parse(text) {
  let schemas;
  try {
    schemas = JSON.parse(text.trim() || "[]");
  } catch (error) {
    throw new Error(`This is no JSON: ${error.message}`);
  }
  if (!Array.isArray(schemas)) return [{ filter: "#", schema: schemas }];
  return schemas;
}
