// Load of every rank in every layer: before and after, side by side, on one scale; the chosen layer's ranks below.

const loads = {
  title: "Load",
  hint: "hover a cell · click keeps its layer and rank · [ ] layer · h l rank · s S traffic · b split · o order",
  after: "best",
  order: "rank",
  scale: "shared",

  show(host) {
    const pick = (name) => (value) => {
      this[name] = value;
      this.update();
    };
    const { old } = state.data, point = (row, column) => this.point(row, column), keep = (row, column) => this.keep(row, column);
    this.charts = {
      before: new Chart("Load before, a row for each layer, a column for each rank", point, keep),
      after: new Chart("Load of this plan, a row for each layer, a column for each rank", point, keep),
    };
    this.titles = { before: el("h2"), after: el("h2") };
    this.one = el("section", { class: "layer" });
    this.key_ = el("div");
    host.replaceChildren(el("div", { class: "page" },
      el("div", { class: "bar" }, scenarioChoice(() => this.update()),
        choice("Split", [["planned", "Plan's split"], ["best", "Best split"]], this.after, pick("after")),
        choice("Scale", [["shared", "One scale"], ["own", "Own scales"]], this.scale, pick("scale")), this.key_),
      el("div", { class: "maps" }, ...["before", "after"].map((kind) => el("section", {}, this.titles[kind], this.charts[kind].host))),
      this.one));
    this.was = old ? "Old plan" : "Unplaced";
    this.update();
  },

  values(kind) {
    return state.data.maps[kind === "before" ? "before" : this.after][state.scenario];
  },

  update() {
    const found = state.data.scenarios[state.data.shown[state.scenario]];
    this.titles.before.replaceChildren(`${this.was} `, el("small", {}, `fullest ${digits3(found.before.mean)}, worst layer ${digits3(found.before.worst)}`));
    this.titles.after.replaceChildren("This plan ", el("small", {}, `fullest ${digits3(found[this.after].mean)}, worst layer ${digits3(found[this.after].worst)}`));
    this.paint();
    this.detail();
  },

  paint() {
    const { groups, layers } = state.data, columns = groups.names.length;
    const room = this.charts.before.host.closest(".page").clientWidth - 48;
    const wide = room > 1000 && columns * 4 < room ? room / 2 - 70 : room - 50;
    const tops = ["before", "after"].map((kind) => Math.max(...this.values(kind).map((row) => Math.max(...row))));
    for (const [i, kind] of ["before", "after"].entries()) {
      const { map } = this.charts[kind], values = this.values(kind);
      map.size(layers.length, columns, wide, 430, [1, 24], [5, 22]);
      const look = loadLook(map, this.scale === "shared" ? Math.max(...tops) : tops[i]);
      map.paint((row, column) => look(values[row][column]));
      this.charts[kind].axes(layers, shortNames(groups), nodeBreaks(groups));
    }
    this.key_.replaceChildren(...(this.scale === "shared" ? [legend(Math.max(...tops))] : [legend(tops[0]), legend(tops[1])]));
    this.mark(state.layer, state.pinnedColumn);
  },

  mark(row, column) {
    for (const chart of Object.values(this.charts)) chart.mark(row, column);
    for (const bar of this.one.querySelectorAll(".two")) bar.classList.toggle("lit", Number(bar.dataset.column) === column);
  },

  point(row, column) {
    if (column < 0) {
      this.mark(state.layer, state.pinnedColumn);
      return say(state.hint);
    }
    this.mark(row, column);
    this.tell(row, column);
  },

  tell(row, column) {
    const { groups } = state.data, [was, now] = [this.values("before")[row][column], this.values("after")[row][column]];
    say(el("b", {}, `${layerName(row)}, ${groups.names[column]}`), `${groups.single ? `on node ${groups.node[column]}` : "by its fullest rank"}: ${times(was)} the mean before, ${times(now)} now`);
  },

  keep(row, column) {
    state.pinnedColumn = state.pinnedColumn === column && state.layer === row ? -1 : column;
    this.choose(row);
  },

  choose(layer) {
    state.layer = clamp(layer, 0, state.data.layers.length - 1);
    this.detail();
    this.mark(state.layer, state.pinnedColumn);
  },

  detail() {
    const { groups, perLayer } = state.data, at = state.layer;
    const [was, now] = [this.values("before")[at], this.values("after")[at]], top = Math.max(...was, ...now);
    const order = now.map((_, column) => column);
    if (this.order === "load") order.sort((a, b) => now[b] - now[a]);
    const bars = order.map((column) => ({ value: now[column], behind: was[column], column, mark: now[column] === Math.max(...now) ? "full" : "",
      label: `${groups.names[column]}: ${times(was[column])} before, ${times(now[column])} now` }));
    const pick = (value) => {
      this.order = value;
      this.detail();
    };
    this.one.replaceChildren(el("div", { class: "head" },
      el("h2", {}, layerName(at), el("small", {}, ` fullest ${groups.single ? "rank" : "group"} ${times(Math.max(...was))} before, ${times(Math.max(...now))} now; on the mean ${gapped(perLayer[at].gap)} above its bound`)),
      choice("Order of the bars", [["rank", `By ${groups.names[0].split(" ")[0]}`], ["load", "By load"]], this.order, pick)),
    barChart(bars, top, 1000, (i) => (i < 0 ? this.point(-1, -1) : this.point(at, order[i])), (i) => this.keep(at, order[i])),
    el("p", { class: "caption" }, "Behind: before. The dashed line is the mean, the stronger bar the fullest rank."));
  },

  key(key) {
    if (key === "[" || key === "]") this.choose(state.layer + (key === "]" ? 1 : -1));
    else if (key === "b") {
      this.after = this.after === "best" ? "planned" : "best";
      show("loads");
    } else if (key === "o") {
      this.order = this.order === "rank" ? "load" : "rank";
      this.detail();
    } else if (key === "h" || key === "l") {
      const count = state.data.groups.names.length;
      state.pinnedColumn = (state.pinnedColumn + (key === "l" ? 1 : state.pinnedColumn < 0 ? 0 : -1) + count) % count;
      this.mark(state.layer, state.pinnedColumn);
      this.tell(state.layer, state.pinnedColumn);
    } else if (key === "Escape") {
      state.pinnedColumn = -1;
      this.mark(state.layer, -1);
    } else return false;
    return true;
  },
};
