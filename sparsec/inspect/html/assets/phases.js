// The IR before and after a pass in aligned rows, the user's lines to their left, kernels to their right.

const phases = {
  title: "Phases",
  hint: "j k pass · n p change · c changes only · click pins a line",
  onlyChanges: false,

  show(host) {
    this.strip = el("div", { class: "strip", role: "listbox", "aria-label": "Passes", tabindex: "0" });
    this.before = new RowList("IR before the pass", (i) => this.row(i, 0));
    this.after = new RowList("IR after the pass", (i) => this.row(i, 1));
    this.source = new RowList("Your lines", (i) => this.sourceRow(i));
    for (const list of [this.before, this.after, this.source]) list.drawn = () => light(state.key);
    linkScroll(this.before, this.after);
    this.heads = ["Source", "Before", "After"].map((title) => el("h2", {}, title));
    this.panes = el("div", { class: "panes" },
      this.pane(this.heads[0], this.source, "source"), this.pane(this.heads[1], this.before, "ir"),
      this.pane(this.heads[2], this.after, "ir"), kernels.pane());
    linked(this.panes, (key) => this.pick(key));
    host.replaceChildren(this.strip, this.panes);
    this.fillStrip();
    this.update();
  },

  pane(head, list, kind) {
    return el("section", { class: `pane ${kind}` }, head, list.host);
  },

  fillStrip() {
    const shown = state.data.passes.map((pass, i) => {
      const delta = pass.after - pass.before;
      const text = i ? pass.name.split("{")[0] : state.data.passes[0].phase;
      const change = !i || !pass.changed ? "" : delta ? `${delta > 0 ? "+" : "−"}${Math.abs(delta)}` : "±0";
      const chip = el("button", {
        type: "button", role: "option", class: `chip ${pass.changed ? "" : "idle"}`, tabindex: "-1",
        title: `${pass.name}, phase ${pass.phase}, ${pass.ms} ms`, onclick: () => this.go(i),
      }, text, change ? el("small", {}, change) : null);
      return chip;
    });
    let phase = "";
    this.chips = shown;
    this.strip.replaceChildren(...shown.flatMap((chip, i) => {
      const next = state.data.passes[i].phase;
      const label = next !== phase && i ? [el("span", { class: "phase" }, next)] : [];
      phase = next;
      return [...label, chip];
    }));
  },

  go(index) {
    state.pass = clamp(index, 0, state.data.passes.length - 1);
    this.update();
  },

  /** The next pass in a direction that changed the text. */
  step(by) {
    const { passes } = state.data;
    let i = state.pass + by;
    while (passes[i] && !passes[i].changed) i += by;
    if (passes[i]) this.go(i);
  },

  update() {
    const { passes } = state.data, pass = passes[state.pass];
    if (!pass) return this.panes.replaceChildren(empty("No passes", "The dump holds no text of a module."));
    this.chips.forEach((chip, i) => chip.setAttribute("aria-selected", i === state.pass));
    this.chips[state.pass].scrollIntoView({ block: "nearest", inline: "nearest" });
    const index = pass.text, old = pass.changed && state.pass > 0 && pass.blocks.length ? index - 1 : index;
    [this.a, this.b] = [textOf(old), textOf(index)];
    this.rows = this.a && this.b ? this.align(pass, old === index) : [];
    this.changes = this.rows.flatMap((row, i) => (row[2] && !(this.rows[i - 1] || [])[2] ? [i] : []));
    this.panes.classList.toggle("single", old === index);
    const counts = (n) => (n ? ` ${grouped(n)} ops` : "");
    this.heads[1].replaceChildren("Before", el("small", {}, counts(pass.before)));
    this.heads[2].replaceChildren(old === index ? (state.pass ? "IR, unchanged" : "IR as captured") : "After",
      el("small", {}, counts(pass.after || (this.b ? this.b.ops.length : 0)),
        this.changes.length && old !== index ? `, ${this.changes.length} change${this.changes.length === 1 ? "" : "s"}` : ""));
    this.fillSource();
    this.before.set(this.rows.length, this.a?.width);
    this.after.set(this.rows.length, this.b?.width);
    this.change = -1;
    if (this.changes.length) this.nextChange(1, true);
    else this.after.reveal(this.rows.findIndex((row) => this.b.keys[row[1]]), true);
    kernels.update();
    search.run(false);
  },

  /** Rows: [line before or -1, line after or -1, whether it changed, lines folded]. */
  align(pass, same) {
    const rows = [], blocks = same ? [] : pass.blocks, total = this.a.lines.length;
    let a = 0, b = 0;
    const equal = (until) => {
      const count = until - a, keep = this.onlyChanges && !same ? 4 : Infinity;
      for (let i = 0; i < count; i++) {
        if (i >= keep && i < count - keep && count > 2 * keep + 1) {
          rows.push([-1, -1, false, count - 2 * keep]);
          i = count - keep - 1;
        } else rows.push([a + i, b + i, false, 0]);
      }
      [a, b] = [until, b + count];
    };
    for (const [from, gone, , come] of blocks) {
      equal(Math.min(from, total));
      for (let i = 0; i < Math.max(gone, come); i++) {
        rows.push([i < gone ? a + i : -1, i < come ? b + i : -1, true, 0]);
      }
      [a, b] = [a + gone, b + come];
    }
    equal(total);
    return rows;
  },

  row(i, side) {
    const row = this.rows[i], text = side ? this.b : this.a, line = row[side];
    if (row[3]) return el("div", { class: "row fold" }, `${grouped(row[3])} lines alike`);
    if (line < 0) return el("div", { class: "row gap" });
    const keys = text.keys[line], content = text.lines[line] ?? "", isLoc = content.trimStart().startsWith("loc ");
    const made = side ? state.data.passes[state.pass].made[line + 1] : "";
    return el("div", {
      class: `row ${made ? "made" : ""} ${row[2] ? (side ? "added" : "removed") : ""} ${isLoc ? "loc" : ""} ${search.at === i ? "found" : ""}`,
      "data-keys": keys ? keys.join(" ") : "", title: keys && !isLoc ? [text.scopes[line], made && `made by ${made}`].filter(Boolean).join("\n") : undefined,
    }, el("span", { class: "no", "aria-hidden": "true" }, String(line + 1)),
      ...(isLoc && !(state.query && content.toLowerCase().includes(state.query)) ? locTokens(content) : tokens(content, state.query)));
  },

  fillSource() {
    const counts = [new Map(), new Map()];
    [this.a, this.b].forEach((text, side) => text?.ops.forEach((op) => {
      for (const key of op.keys || []) counts[side].set(key, (counts[side].get(key) || 0) + 1);
    }));
    const used = places.all.filter((place) => counts[0].has(place.id) || counts[1].has(place.id));
    used.sort((x, y) => (x.file < y.file ? -1 : x.file > y.file ? 1 : x.line - y.line));
    this.lines = [];
    for (const place of used) {
      if (this.lines.at(-1)?.file !== place.file) this.lines.push({ title: place.file, file: place.file });
      this.lines.push({ ...place, counts: counts.map((side) => side.get(place.id) || 0) });
    }
    this.heads[0].replaceChildren("Source", el("small", {}, ` ${grouped(used.length)} lines`));
    this.source.set(this.lines.length);
  },

  sourceRow(i) {
    const one = this.lines[i];
    if (one.title) return el("div", { class: "row file", title: one.title }, basename(one.title));
    const [was, is] = one.counts, text = was === is ? `${is}` : `${was}→${is}`;
    return el("div", { class: "row", "data-keys": one.id, title: `${one.file}:${one.line}\n${one.source}` },
      el("span", { class: "no" }, String(one.line)), el("span", { class: "src" }, one.source || "…"),
      el("span", { class: `count ${was === is ? "" : "moved"}` }, text));
  },

  /** Pin a place, or let it go; again and again goes through its rows. */
  pick(key) {
    const again = state.pinned === key;
    const hits = this.rows.flatMap(([a, b], i) => {
      const of = (text, line) => line >= 0 && text.keys[line]?.includes(key) && !text.lines[line].trimStart().startsWith("loc ");
      return of(this.a, a) || of(this.b, b) ? [i] : [];
    });
    const next = again ? hits.find((i) => i > this.lastHit + 1) : hits[0];
    state.pinned = again && next === undefined ? -1 : key;
    if (next !== undefined) {
      const inSight = hits.some((i) => i >= this.after.first + 12 && i < this.after.last - 12);
      if (again || !inSight) this.after.reveal(next, true);
      this.lastHit = next;
    }
    this.source.reveal(Math.max(0, this.lines.findIndex((line) => line.id === key)));
    kernels.choose(key);
    light(state.pinned >= 0 ? key : -1);
  },

  nextChange(by, first = false) {
    if (!this.changes.length) return;
    this.change = first ? 0 : (this.change + by + this.changes.length) % this.changes.length;
    this.after.reveal(this.changes[this.change], true);
    this.before.host.scrollTop = this.after.host.scrollTop;
  },

  key(key) {
    if (key === "n") this.nextChange(1);
    else if (key === "p") this.nextChange(-1);
    else if (key === "c") {
      this.onlyChanges = !this.onlyChanges;
      this.update();
    } else if (key === "Escape") {
      state.pinned = -1;
      light(-1);
    } else return false;
    return true;
  },

  find(query) {
    const hit = (text, line) => line >= 0 && text.lines[line]?.toLowerCase().includes(query);
    return (this.rows || []).flatMap(([a, b], i) => (hit(this.a, a) || hit(this.b, b) ? [i] : []));
  },

  reveal(index) {
    this.after.reveal(index);
    this.before.host.scrollTop = this.after.host.scrollTop;
    this.before.refresh();
    this.after.refresh();
  },
};
