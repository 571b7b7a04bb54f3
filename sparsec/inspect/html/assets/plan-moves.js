// What changes of the old plan: experts that ranks must load anew.

const moves = {
  title: "Moves",
  hint: "hover a cell · click for the layer's replicas",

  show(host) {
    const { moved, groups, layers } = state.data;
    if (!moved) return host.replaceChildren(empty("No old plan", "With --old plan.json the page says what moves from one plan to the other."));
    const ranks = moved.by_rank.map((count, rank) => [count, rank]).sort((a, b) => b[0] - a[0]), slots = layers.length * state.data.slots;
    this.chart = new Chart("Experts to load anew, a row for each layer, a column for each rank", (row, column) => this.point(row, column), (row) => {
      state.layer = row;
      show("replicas");
    });
    const rows = ranks.slice(0, 8).map(([count, rank]) => el("tr", {}, el("th", { scope: "row" }, `rank ${rank}`), meter(count / (ranks[0][0] || 1)), el("td", { class: "num" }, grouped(count)),
      state.data.expert_bytes ? el("td", { class: "num" }, quantity(count * state.data.expert_bytes, "B")) : null));
    host.replaceChildren(el("div", { class: "page" },
      el("div", { class: "facts" }, fact(grouped(moved.experts), "experts to load anew"), fact(percent(moved.experts / slots), "of all slots"),
        moved.bytes ? fact(quantity(moved.bytes, "B"), "of weights to move") : null, fact(grouped(ranks[0][0]), `at most, on rank ${ranks[0][1]}`)),
      el("h2", {}, "Loaded anew ", el("small", {}, `rows are layers, columns ${groups.single ? "ranks" : groups.names[0].replace(/ .*/, "s")}; the stronger the more`)),
      this.chart.host, el("section", {}, el("h2", {}, "Ranks that load most"), el("table", { class: "small" }, el("tbody", {}, ...rows)))));
    this.paint();
  },

  paint() {
    const { moved, groups, layers } = state.data, { map } = this.chart, most = Math.max(1, ...moved.map.map((row) => Math.max(...row)));
    map.size(layers.length, groups.names.length, this.chart.host.closest(".page").clientWidth - 110, 430, [1, 24], [5, 22]);
    const [heat, none] = [map.colour("--heat"), map.colour("--none")];
    map.paint((row, column) => (moved.map[row][column] ? [heat, 0.15 + (0.85 * moved.map[row][column]) / most] : [none, 0.6]));
    this.chart.axes(layers, shortNames(groups), nodeBreaks(groups));
  },

  point(row, column) {
    this.chart.mark(row, column);
    if (column < 0) return say(state.hint);
    const { moved, groups, slots, ranks } = state.data;
    say(el("b", {}, `${layerName(row)}, ${groups.names[column]}`), `${grouped(moved.map[row][column])} experts to load anew${groups.single ? ` of ${digits(slots / ranks)}` : ""}`);
  },
};
