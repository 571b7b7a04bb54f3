// The page of a placement.

launch({
  views: { summary, loads, traffic, replicas, moves },
  keys: [
    ["1 – 5", "views"], ["[ ]", "layer"], ["s S", "next, previous traffic"], ["j k, → ←", "next, previous layer"], ["h l", "load: previous, next rank"], ["b", "load: the plan's split, or the best"],
    ["o", "load: order of the bars"], ["p", "traffic: policy"], ["n", "traffic: ranks or nodes"], ["/", "search experts and ranks"],
    ["click", "keep a cell"], ["Esc", "let go"], ["t", "light or dark"], ["?", "this"],
  ],

  begin() {
    for (const view of Object.values(this.views)) {
      const own = view.key?.bind(view);
      view.key = (key) => (key === "s" || key === "S" ? nextScenario(key === "s" ? 1 : -1) : own?.(key) ?? false);
    }
  },

  notes: () => state.data.notes.join(" · "),

  shown() {
    say(state.hint);
    search.run(false);
  },

  repaint() {
    const view = this.views[state.view];
    if (view.chart || view.charts) view.paint();
  },

  step(by) {
    const view = this.views[state.view];
    if (view === loads || view === replicas) view.key(by > 0 ? "]" : "[");
  },
});
