// Limits of a datasource or of a key: what is set, and a form that sets and unsets them. They apply at once, also to
// clients that are held back.

import { request } from "./api.js";
import { button, field, h, notify, select } from "./dom.js";
import { formDialog } from "./dialogs.js";
import { count } from "./format.js";

const POLICIES = [["hold_back", "waits"], ["reject", "is refused"], ["quarantine", "goes into quarantine"]];

// Name, what it is, whether keys have it too, whether it is a rate.
const LIMITS = [
  ["messages_per_s", "Messages a second", true, true],
  ["bytes_per_s", "Bytes of payload a second", true, true],
  ["connections", "Connections at once", true, false],
  ["payload_bytes", "Bytes of one payload", true, false],
  ["topics", "Different topics", true, false],
  ["stored_age_s", "Stored for so many seconds", false, false],
  ["stored_bytes", "Bytes that are stored", false, false],
  ["keys", "Keys", false, false],
  ["sessions", "Lasting MQTT sessions", false, false],
  ["subscriptions", "Subscriptions", false, false],
  ["subscription_bytes", "Bytes of memory for subscriptions", false, false],
  ["share_groups", "Groups of shared subscriptions", false, false],
  ["inflight", "Unacknowledged messages to subscribers", false, false],
  ["retained_topics", "Topics with a retained message", false, false],
  ["retained_bytes", "Bytes of retained messages", false, false],
];

const nameOf = (limit) => LIMITS.find(([name]) => name === limit)?.[1] ?? limit;

// What is set, as a list.
export function limitsList(limits, none) {
  const set = Object.entries(limits ?? {}).filter(([, setting]) => setting !== null);
  if (!set.length) return h("p", { class: "muted" }, none);
  const words = ([limit, { max, burst, policy }]) => [
    h("code", {}, `${limit} = ${count(max)}`),
    burst && burst !== max ? `, ${count(burst)} at once` : "",
    policy === "quarantine" ? ", quarantine" : policy === "reject" && burst ? ", reject" : "",
  ];
  return h("ul", { class: "limits" }, set.map((entry) => h("li", { title: nameOf(entry[0]) }, words(entry))));
}

// A button that opens the form. `path` is that of the datasource or key, `limits()` gives what is set now.
export function limitsButton(path, { isKey, limits, whenSet, ...props }) {
  return button("Limits", () => limitsDialog(path, isKey, limits(), whenSet), props);
}

function limitsDialog(path, isKey, limits, whenSet) {
  const inputs = LIMITS.filter(([, , ofKeys]) => ofKeys || !isKey).map(([name, label, , isRate]) => {
    const setting = limits[name] ?? null;
    const number = (value) => h("input", { type: "text", inputmode: "numeric", autocomplete: "off", placeholder: "none", value: value ?? "" });
    const max = number(setting?.max);
    const burst = isRate ? number(setting && setting.burst !== setting.max ? setting.burst : null) : null;
    const policy = isRate ? select(POLICIES, setting?.policy ?? "hold_back") : null;
    const parts = [field(label, max, name)];
    if (isRate) parts.push(field("At once (burst)", burst, "one second's worth without"), field("What is over it", policy));
    return { name, setting, max, burst, policy, parts: isRate ? h("fieldset", { class: "limit" }, h("legend", {}, label), parts) : parts };
  });
  formDialog(isKey ? "Limits of the key" : "Limits of the datasource", {
    wide: true,
    parts: [h("p", { class: "muted" }, "They apply at once. Without a number there is none but the gateway's own."), h("div", { class: "limit-fields" }, inputs.map(({ parts }) => parts))],
    submit: "Set limits",
    isReady: () => inputs.every(({ max, burst }) => [max, burst].every((input) => !input || isWhole(input.value))),
    act: async () => {
      const changed = Object.fromEntries(inputs.map((of) => [of.name, wanted(of)]).filter(([, setting]) => setting !== undefined));
      if (Object.keys(changed).length) {
        const { body } = await request("PATCH", path, { limits: changed });
        notify("The limits apply.");
        whenSet(body.limits);
      }
    },
  });
}

const isWhole = (text) => text.trim() === "" || /^[1-9][0-9]*$/.test(text.trim());

// What a change has to say of a limit: nothing, null to take it away, or its setting.
function wanted({ setting, max, burst, policy }) {
  const number = (input) => (input && input.value.trim() ? Number(input.value.trim()) : null);
  if (number(max) === null) return setting ? null : undefined;
  const next = { max: number(max) };
  if (policy) Object.assign(next, { burst: number(burst) ?? next.max, policy: policy.value });
  const isSame = setting && Object.entries(next).every(([member, value]) => setting[member] === value);
  return isSame ? undefined : next;
}
