// Elements, numbers, data. Texts of a dump enter the page as text nodes only.

const SVG = "http://www.w3.org/2000/svg";

/** An element with properties (class, on..., data-..., aria-...) and children: elements, or texts. */
function el(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** The same, of SVG. */
function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(node, props, children) {
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "style") Object.assign(node.style, value);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

const byId = (id) => document.getElementById(id);
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
const sum = (values) => values.reduce((total, value) => total + value, 0);

/** A number in three digits with its prefix: 2.41 M. */
function quantity(value, unit = "") {
  for (const [prefix, scale] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (value >= scale) return `${digits(value / scale)} ${prefix}${unit}`;
  }
  return `${digits(value)}${unit ? " " + unit : ""}`;
}

function digits(value) {
  if (value === 0) return "0";
  const shown = value >= 100 ? value.toFixed(0) : value.toPrecision(3);
  return shown.includes(".") && !shown.includes("e") ? shown.replace(/\.?0+$/, "") : shown;
}

function micros(us) {
  if (!us) return "–";
  for (const [unit, scale] of [["s", 1e6], ["ms", 1e3], ["µs", 1]]) {
    if (us >= scale) return `${digits(us / scale)} ${unit}`;
  }
  return `${digits(us * 1e3)} ns`;
}

const grouped = (value) => Math.round(value).toLocaleString("en-US");
const percent = (value) => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
const basename = (path) => path.slice(path.lastIndexOf("/") + 1);

/** The dump: base64 of zlib of JSON. */
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text.trim()), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

/** What is shown and chosen; views read it and call `changed`. */
const state = { data: null, pass: 0, view: "phases", key: -1, pinned: -1, query: "" };

/** An empty view says what would fill it. */
function empty(title, ...lines) {
  return el("div", { class: "empty" }, el("h2", {}, title), ...lines.map((line) => el("p", {}, line)));
}

/** Buttons of which one is on. */
function choice(label, options, value, pick) {
  const group = el("div", { class: "choice", role: "group", "aria-label": label });
  for (const [key, text] of options) {
    const press = () => {
      for (const other of group.children) other.setAttribute("aria-pressed", other === button);
      pick(key);
    };
    const button = el("button", { type: "button", "aria-pressed": String(key === value), onclick: press }, text);
    group.append(button);
  }
  return group;
}
