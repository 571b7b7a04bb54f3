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
    this.map = el("canvas", { class: "map", tabindex: "0", role: "img",
      "aria-label": "Tokens per expert, a row for each layer" });
    this.map.addEventListener("pointermove", (event) => this.hover(event));
    this.map.addEventListener("click", (event) => this.choose(this.cell(event)[0]));
    this.facts = el("div", { class: "facts" });
    this.one = el("section", { class: "layer" });
    host.replaceChildren(el("div", { class: "experts" },
      el("div", { class: "bar" }, choice("Steps", trace.steps.length > 1 ? steps : steps.slice(0, 1), this.steps, pick("steps")),
        choice("Order of the bars", [["expert", "By expert"], ["load", "By load"]], this.order, pick("order"))),
      this.facts, el("h2", {}, "Layers ", el("small", {}, "rows are layers, columns experts; the stronger the busier")), this.map, this.one));
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
    const columns = Math.max(...this.loads.map((load) => load.length)), rows = this.loads.length;
    const wide = Math.max(300, (this.map.parentElement.clientWidth || 1000) - 48);
    this.cellW = clamp(Math.floor(wide / columns), 2, 28);
    this.cellH = clamp(Math.floor(520 / rows), 7, 20);
    const scale = window.devicePixelRatio || 1, pen = this.map.getContext("2d");
    [this.map.width, this.map.height] = [columns * this.cellW * scale, rows * this.cellH * scale];
    Object.assign(this.map.style, { width: `${columns * this.cellW}px`, height: `${rows * this.cellH}px` });
    pen.scale(scale, scale);
    const colour = (name) => {
      this.map.style.color = `var(${name})`; // light-dark() is resolved in a used colour only
      return getComputedStyle(this.map).color;
    };
    const [heat, none, mark] = [colour("--heat"), colour("--none"), colour("--warn")];
    const gap = this.cellW > 5 ? 1 : 0;
    this.loads.forEach((load, i) => {
      const average = mean(load) || 1;
      load.forEach((n, e) => {
        pen.globalAlpha = n ? clamp(0.12 + (0.88 * n) / (HOT * 1.5 * average), 0.12, 1) : 1;
        pen.fillStyle = n ? heat : none;
        pen.fillRect(e * this.cellW, i * this.cellH, this.cellW - gap, this.cellH - 1);
      });
    });
    pen.globalAlpha = 1;
    pen.strokeStyle = mark;
    pen.lineWidth = 1.5;
    const width = this.loads[this.layer].length * this.cellW;
    pen.strokeRect(0.75, this.layer * this.cellH + 0.25, width - 1.5, this.cellH - 1.5);
  },

  cell(event) {
    const row = clamp(Math.floor(event.offsetY / this.cellH), 0, this.loads.length - 1);
    return [row, Math.floor(event.offsetX / this.cellW)];
  },

  hover(event) {
    const [row, expert] = this.cell(event), load = this.loads[row][expert];
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

const mean = (values) => (values.length ? sum(values) / values.length : 0);

function fact(value, label) {
  return el("div", { class: "fact" }, el("b", {}, value), el("span", {}, label));
}

function meter(part) {
  return el("td", { class: "meter" }, el("div", { style: { width: `${clamp(100 * part, 0.5, 100)}%` } }));
}
