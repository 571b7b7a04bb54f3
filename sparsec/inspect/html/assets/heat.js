// A map of numbers, a cell each, on a canvas; facts and meters beside it.

const mean = (values) => (values.length ? sum(values) / values.length : 0);

class HeatMap {
  /**
   * @param {string} label what a screen reader calls it
   * @param {(row: number, column: number) => void} point the pointer is over a cell; (-1, -1): over none
   * @param {(row: number, column: number) => void} pick a cell is clicked
   */
  constructor(label, point, pick) {
    this.host = el("canvas", { class: "map", tabindex: "0", role: "img", "aria-label": label });
    this.host.addEventListener("pointermove", (event) => point(...this.cell(event)));
    this.host.addEventListener("pointerleave", () => point(-1, -1));
    this.host.addEventListener("click", (event) => pick(...this.cell(event)));
    [this.rows, this.columns, this.cellW, this.cellH] = [0, 0, 1, 1];
  }

  /** Cells as large as fit, within bounds: [least, most] width, [least, most] height. */
  size(rows, columns, wide, high, [leastW, mostW], [leastH, mostH]) {
    [this.rows, this.columns] = [rows, columns];
    this.cellW = clamp(Math.floor(wide / columns), leastW, mostW);
    this.cellH = clamp(Math.floor(high / rows), leastH, mostH);
  }

  /** A name of a colour as it is now, in light or dark. */
  colour(name) {
    this.host.style.color = `var(${name})`; // light-dark() is resolved in a used colour only
    return getComputedStyle(this.host).color;
  }

  /** Paint all cells: `look(row, column)` is [colour, strength 0..1], or nothing. */
  paint(look) {
    const scale = window.devicePixelRatio || 1, pen = this.host.getContext("2d");
    const [wide, high] = [this.columns * this.cellW, this.rows * this.cellH];
    [this.host.width, this.host.height] = [wide * scale, high * scale];
    Object.assign(this.host.style, { width: `${wide}px`, height: `${high}px` });
    pen.scale(scale, scale);
    const [gapW, gapH] = [this.cellW > 5 ? 1 : 0, this.cellH > 4 ? 1 : 0];
    for (let row = 0; row < this.rows; row++) {
      for (let column = 0; column < this.columns; column++) {
        const found = look(row, column);
        if (!found) continue;
        [pen.fillStyle, pen.globalAlpha] = found;
        pen.fillRect(column * this.cellW, row * this.cellH, this.cellW - gapW, this.cellH - gapH);
      }
    }
    pen.globalAlpha = 1;
  }

  /** A frame around cells, as of one row. */
  frame(row, column, rows = 1, columns = 1) {
    const pen = this.host.getContext("2d");
    pen.strokeStyle = this.colour("--warn");
    pen.lineWidth = 1.5;
    pen.strokeRect(column * this.cellW + 0.75, row * this.cellH + 0.25, columns * this.cellW - 1.5, rows * this.cellH - 1.5);
  }

  cell(event) {
    const row = clamp(Math.floor(event.offsetY / this.cellH), 0, this.rows - 1);
    return [row, clamp(Math.floor(event.offsetX / this.cellW), 0, this.columns - 1)];
  }
}

function fact(value, label) {
  return el("div", { class: "fact" }, el("b", {}, value), el("span", {}, label));
}

function meter(part) {
  return el("td", { class: "meter" }, el("div", { style: { width: `${clamp(100 * part, 0.5, 100)}%` } }));
}
