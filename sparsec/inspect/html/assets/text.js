// The text of a module: lines, where each comes from, and the ops of @main. A `loc` line holds for the ops after it.

const LOC = /^\s*loc "([^"]*)":(\d+)(?: in "([^"]*)")?(?: fused \[(.*?)\])?(?:  \/\/ ?(.*))?$/;
const PLACE = /"([^"]*)":(\d+)/g;
const OP = /^ {2}(?:(%[^=]*?) = )?([\w$]+(?:\.[\w$]+)+)\((.*)$/;
const FUNC = /^func @("[^"]*"|[\w.$]+)\(/;
const TOKEN = /("(?:[^"\\]|\\.)*")|(%[\w.$-]+)|(@[\w.$]+)|\b((?:tensor|sym)<[^>]*>)|(\b[a-z_]\w*(?:\.[A-Za-z_]\w*)+(?=\())|(\b(?:module|func|return|yield)\b)|(\b-?\d+(?:\.\d+)?(?:e[+-]?\d+)?\b)/g;
const KINDS = ["string", "value", "symbol", "type", "op", "word", "number"];

/** The user's lines, each known by a number. */
const places = { byName: new Map(), all: [] };

function placeId(file, line, source) {
  const name = `${file}:${line}`;
  let id = places.byName.get(name);
  if (id === undefined) {
    id = places.all.length;
    places.byName.set(name, id);
    places.all.push({ id, file, line: Number(line), source: "" });
  }
  if (source && !places.all[id].source) places.all[id].source = source.trim();
  return id;
}

const parsed = new Map();

/** Text number `index` of the dump, read once. */
function textOf(index) {
  if (index < 0) return null;
  if (!parsed.has(index)) parsed.set(index, readText(state.data.texts[index]));
  return parsed.get(index);
}

/**
 * Lines, and for each the places it comes from (`keys`, null where unknown) and the module it ran in (`scopes`);
 * `ops`: those directly in @main; `funcs`: name -> [first line, one past the last]; `width` of the longest line.
 */
function readText(text) {
  const lines = text.split("\n");
  if (lines.at(-1) === "") lines.pop();
  const keys = [], scopes = [], ops = [], funcs = new Map(), saved = [];
  let here = null, scope = "", func = "", start = 0, width = 0;
  lines.forEach((line, i) => {
    width = Math.max(width, line.length);
    const body = line.trimStart(), indent = line.length - body.length;
    let found;
    while (saved.length && saved.at(-1)[0] >= indent && body.startsWith("}")) [, here, scope] = saved.pop();
    if (body.startsWith("loc ")) {
      if ((found = LOC.exec(line))) {
        here = [placeId(found[1], found[2], found[5])];
        for (const other of (found[4] || "").matchAll(PLACE)) here.push(placeId(other[1], other[2]));
        here = [...new Set(here)];
        scope = found[3] || "";
      } else [here, scope] = [null, ""];
    } else if (indent === 0) {
      if ((found = FUNC.exec(line))) [func, start, here, scope] = [found[1].replaceAll('"', ""), i, null, ""];
      else if (body === "}" && func) {
        funcs.set(func, [start, i + 1]);
        func = "";
      }
    } else if (func === "main" && indent === 2 && (found = OP.exec(line))) {
      ops.push(readOp(found, i, here, scope));
    }
    keys.push(func && body !== "}" && !FUNC.test(line) ? here : null);
    scopes.push(scope);
    if (indent && body.endsWith("{")) saved.push([indent, here, scope]);
  });
  return { lines, keys, scopes, ops, funcs, width: Math.min(width, 400) };
}

function readOp([, results, name, rest], line, keys, scope) {
  const end = rest.indexOf(")"), tail = rest.slice(end + 1);
  const callee = /callee = "([^"]*)"/.exec(tail);
  const type = /(?:^|[}\s]) ?: (.*?)(?: \{)?$/.exec(tail);
  return {
    line, name, keys, scope,
    results: (results || "").match(/%[\w.$-]+/g) || [],
    operands: rest.slice(0, end).match(/%[\w.$-]+/g) || [],
    callee: callee ? callee[1] : "",
    type: type ? type[1] : "",
  };
}

/** A line with its tokens in colour; what is searched is marked. */
function tokens(line, query) {
  const parts = [], at = query ? line.toLowerCase().indexOf(query) : -1;
  if (at >= 0) {
    return [...tokens(line.slice(0, at), ""), el("mark", {}, line.slice(at, at + query.length)),
      ...tokens(line.slice(at + query.length), "")];
  }
  let last = 0;
  for (const found of line.slice(0, 4000).matchAll(TOKEN)) {
    if (found.index > last) parts.push(line.slice(last, found.index));
    const kind = found.slice(1).findIndex((group) => group !== undefined);
    parts.push(el("span", { class: `t-${KINDS[kind]}` }, found[0]));
    last = found.index + found[0].length;
  }
  parts.push(line.slice(last, 4000));
  return parts;
}

/** A `loc` line as people read it: module, file and line, the source. */
function locTokens(line) {
  const found = LOC.exec(line);
  if (!found) return [line];
  const indent = line.length - line.trimStart().length;
  return [" ".repeat(indent), el("span", { class: "t-scope" }, found[3] || ""), "  ",
    el("span", { class: "t-place" }, `${basename(found[1])}:${found[2]}`), "  ",
    el("span", { class: "t-source" }, (found[5] || "").trim())];
}

/** Light every row in sight that comes from place `key`. */
function light(key) {
  state.key = key;
  for (const row of document.querySelectorAll("[data-keys]")) {
    const isLit = key >= 0 && row.dataset.keys.split(" ").includes(String(key));
    row.classList.toggle("lit", isLit);
    row.classList.toggle("pin", isLit && key === state.pinned);
  }
  const place = places.all[key];
  byId("status").replaceChildren(...(place ? [
    el("b", {}, `${basename(place.file)}:${place.line}`), el("code", {}, place.source), el("span", { class: "dim" }, place.file),
  ] : [state.hint || ""]));
}

/** Rows with places light up under the pointer, and stay lit when clicked. */
function linked(host, pick) {
  const key = (event) => {
    const row = event.target.closest?.("[data-keys]");
    return row && row.dataset.keys ? Number(row.dataset.keys.split(" ")[0]) : -1;
  };
  host.addEventListener("pointerover", (event) => {
    if (state.pinned < 0) light(key(event));
  });
  host.addEventListener("pointerleave", () => {
    if (state.pinned < 0) light(-1);
  });
  host.addEventListener("click", (event) => {
    const chosen = key(event);
    if (chosen >= 0) pick(chosen);
  });
}
