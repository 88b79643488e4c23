// Elements, made of text: no string ever becomes markup here, so that nothing that a device sends can.

// An element. Of `props`, functions are listeners (`onclick`), `true` is an attribute without a value, and `false`, null
// and undefined are left out. Children are elements, texts, or lists of them.
export function h(name, props, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(props ?? {})) {
    if (value === false || value === null || value === undefined) continue;
    if (typeof value === "function") made.addEventListener(key.slice(2), value);
    else if (key === "value") made.value = value;
    else made.setAttribute(key, value === true ? "" : String(value));
  }
  put(made, children);
  return made;
}

function put(parent, children) {
  for (const child of children) {
    if (child === null || child === undefined || child === false) continue;
    if (Array.isArray(child)) put(parent, child);
    else parent.append(child instanceof Node ? child : String(child));
  }
}

// Replaces what an element holds.
export function fill(parent, ...children) {
  parent.replaceChildren();
  put(parent, children);
  return parent;
}

// As `fill`, for what is drawn again and again: who was at a button there is at the one that takes its place.
export function refill(parent, ...children) {
  const at = parent.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
  fill(parent, ...children);
  if (at) [...parent.querySelectorAll("[aria-label]")].find((made) => made.getAttribute("aria-label") === at)?.focus({ preventScroll: true });
  return parent;
}

// An element of SVG.
export function svg(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes ?? {})) made.setAttribute(key, String(value));
  made.append(...children);
  return made;
}

// Sets a text, if it is another one.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// A button. While what it does is under way it cannot be pressed again.
export function button(label, act, props) {
  const made = h("button", { type: "button", ...props }, label);
  made.addEventListener("click", async () => {
    made.disabled = true;
    try {
      await act(made);
    } catch (error) {
      notify(error.message, true);
    } finally {
      made.disabled = false;
    }
  });
  return made;
}

// A table whose cells have their column's name with them, so that a narrow screen shows each row as a card.
export function table(caption, columns, rows, empty) {
  if (!rows.length) return h("p", { class: "empty" }, empty);
  const head = h("tr", {}, columns.map((column) => h("th", { scope: "col", class: column.class }, column.name || h("span", { class: "hidden" }, "Actions"))));
  const body = rows.map((row) =>
    h("tr", { class: row.class }, columns.map((column, i) =>
      h("td", { class: column.class, "data-label": column.name }, row.cells[i]))));
  return h("div", { class: "table" },
    h("table", {}, h("caption", { class: "hidden" }, caption), h("thead", {}, head), h("tbody", {}, body)));
}

// A field with its label.
export function field(label, input, hint) {
  const id = `f${(field.count = (field.count ?? 0) + 1)}`;
  input.id = id;
  const note = hint ? h("small", { id: `${id}h` }, hint) : null;
  if (note) input.setAttribute("aria-describedby", `${id}h`);
  return h("div", { class: "field" }, h("label", { for: id }, label), input, note);
}

// A choice among a few, as [value, label] pairs.
export function select(options, value, onchange) {
  const made = h("select", { onchange: () => onchange?.(made.value) },
    options.map(([of, label]) => h("option", { value: of }, label)));
  if (value !== undefined && value !== null) made.value = value;
  return made;
}

// Says something at the edge of the page. What went wrong stays until it is dismissed.
export function notify(words, isTrouble = false) {
  const place = document.getElementById("notices");
  const note = h("div", { class: isTrouble ? "notice trouble" : "notice" },
    h("span", {}, words),
    h("button", { type: "button", class: "quiet", "aria-label": "Dismiss", onclick: () => note.remove() }, "✕"));
  place.append(note);
  while (place.children.length > 4) place.firstChild.remove();
  if (!isTrouble) setTimeout(() => note.remove(), 5000);
}
