// The session: a key is exchanged once for a cookie that no script can read. The key itself is kept nowhere.

import { request, useProof } from "./api.js";
import { field, fill, h } from "./dom.js";

let present = null;

// The session that there is, or null.
export const current = () => present;

export function mayManage(datasource) {
  const key = present?.key;
  return Boolean(key?.scopes.includes("admin") && (key.datasource === "*" || key.datasource === datasource));
}

export const isGatewayAdmin = () => mayManage("*");

function take(answer) {
  present = answer.body;
  useProof(present.csrf);
  return present;
}

export async function resume() {
  const answer = await request("GET", "/v1/session");
  return answer.status === 204 ? null : take(answer);
}

async function begin(key) {
  return take(await request("POST", "/v1/session", undefined, { Authorization: `Bearer ${key}` }));
}

export async function end() {
  try {
    await request("DELETE", "/v1/session");
  } finally {
    present = null;
  }
}

export function forget() {
  present = null;
}

// The form that signs in; `words` say why there is one.
export function signIn(main, words, whenIn) {
  const key = h("input", {
    type: "password", name: "key", autocomplete: "current-password", required: true, spellcheck: "false",
    autocapitalize: "off", placeholder: "hgk_…",
  });
  const trouble = h("p", { class: "trouble", role: "alert" }, words ?? "");
  const submit = h("button", { class: "primary" }, "Sign in");
  const form = h("form", { class: "signin", novalidate: true },
    h("h1", {}, "Headgate"),
    h("p", { class: "muted" }, "Sign in with an API key that may read (subscribe) or manage (admin)."),
    // A password manager keeps what has a name.
    h("input", { type: "text", name: "username", value: "headgate", autocomplete: "username", class: "hidden", tabindex: "-1", "aria-hidden": "true", readonly: true }),
    field("API key", key, "The first one is in the file admin.key of the data directory."),
    trouble, submit);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const given = key.value.trim();
    if (!given) {
      fill(trouble, "Paste an API key first.");
      key.focus();
      return;
    }
    submit.disabled = true;
    fill(trouble);
    try {
      const session = await begin(given);
      key.value = "";
      await whenIn(session);
    } catch (error) {
      fill(trouble, explain(error));
      key.select();
    } finally {
      submit.disabled = false;
    }
  });
  fill(main, form);
  key.focus();
}

function explain(error) {
  if (error.status === 403) return "This key may only publish. Use one with the scope subscribe or admin.";
  if (error.status === 401) return "This key is not valid here: it may be mistyped, revoked or expired, or of another gateway.";
  return error.message;
}
