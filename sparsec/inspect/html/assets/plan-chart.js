// What the views of a plan share: which scenario, layer and rank are looked at; maps with axes; bars of a layer.

Object.assign(state, { scenario: 0, layer: 0, column: -1, pinnedColumn: -1 });

const times = (thousandths) => `${(thousandths / 1000).toFixed(3)}×`;
const gapped = (value) => `${(100 * value).toFixed(value < 0.0995 ? 2 : 1)} %`;
const layerName = (at) => `layer ${state.data.layers[at]}`;

/** Over 1 is too much, under 1 is room: the colour, and how strong, on the scale up to `top`. */
function loadLook(map, top) {
  const [over, under] = [map.colour("--bad"), map.colour("--heat")], most = Math.log(Math.max(top, 1050) / 1000);
  return (value) => value > 1000 ? [over, clamp(0.05 + 0.95 * (Math.log(value / 1000) / most), 0.05, 1)]
    : [under, clamp(0.05 + 0.6 * (1 - value / 1000), 0.05, 0.65)];
}

/** Which scenario to look at; `s` goes to the next. */
function scenarioChoice(changed) {
  const { scenarios, shown } = state.data;
  const field = el("select", { id: "scenario", onchange: () => {
    state.scenario = Number(field.value);
    changed();
  } }, ...shown.map((at, i) => el("option", { value: String(i), selected: i === state.scenario }, scenarios[at].name)));
  return el("label", { class: "pick" }, "Traffic ", field);
}

function nextScenario(by) {
  const field = byId("scenario"), count = state.data.shown.length;
  state.scenario = (state.scenario + by + count) % count;
  if (!field) return false;
  field.value = String(state.scenario);
  field.dispatchEvent(new Event("change"));
  return true;
}

/** A map with numbers along its sides, lines between nodes, and lines through the cell that is looked at. */
class Chart {
  constructor(label, point, pick) {
    this.map = new HeatMap(label, point, pick);
    [this.across, this.down] = [el("i", { class: "cross" }), el("i", { class: "cross" })];
    this.left = el("div", { class: "axis left", "aria-hidden": "true" });
    this.below = el("div", { class: "axis below", "aria-hidden": "true" });
    this.host = el("div", { class: "chartmap" }, this.left, el("div", { class: "cells" }, this.map.host, this.across, this.down), this.below);
  }

  /** Names of rows and columns (as short as can be); `breaks`: columns where a node begins. */
  axes(rows, columns, breaks) {
    const { cellW, cellH } = this.map;
    const place = (names, size, least, side) => {
      const every = Math.max(1, Math.ceil(least / size));
      return names.map((name, i) => i % every ? null : el("span", { style: { [side]: `${(i + 0.5) * size}px` } }, String(name)));
    };
    this.left.style.height = `${rows.length * cellH}px`;
    this.below.style.width = `${columns.length * cellW}px`;
    this.left.replaceChildren(...place(rows, cellH, 14, "top").filter(Boolean));
    const ticks = breaks.length * 4 <= columns.length * cellW ? breaks.map((at) => el("b", { style: { left: `${at * cellW}px` } })) : [];
    this.below.replaceChildren(...ticks, ...place(columns, cellW, 26, "left").filter(Boolean));
  }

  /** Lines through a row and a column; -1: none. */
  mark(row, column) {
    const { cellW, cellH, rows, columns } = this.map, inside = row < rows && column < columns;
    Object.assign(this.across.style, { display: row >= 0 && inside ? "block" : "none", top: `${row * cellH}px`, height: `${cellH}px`, left: "0", width: `${columns * cellW}px` });
    Object.assign(this.down.style, { display: column >= 0 && inside ? "block" : "none", left: `${column * cellW}px`, width: `${cellW}px`, top: "0", height: `${rows * cellH}px` });
  }
}

/** Columns where another node begins. */
const nodeBreaks = (groups) => groups.node.flatMap((node, i) => (i && node !== groups.node[i - 1] ? [i] : []));

/** Numbers of groups: ranks as numbers, else their names. */
const shortNames = (groups) => groups.names.map((name) => name.split(" ")[1]);

/** A key of colours. */
function legend(top) {
  return el("div", { class: "legend", "aria-hidden": "true" }, el("span", {}, "0"), el("i", { class: "ramp under" }), el("b", {}, "1"), el("i", { class: "ramp over" }), el("span", {}, times(top)));
}

/** Bars side by side: `bars` are { value, behind, label, mark }; a line at `line`. */
function barChart(bars, top, line, point, pick) {
  const high = (value) => `${clamp((100 * value) / top, 0, 100)}%`;
  const host = el("div", { class: "bars2" });
  bars.forEach((bar, i) => {
    host.append(el("div", { class: `two${bar.mark ? ` ${bar.mark}` : ""}`, "data-column": bar.column ?? i, title: bar.label,
      onpointerenter: () => point(i), onclick: () => pick(i) },
    bar.behind === undefined ? null : el("i", { class: "behind", style: { height: high(bar.behind) } }), el("i", { class: "front", style: { height: high(bar.value) } })));
  });
  host.addEventListener("pointerleave", () => point(-1));
  return el("div", { class: "chart wide" }, host, line === null ? null : el("div", { class: "mean", style: { bottom: high(line) } }));
}
