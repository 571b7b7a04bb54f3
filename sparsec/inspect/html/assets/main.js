// The page of a dump.

const KEYS = [
  ["1 – 6", "views"], ["j k, → ←", "next, previous pass that changed something"], ["n p", "next, previous change"],
  ["c", "changes only"], ["/", "search; Enter and Shift Enter go through hits"], ["click", "pin a line; again: its next op"], ["Esc", "let go"],
  ["e w", "graph: open all, close all"], ["+ −", "graph: zoom"], ["[ ]", "experts: layer"], ["g", "costs: group"],
  ["t", "light or dark"], ["?", "this"],
];

launch({
  views: { phases, graph, experts, costs, remarks, timeline },
  keys: KEYS,

  begin() {
    state.data.texts.forEach((_, i) => i || textOf(0));
    state.pass = Math.max(0, state.data.passes.findIndex((pass, i) => i && pass.changed));
  },

  notes() {
    const { notes, state: end } = state.data;
    return notes.join(" · ") || (end === "failed" ? "the run failed" : "");
  },

  shown(name) {
    light(state.pinned);
    if (name !== "phases") search.run(false);
  },

  repaint() {
    if (state.view === "experts" && experts.trace) experts.paint();
  },

  step(by) {
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
  },
});
