// Tabs, keys, search, light and dark.

const views = { phases, graph, experts, costs, remarks, timeline };

const search = {
  hits: [],
  at: -1,
  now: 0,

  /** Search the view; `move` goes to the first hit. */
  run(move = true) {
    const view = views[state.view];
    state.query = byId("search").value.trim().toLowerCase();
    this.hits = view.find ? view.find(state.query) : [];
    if (!state.query) this.hits = [];
    this.now = 0;
    this.at = -1;
    if (move) this.go(0);
    else this.say();
  },

  go(by) {
    const view = views[state.view];
    if (this.hits.length) {
      this.now = (this.now + by + this.hits.length) % this.hits.length;
      this.at = this.hits[this.now];
      view.reveal?.(this.at);
    } else view.refresh?.();
    this.say();
  },

  say() {
    const one = this.hits.length && views[state.view].reveal ? `${this.now + 1} of ` : "";
    byId("hits").textContent = state.query ? `${one}${this.hits.length}` : "";
  },
};

function show(name) {
  state.view = name;
  state.hint = views[name].hint;
  for (const tab of byId("tabs").children) tab.setAttribute("aria-selected", tab.dataset.view === name);
  byId("view").className = `view-${name}`;
  byId("view").setAttribute("aria-labelledby", `tab-${name}`);
  views[name].show(byId("view"));
  light(state.pinned);
  if (name !== "phases") search.run(false);
}

function makeTabs() {
  const tabs = Object.entries(views).map(([name, view], i) => el("button", {
    type: "button", role: "tab", id: `tab-${name}`, "data-view": name, "aria-controls": "view", onclick: () => show(name),
  }, el("kbd", { "aria-hidden": "true" }, String(i + 1)), view.title));
  byId("tabs").replaceChildren(...tabs);
  byId("view").setAttribute("role", "tabpanel");
}

/** The other of light and dark; the system's own until someone asks. */
function switchTheme() {
  const root = document.documentElement, isDark = getComputedStyle(root).colorScheme.includes("dark");
  root.dataset.theme = isDark ? "light" : "dark";
  try {
    localStorage.setItem("sparsec-theme", root.dataset.theme);
  } catch { /* a page from a file may have no storage */ }
  if (state.view === "experts" && experts.trace) experts.paint();
}

const KEYS = [
  ["1 – 6", "views"], ["j k, → ←", "next, previous pass that changed something"], ["n p", "next, previous change"],
  ["c", "changes only"], ["/", "search; Enter and Shift Enter go through hits"], ["click", "pin a line; again: its next op"], ["Esc", "let go"],
  ["e w", "graph: open all, close all"], ["+ −", "graph: zoom"], ["[ ]", "experts: layer"], ["g", "costs: group"],
  ["t", "light or dark"], ["?", "this"],
];

function makeHelp() {
  byId("keys").replaceChildren(el("h2", {}, "Keys"),
    el("dl", {}, ...KEYS.flatMap(([key, what]) => [el("dt", {}, ...key.split(" ").map((one) => (/^[–,]$|click/.test(one) ? ` ${one} ` : el("kbd", {}, one.replace(",", ""))))), el("dd", {}, what)])),
    el("form", { method: "dialog" }, el("button", {}, "Close")));
}

function step(by) {
  if (state.view === "timeline") {
    state.pass = clamp(state.pass + by, 0, state.data.passes.length - 1);
    return timeline.update();
  }
  if (state.view === "phases") return phases.step(by);
  const { passes } = state.data;
  let i = state.pass + by;
  while (passes[i] && !passes[i].changed) i += by;
  if (passes[i]) state.pass = i;
  if (state.view === "graph") graph.update();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
  const { key } = event, field = byId("search");
  if (event.target === field) {
    if (key === "Enter") search.go(event.shiftKey ? -1 : 1);
    else if (key === "Escape") {
      field.value = "";
      search.run();
      field.blur();
    } else return;
    return event.preventDefault();
  }
  if (event.target.tagName === "SELECT") return;
  const names = Object.keys(views), isList = event.target.classList?.contains("list");
  if (/^[1-9]$/.test(key) && names[key - 1]) show(names[key - 1]);
  else if (key === "j" || (key === "ArrowRight" && !isList)) step(1);
  else if (key === "k" || (key === "ArrowLeft" && !isList)) step(-1);
  else if (key === "/") field.select();
  else if (key === "t") switchTheme();
  else if (key === "?") byId("keys").showModal();
  else if (key === "Enter" && /^(BUTTON|g)$/.test(event.target.tagName)) return;
  else if (!views[state.view].key?.(key)) return;
  event.preventDefault();
}

async function start() {
  try {
    const theme = localStorage.getItem("sparsec-theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch { /* as above */ }
  state.data = await unpack(byId("data").textContent);
  state.data.texts.forEach((_, i) => i || textOf(0));
  state.pass = Math.max(0, state.data.passes.findIndex((pass, i) => i && pass.changed));
  makeTabs();
  makeHelp();
  byId("theme").addEventListener("click", switchTheme);
  byId("help").addEventListener("click", () => byId("keys").showModal());
  byId("search").addEventListener("input", () => search.run());
  document.addEventListener("keydown", onKey);
  window.addEventListener("resize", () => state.view === "experts" && experts.trace && experts.paint());
  if (state.data.notes.length || state.data.state === "failed") {
    document.querySelector(".top").after(el("p", { class: "notes", role: "status" }, state.data.notes.join(" · ") || "the run failed"));
  }
  show("phases");
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}

start().catch((error) => {
  byId("view").replaceChildren(empty("The page cannot show this dump", String(error)));
  throw error;
});
