// Tokens per expert from a routing trace: a map of layers by experts, one layer's bars, waste of tiles, devices.

const BLOCKS = [16, 32, 64, 128];
const HOT = 2; // times the mean

const experts = {
  title: "Experts",
  hint: "click a row for its layer · [ ] previous and next layer",
  layer: 0,
  steps: "all",
  order: "expert",

  show(host) {
    const { trace } = state.data;
    if (!trace || !trace.layers.length || !trace.steps?.length) {
      return host.replaceChildren(empty("No routing trace", "Record one into this folder:",
        "sparsec trace MODEL --prompt-ids 1,2,3 -o DUMPFOLDER"));
    }
    this.trace = trace;
    const pick = (name) => (value) => {
      this[name] = value;
      this.update();
    };
    const steps = [["all", `All ${trace.steps.length} steps`], ["prompt", "Prompt"], ["decode", "Decode"]];
    this.map = new HeatMap("Tokens per expert, a row for each layer", (row, expert) => this.hover(row, expert), (row) => this.choose(row));
    this.facts = el("div", { class: "facts" });
    this.one = el("section", { class: "layer" });
    host.replaceChildren(el("div", { class: "experts" },
      el("div", { class: "bar" }, choice("Steps", trace.steps.length > 1 ? steps : steps.slice(0, 1), this.steps, pick("steps")),
        choice("Order of the bars", [["expert", "By expert"], ["load", "By load"]], this.order, pick("order"))),
      this.facts, el("h2", {}, "Layers ", el("small", {}, "rows are layers, columns experts; the stronger the busier")), this.map.host, this.one));
    this.update();
  },

  chosen() {
    const { steps } = this.trace;
    return this.steps === "prompt" ? steps.slice(0, 1) : this.steps === "decode" ? steps.slice(1) : steps;
  },

  update() {
    if (!this.trace) return;
    const steps = this.chosen();
    this.loads = this.trace.layers.map((layer, i) => {
      const load = new Array(layer.experts).fill(0);
      for (const step of steps) step.counts[i].forEach((count, e) => (load[e] += count));
      return load;
    });
    this.layer = clamp(this.layer, 0, this.loads.length - 1);
    const flat = this.loads.flat(), dead = flat.filter((load) => !load).length;
    const hot = sum(this.loads.map((load) => load.filter((n) => n > HOT * mean(load)).length));
    const worst = Math.max(...this.loads.map((load) => Math.max(...load) / (mean(load) || 1)));
    this.facts.replaceChildren(
      fact(grouped(sum(steps.map((step) => step.tokens))), "tokens"), fact(grouped(this.loads.length), "layers"),
      fact(digits(worst) + "×", "busiest expert, of the mean"), fact(grouped(hot), `hot, over ${HOT}× the mean`),
      fact(`${grouped(dead)} of ${grouped(flat.length)}`, "experts without a token"));
    this.paint();
    this.detail();
  },

  paint() {
    const columns = Math.max(...this.loads.map((load) => load.length));
    this.map.size(this.loads.length, columns, Math.max(300, (this.map.host.parentElement.clientWidth || 1000) - 48), 520, [2, 28], [7, 20]);
    const [heat, none] = [this.map.colour("--heat"), this.map.colour("--none")], averages = this.loads.map((load) => mean(load) || 1);
    this.map.paint((i, e) => {
      const n = this.loads[i][e];
      return n === undefined ? null : n ? [heat, clamp(0.12 + (0.88 * n) / (HOT * 1.5 * averages[i]), 0.12, 1)] : [none, 1];
    });
    this.map.frame(this.layer, 0, 1, this.loads[this.layer].length);
  },

  hover(row, expert) {
    const load = this.loads[row]?.[expert];
    if (load === undefined) return;
    const path = this.trace.layers[row].path, average = mean(this.loads[row]);
    byId("status").replaceChildren(el("b", {}, path), ` expert ${expert}: ${grouped(load)} tokens, ${digits(load / (average || 1))}× the mean`);
  },

  choose(layer) {
    this.layer = clamp(layer, 0, this.loads.length - 1);
    this.paint();
    this.detail();
  },

  detail() {
    const info = this.trace.layers[this.layer], load = this.loads[this.layer], average = mean(load), most = Math.max(...load, 1);
    const order = load.map((n, e) => [e, n]);
    if (this.order === "load") order.sort((a, b) => b[1] - a[1]);
    const bars = el("div", { class: "bars", role: "img", "aria-label": `Tokens of the ${load.length} experts` });
    for (const [e, n] of order) {
      const kind = n ? (n > HOT * average ? "hot" : "") : "dead";
      bars.append(el("div", { class: `bar1 ${kind}`, title: `expert ${e}: ${n} tokens`, style: { height: `${n ? Math.max(2, (100 * n) / most) : 1}%` } }));
    }
    const line = el("div", { class: "mean", style: { bottom: `${(100 * average) / most}%` } });
    this.one.replaceChildren(
      el("h2", {}, info.path || `layer ${this.layer}`, el("small", {}, ` ${info.experts} experts, ${info.k} for each token; mean ${digits(average)}, most ${grouped(most)}`)),
      el("div", { class: "chart", style: { maxWidth: `${41 * load.length}px` } }, bars, line), el("div", { class: "pair" }, this.waste(), this.devices()));
  },

  /** Rows of tiles that hold no token, for each BLOCK_M, this layer and all of them. */
  waste() {
    const rows = BLOCKS.map((block) => {
      const of = (layers) => {
        let [full, padded] = [0, 0];
        for (const step of this.chosen()) {
          for (const i of layers) {
            for (const n of step.counts[i]) [full, padded] = [full + n, padded + Math.ceil(n / block) * block];
          }
        }
        return padded ? 1 - full / padded : 0;
      };
      const [here, all] = [of([this.layer]), of([...this.loads.keys()])];
      return el("tr", {}, el("th", { scope: "row" }, String(block)), meter(here), el("td", { class: "num" }, percent(here)),
        el("td", { class: "num dim" }, percent(all)));
    });
    return el("table", { class: "small" }, el("caption", {}, "Padding: rows of tiles without a token"),
      el("thead", {}, el("tr", {}, ...["BLOCK_M", "", "this layer", "all layers"].map((text) => el("th", { scope: "col", class: /l/.test(text) ? "num" : "" }, text)))),
      el("tbody", {}, ...rows));
  },

  devices() {
    const place = this.trace.placement?.[this.layer];
    if (!place) return null;
    const loads = new Map();
    place.forEach((device, e) => loads.set(device, (loads.get(device) || 0) + this.loads[this.layer][e]));
    const most = Math.max(...loads.values(), 1);
    const rows = [...loads].sort((a, b) => a[0] - b[0]).map(([device, n]) =>
      el("tr", {}, el("th", { scope: "row" }, String(device)), meter(n / most), el("td", { class: "num" }, grouped(n))));
    return el("table", { class: "small" }, el("caption", {}, "Tokens per device"),
      el("thead", {}, el("tr", {}, ...["device", "", "tokens"].map((text) => el("th", { scope: "col" }, text)))), el("tbody", {}, ...rows));
  },

  key(key) {
    if (!this.trace || (key !== "[" && key !== "]")) return false;
    this.choose(this.layer + (key === "]" ? 1 : -1));
    return true;
  },
};
