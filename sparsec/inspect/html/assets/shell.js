// Tabs, keys, search, light and dark: what every page has around its views.

/** The page: views, keys for the help, and what it does when it begins, changes its view or its colours, or steps. */
let app;

const search = {
  hits: [],
  at: -1,
  now: 0,

  /** Search the view; `move` goes to the first hit. */
  run(move = true) {
    const view = app.views[state.view];
    state.query = byId("search").value.trim().toLowerCase();
    this.hits = view.find ? view.find(state.query) : [];
    if (!state.query) this.hits = [];
    this.now = 0;
    this.at = -1;
    if (move) this.go(0);
    else this.say();
  },

  go(by) {
    const view = app.views[state.view];
    if (this.hits.length) {
      this.now = (this.now + by + this.hits.length) % this.hits.length;
      this.at = this.hits[this.now];
      view.reveal?.(this.at);
    } else view.refresh?.();
    this.say();
  },

  say() {
    const one = this.hits.length && app.views[state.view].reveal ? `${this.now + 1} of ` : "";
    byId("hits").textContent = state.query ? `${one}${this.hits.length}` : "";
  },
};

function show(name) {
  state.view = name;
  state.hint = app.views[name].hint;
  for (const tab of byId("tabs").children) tab.setAttribute("aria-selected", tab.dataset.view === name);
  byId("view").className = `view-${name}`;
  byId("view").setAttribute("aria-labelledby", `tab-${name}`);
  app.views[name].show(byId("view"));
  app.shown(name);
}

function makeTabs() {
  const tabs = Object.entries(app.views).map(([name, view], i) => el("button", {
    type: "button", role: "tab", id: `tab-${name}`, "data-view": name, "aria-controls": "view", onclick: () => show(name),
  }, el("kbd", { "aria-hidden": "true" }, String(i + 1)), view.title));
  byId("tabs").replaceChildren(...tabs);
  byId("view").setAttribute("role", "tabpanel");
}

/** The other of light and dark; the system's own until someone asks. */
function switchTheme() {
  const root = document.documentElement, now = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
  try {
    localStorage.setItem("sparsec-theme", root.dataset.theme);
  } catch { /* a page from a file may have no storage */ }
  app.repaint();
}

function makeHelp() {
  byId("keys").replaceChildren(el("h2", {}, "Keys"),
    el("dl", {}, ...app.keys.flatMap(([key, what]) => [el("dt", {}, ...key.split(" ").map((one) => (/^[–,]$|click/.test(one) ? ` ${one} ` : el("kbd", {}, one.replace(",", ""))))), el("dd", {}, what)])),
    el("form", { method: "dialog" }, el("button", {}, "Close")));
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
  const names = Object.keys(app.views), isList = event.target.classList?.contains("list");
  if (/^[1-9]$/.test(key) && names[key - 1]) show(names[key - 1]);
  else if (key === "j" || (key === "ArrowRight" && !isList)) app.step(1);
  else if (key === "k" || (key === "ArrowLeft" && !isList)) app.step(-1);
  else if (key === "/") field.select();
  else if (key === "t") switchTheme();
  else if (key === "?") byId("keys").showModal();
  else if (key === "Enter" && /^(BUTTON|g)$/.test(event.target.tagName)) return;
  else if (!app.views[state.view].key?.(key)) return;
  event.preventDefault();
}

/** Read the data, and show the first view. */
async function launch(page) {
  app = page;
  try {
    const theme = localStorage.getItem("sparsec-theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch { /* as above */ }
  try {
    state.data = await unpack(byId("data").textContent);
    app.begin();
    makeTabs();
    makeHelp();
    byId("theme").addEventListener("click", switchTheme);
    byId("help").addEventListener("click", () => byId("keys").showModal());
    byId("search").addEventListener("input", () => search.run());
    document.addEventListener("keydown", onKey);
    window.addEventListener("resize", () => app.repaint());
    const notes = app.notes();
    if (notes) document.querySelector(".top").after(el("p", { class: "notes", role: "status" }, notes));
    show(Object.keys(app.views)[0]);
    document.documentElement.dataset.ready = String(Math.round(performance.now()));
  } catch (error) {
    byId("view").replaceChildren(empty("The page cannot be shown", String(error)));
    throw error;
  }
}
