// Rows between ranks, or nodes: what a pick sends where, when tokens start on all ranks alike.

const traffic = {
  title: "Traffic",
  hint: "hover a link · click keeps a rank · p policy · n ranks or nodes · s S traffic",
  policy: "static",
  by: "rank",

  show(host) {
    const { traffic: found } = state.data, pick = (name) => (value) => {
      this[name] = value;
      this.update();
    };
    this.chart = new Chart("Rows between ranks: a row for where they leave, a column for where they arrive",
      (from, to) => this.point(from, to), (from, to) => {
        state.pinnedLink = state.pinnedLink?.[0] === from && state.pinnedLink?.[1] === to ? null : [from, to];
        this.rest();
      });
    state.pinnedLink = null;
    this.levels = found.single && state.data.nodes > 1 ? [["rank", "Ranks"], ["node", "Nodes"]] : [["rank", found.single ? "Ranks" : found.names[0].startsWith("node") ? "Nodes" : "Blocks of ranks"]];
    if (this.levels.length === 1) this.by = "rank";
    this.title_ = el("h2");
    this.side = el("section", { class: "side" });
    host.replaceChildren(el("div", { class: "page" },
      el("div", { class: "bar" }, scenarioChoice(() => this.update()),
        choice("Policy", [["static", "By shares"], ["local", "Near replicas first"]], this.policy, pick("policy")), choice("Level", this.levels, this.by, pick("by"))),
      this.title_, el("div", { class: "sides" }, this.chart.host, this.side)));
    this.update();
  },

  /** Cells in millionths of what a pair of ranks has when all pairs are alike; sizes and nodes of the groups. */
  matrix() {
    const { traffic: found } = state.data, { size, node, names } = found;
    const whole = this.policy === "static" ? size.map((ranks) => found.static[state.scenario].map((cell) => cell * ranks)) : found.local[state.scenario];
    if (this.by === "rank") return { cells: whole, size, node, names };
    const nodes = Math.max(...node) + 1, cells = Array.from({ length: nodes }, () => new Array(nodes).fill(0)), sizes = new Array(nodes).fill(0);
    whole.forEach((row, from) => {
      sizes[node[from]] += size[from];
      row.forEach((cell, to) => (cells[node[from]][node[to]] += cell));
    });
    return { cells, size: sizes, node: sizes.map((_, i) => i), names: sizes.map((_, i) => `node ${i}`) };
  },

  update() {
    this.found = this.matrix();
    const { names } = this.found;
    this.title_.replaceChildren(`${names[0].split(" ")[0] === "rank" ? "Rank to rank" : names[0].startsWith("node") ? "Node to node" : "Block to block"} `,
      el("small", {}, "rows leave on the left, arrive below; 1 is what each would get if all were alike; mean of the layers, without deduplication"));
    this.paint();
    this.table();
  },

  paint() {
    const { cells, size, names, node } = this.found, { map } = this.chart, room = this.chart.host.closest(".page").clientWidth - 48;
    const ratio = (from, to) => cells[from][to] / (1000 * size[from] * size[to]), high = Math.max(420, window.innerHeight - 260);
    map.size(names.length, names.length, Math.min(high, room - 60), high, [2, 60], [2, 60]);
    map.cellW = map.cellH = Math.min(map.cellW, map.cellH);
    let top = 0;
    cells.forEach((row, from) => row.forEach((_, to) => (top = Math.max(top, ratio(from, to)))));
    const look = loadLook(map, top), short = names.map((name) => name.split(" ")[1]);
    map.paint((from, to) => look(ratio(from, to)));
    this.chart.axes(short, short, nodeBreaks({ node }).filter(() => this.by === "rank"));
    this.rest();
  },

  rest() {
    this.chart.mark(...(state.pinnedLink || [-1, -1]));
    if (state.pinnedLink) this.tell(...state.pinnedLink);
    else say(state.hint);
  },

  /** Rows of one pick. */
  rows(from, to) {
    return this.found.cells[from][to] / (1e6 * state.data.ranks ** 2);
  },

  amount(rows) {
    const { row_bytes } = state.data;
    return `${digits(1e6 * rows)} rows${row_bytes ? `, ${quantity(1e6 * rows * row_bytes, "B")}` : ""} per million picks`;
  },

  point(from, to) {
    if (to < 0) return this.rest();
    this.chart.mark(from, to);
    this.tell(from, to);
  },

  tell(from, to) {
    const { names, size, cells } = this.found;
    say(el("b", {}, `${names[from]} → ${names[to]}`), `${this.amount(this.rows(from, to))}, ${times(cells[from][to] / (1000 * size[from] * size[to]))} the mean`);
  },

  table() {
    const { cells, names, node } = this.found, single = this.by === "rank" && state.data.traffic.single, kinds = { own: 0, inside: 0, outside: 0 };
    const links = [], into = new Array(names.length).fill(0);
    cells.forEach((row, from) => row.forEach((_, to) => {
      const rows = this.rows(from, to), kind = from === to ? (single ? "own" : "inside") : node[from] === node[to] ? "inside" : "outside";
      kinds[kind] += rows;
      if (kind !== "own" && from !== to) {
        links.push([rows, from, to]);
        into[to] += rows;
      }
    }));
    links.sort((a, b) => b[0] - a[0]);
    const { row_bytes } = state.data, head = (...heads) => el("thead", {}, el("tr", {}, ...heads.map((one, i) => el("th", { scope: "col", class: i ? "num" : "" }, one))));
    const cell = (rows) => [el("td", { class: "num" }, 1e6 * rows >= 1000 ? grouped(1e6 * rows) : digits(1e6 * rows)), row_bytes ? el("td", { class: "num" }, quantity(1e6 * rows * row_bytes, "B")) : null];
    const unit = ["rows / M picks", ...(row_bytes ? ["bytes"] : [])];
    const names_ = { own: "stay on their rank", inside: single ? "to their node" : "stay in their node", outside: "to other nodes" };
    const where = Object.entries(kinds).filter(([kind]) => single || kind !== "own").map(([kind, rows]) =>
      el("tr", {}, el("th", { scope: "row" }, names_[kind]), meter(rows), el("td", { class: "num" }, percent(rows))));
    const fullest = into.map((rows, to) => [rows, to]).sort((a, b) => b[0] - a[0]).slice(0, 6).map(([rows, to]) =>
      el("tr", { onpointerenter: () => this.chart.mark(-1, to) }, el("th", { scope: "row" }, names[to]), ...cell(rows)));
    const links_ = links.slice(0, 8).map(([rows, from, to]) => el("tr", { onpointerenter: () => this.point(from, to) }, el("th", { scope: "row" }, `${names[from]} → ${names[to]}`), ...cell(rows)));
    this.side.replaceChildren(
      el("table", { class: "small" }, el("caption", {}, "Where rows go"), el("tbody", {}, ...where)),
      el("table", { class: "small" }, el("caption", {}, "Most arrives, from elsewhere"), head("at", ...unit), el("tbody", {}, ...fullest)),
      el("table", { class: "small" }, el("caption", {}, "Fullest links"), head("link", ...unit), el("tbody", {}, ...links_)));
  },

  key(key) {
    if (key === "p") this.policy = this.policy === "static" ? "local" : "static";
    else if (key === "n" && this.levels.length > 1) this.by = this.by === "rank" ? "node" : "rank";
    else if (key === "Escape") state.pinnedLink = null;
    else return false;
    show("traffic");
    return true;
  },
};
