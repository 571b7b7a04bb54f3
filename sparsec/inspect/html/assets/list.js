// A list of rows of one height, of which only those in sight are in the page.

class RowList {
  /**
   * @param {string} label what a screen reader calls it
   * @param {(index: number) => HTMLElement} render makes a row
   * @param {number} height of a row in pixels
   */
  constructor(label, render, height = 19) {
    this.render = render;
    this.height = height;
    this.count = 0;
    this.inner = el("div", { class: "rows" });
    this.space = el("div", { class: "space" }, this.inner);
    this.host = el("div", { class: "list", role: "region", tabindex: "0", "aria-label": label }, this.space);
    this.host.addEventListener("scroll", () => this.schedule(), { passive: true });
    this.first = this.last = -1;
    new ResizeObserver(() => this.schedule()).observe(this.host);
  }

  /** Show `count` rows, the widest of `width` characters. */
  set(count, width = 0) {
    this.count = count;
    this.space.style.height = `${count * this.height}px`;
    this.space.style.minWidth = width ? `calc(${width}ch + 5rem)` : "";
    this.refresh();
  }

  /** Make the rows in sight anew. */
  refresh() {
    this.first = this.last = -1;
    this.draw();
  }

  schedule() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.draw();
    });
  }

  draw() {
    const top = this.host.scrollTop, tall = this.host.clientHeight || 900;
    const first = clamp(Math.floor(top / this.height) - 12, 0, this.count);
    const last = clamp(Math.ceil((top + tall) / this.height) + 12, 0, this.count);
    if (first === this.first && last === this.last) return;
    [this.first, this.last] = [first, last];
    const rows = [];
    for (let i = first; i < last; i++) rows.push(this.render(i));
    this.inner.style.transform = `translateY(${first * this.height}px)`;
    this.inner.replaceChildren(...rows);
    this.drawn?.();
  }

  /** Bring a row into sight, a third from the top; not moved where it is in sight already. */
  reveal(index, always = false) {
    const top = index * this.height, seen = this.host.scrollTop, tall = this.host.clientHeight;
    if (always || top < seen + this.height || top > seen + tall - 2 * this.height) {
      this.host.scrollTop = Math.max(0, top - tall / 3);
    }
    this.draw();
  }
}

/** Scroll several lists as one, up and down. */
function linkScroll(...lists) {
  for (const list of lists) {
    list.host.addEventListener("scroll", () => {
      for (const other of lists) {
        if (other !== list && other.host.scrollTop !== list.host.scrollTop) other.host.scrollTop = list.host.scrollTop;
      }
    }, { passive: true });
  }
}
