// Dialogs: asking before something is done that cannot be undone, and showing a key, which is shown once.

import { button, field, fill, h, notify } from "./dom.js";

// Opens a dialog; returns it with what closes it. `mayCancel` false: Escape does not lose what is in it.
export function dialog(title, content, { mayCancel = true, wide = false } = {}) {
  const before = document.activeElement;
  const heading = h("h2", { id: "dialog-title" }, title);
  const made = h("dialog", { "aria-labelledby": "dialog-title", class: wide ? "wide" : null, "data-kept": mayCancel ? null : "" }, heading, content);
  made.addEventListener("cancel", (event) => {
    if (!mayCancel) event.preventDefault();
  });
  made.addEventListener("close", () => {
    made.remove();
    if (before?.isConnected) before.focus();
  });
  document.body.append(made);
  made.showModal();
  return { element: made, close: () => made.close() };
}

// A form in a dialog. `act` gets what is typed when it is submitted, and closes the dialog unless it fails.
export function formDialog(title, { parts, submit, isDangerous = false, isReady = () => true, act, wide }) {
  const trouble = h("p", { class: "trouble", role: "alert" });
  const ok = h("button", { class: isDangerous ? "danger" : "primary" }, submit);
  const form = h("form", { novalidate: true }, parts, trouble,
    h("div", { class: "actions" }, h("button", { type: "button", onclick: () => opened.close() }, "Cancel"), ok));
  const check = () => {
    ok.disabled = !isReady();
  };
  form.addEventListener("input", check);
  form.addEventListener("change", check);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (!isReady()) return;
    ok.disabled = true;
    fill(trouble);
    try {
      await act(opened);
      opened.close();
    } catch (error) {
      fill(trouble, error.message);
      check();
    }
  });
  const opened = dialog(title, form, { wide });
  check();
  return { ...opened, check };
}

// Asks whether to do something; with `word` only once that was typed.
export function confirm(title, { words, word, submit, act, more }) {
  const typed = h("input", { type: "text", autocomplete: "off", spellcheck: "false", autocapitalize: "off" });
  formDialog(title, {
    parts: [
      [words].flat().map((line) => h("p", {}, line)),
      more,
      word ? field(`Type ${word} to confirm`, typed) : null,
    ],
    submit,
    isDangerous: true,
    isReady: () => !word || typed.value.trim() === word,
    act,
  });
}

// A button that copies a text.
export function copyButton(text, label = "Copy") {
  return button(label, async (pressed) => {
    if (!(await copy(text))) {
      notify("The browser does not let this page copy: select the text and copy it.", true);
      return;
    }
    fill(pressed, "Copied");
    setTimeout(() => fill(pressed, label), 1500);
  }, { class: "copy" });
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Over HTTP browsers have no clipboard but this one.
    const place = h("textarea", { class: "hidden", "aria-hidden": "true", tabindex: "-1", value: text });
    (document.querySelector("dialog[open]") ?? document.body).append(place);
    place.select();
    const isDone = document.execCommand("copy");
    place.remove();
    return isDone;
  }
}

const LINE_NAMES = {
  mosquitto_pub: "MQTT: mosquitto_pub",
  curl: "HTTP: curl",
  python: "MQTT: Python",
  nats: "NATS",
  latest: "Read the newest values: curl",
};

// Shows a new key and the lines that connect with it. It is not shown again, so that it closes only when that was read.
export function showSecret(title, key, connect, whenDone = () => {}) {
  const stored = h("input", { type: "checkbox", id: "stored" });
  const done = h("button", { type: "button", class: "primary", disabled: true }, "Done");
  stored.addEventListener("change", () => {
    done.disabled = !stored.checked;
  });
  const lines = Object.entries(connect ?? {}).map(([name, line]) =>
    h("div", { class: "line" }, h("div", { class: "line-head" }, h("h3", {}, LINE_NAMES[name] ?? name), copyButton(line)), h("pre", { tabindex: "0" }, line)));
  const content = h("div", {},
    h("p", {}, "This is the only time that the key is shown. Store it where your device or program reads it."),
    h("div", { class: "secret" }, h("code", { id: "secret" }, key.secret), copyButton(key.secret, "Copy key")),
    lines.length
      ? [h("h3", { class: "apart" }, "Connect"),
        h("p", { class: "muted" }, "The lines read the key from HEADGATE_API_KEY, so that it gets into no history. In a shell, this asks for it:"),
        h("div", { class: "line" }, h("div", { class: "line-head" }, h("h3", {}, "Set the key"), copyButton("read -rs HEADGATE_API_KEY && export HEADGATE_API_KEY")), h("pre", { tabindex: "0" }, "read -rs HEADGATE_API_KEY && export HEADGATE_API_KEY")),
        lines]
      : null,
    h("div", { class: "actions" }, h("label", { class: "check", for: "stored" }, stored, " I have stored the key"), done));
  const opened = dialog(title, content, { mayCancel: false, wide: true });
  done.addEventListener("click", () => {
    opened.close();
    whenDone();
  });
}
