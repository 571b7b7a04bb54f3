// The plan in figures: scenarios before and after, the gap of every layer, memory.

const summary = {
  title: "Summary",
  hint: "click a layer for its loads",

  show(host) {
    const { data } = state, [all] = data.scenarios, old = data.old ? "old plan" : "unplaced";
    const worst = Math.max(...data.scenarios.map((one) => one.best.worst));
    const facts = el("div", { class: "facts" },
      fact(`${digits3(all.before.mean)} → ${digits3(all.planned.mean)}`, `fullest rank, of the mean; ${old} → this plan`),
      fact(gapped(mean(data.perLayer.map((one) => one.gap))), "above the lower bound, mean of layers"),
      fact(digits3(worst), "worst layer and scenario, best split"),
      data.nodes_per_token ? fact(digits3(data.nodes_per_token), "nodes per token") : null,
      data.moved ? fact(grouped(data.moved.experts), `experts to load anew${data.moved.bytes ? `, ${quantity(data.moved.bytes, "B")}` : ""}`) : null,
      data.expert_bytes ? fact(quantity(Math.max(...data.memory.held), "B"), "of experts on the fullest rank") : null);
    const shape = `${data.layers.length} layers of ${data.experts} experts on ${grouped(data.ranks)} ranks in ${grouped(data.nodes)} nodes, ${grouped(data.slots)} slots per layer`;
    host.replaceChildren(el("div", { class: "page" }, el("p", { class: "caption" }, el("b", {}, data.topology), `  ·  ${shape}`), facts,
      this.scenarios(old), this.gaps(), this.layers(), this.memory()));
  },

  scenarios(old) {
    const { scenarios } = state.data, most = Math.max(...scenarios.flatMap((one) => [one.before.mean, one.planned.mean]));
    const cells = (one, kind) => [el("td", { class: "num" }, digits3(one[kind].mean)), el("td", { class: "num dim" }, digits3(one[kind].worst))];
    const rows = scenarios.map((one, i) => el("tr", { class: i ? "" : "whole" },
      el("th", { scope: "row" }, one.name),
      el("td", { class: "span" }, el("i", { class: "behind", style: { width: `${(100 * one.before.mean) / most}%` } }),
        el("i", { class: "middle", style: { width: `${(100 * one.planned.mean) / most}%` } }), el("i", { class: "front", style: { width: `${(100 * one.best.mean) / most}%` } }), el("i", { class: "tick", style: { left: `${(100 * one.bound.mean) / most}%` } })),
      ...cells(one, "before"), ...cells(one, "planned"), ...cells(one, "best"), el("td", { class: "num dim" }, digits3(one.bound.mean))));
    const head = (...names) => names.map((name) => el("th", { scope: "col", class: "num" }, name));
    return el("section", {}, el("h2", {}, "Fullest rank, of the mean ", el("small", {}, "1 is perfect; mean of the layers, and the worst of them")),
      el("table", { class: "small scenarios" },
        el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "traffic"), el("th", { scope: "col" }, `${old}, this plan, best split, bound`),
          ...head(old, "worst", "this plan", "worst", "best split", "worst", "bound"))), el("tbody", {}, ...rows)));
  },

  /** The gap of every layer on the mean of the scenarios. */
  gaps() {
    const { perLayer, scenarios } = state.data, top = Math.max(...perLayer.map((one) => one.gap), 1e-4);
    const bars = perLayer.map((one) => ({ value: Math.max(one.gap, 0), label: `layer ${one.layer}: ${gapped(one.gap)} above the bound` }));
    const said = (i) => i >= 0 && say(el("b", {}, layerName(i)), `${gapped(perLayer[i].gap)} above the bound of ${perLayer[i].bound.toFixed(3)}; ${perLayer[i].before.toFixed(3)} before, ${perLayer[i].load.toFixed(3)} now`);
    return el("section", {}, el("h2", {}, "Gap to the lower bound ", el("small", {}, `a bar for each layer, ${scenarios[0].name}; the tallest is ${gapped(top)}`)),
      el("div", { class: "low" }, barChart(bars, top, null, said, openLayer)));
  },

  layers() {
    const { perLayer } = state.data, worst = perLayer.map((one, i) => [i, one]).sort((a, b) => b[1].gap - a[1].gap).slice(0, 8);
    const rows = worst.map(([i, one]) => el("tr", { class: "link", tabindex: "0", onclick: () => openLayer(i), onkeydown: (event) => event.key === "Enter" && openLayer(i) },
      el("th", { scope: "row" }, `layer ${one.layer}`), ...[one.before, one.load, one.best, one.bound].map((value) => el("td", { class: "num" }, value.toFixed(4))),
      el("td", { class: "num" }, gapped(one.gap)), el("td", { class: "num dim" }, `rank ${one.rank}`)));
    return el("section", {}, el("h2", {}, "Layers furthest from the bound"), el("table", { class: "small" },
      el("thead", {}, el("tr", {}, ...["layer", "before", "this plan", "best split", "bound", "gap", "fullest"].map((name, i) => el("th", { scope: "col", class: i ? "num" : "" }, name)))), el("tbody", {}, ...rows)));
  },

  memory() {
    const { memory, groups, expert_bytes } = state.data;
    if (!expert_bytes) return el("section", {}, el("h2", {}, "Memory"), el("p", { class: "caption" }, "Not known: plan with --expert-bytes."));
    const top = Math.max(...memory.held, ...memory.room), first = groups.first;
    const label = (at) => `${groups.names[at]}: ${quantity(memory.held[first[at]], "B")}${memory.room[first[at]] ? ` of ${quantity(memory.room[first[at]], "B")}` : ""} for experts`;
    const bars = first.map((rank, at) => ({ value: memory.held[rank], behind: memory.room[rank] || undefined, label: label(at) }));
    return el("section", {}, el("h2", {}, "Memory ", el("small", {}, `weights of experts, a bar for each ${groups.single ? "rank" : "group of ranks"}${memory.room.some(Boolean) ? "; behind it the memory that there is" : ""}`)),
      el("div", { class: "low" }, barChart(bars, top, null, (at) => at >= 0 && say(label(at)), () => {})));
  },
};

const digits3 = (value) => value.toFixed(3);

function say(...parts) {
  byId("status").replaceChildren(...parts);
}

function openLayer(at) {
  state.layer = at;
  show("loads");
}
