// The kernels: functions of the last text, and the sources that were emitted for them.

const kernels = {
  pane() {
    this.list = new RowList("Kernel", (i) => this.row(i));
    this.list.drawn = () => light(state.key);
    this.select = el("select", { "aria-label": "Kernel", onchange: () => this.open(this.select.value) });
    this.read();
    this.head = el("h2", {}, "Kernel", this.select);
    return el("section", { class: "pane kernel" }, this.head, this.list.host);
  },

  /** All there are, and which of the user's lines launch each. */
  read() {
    const last = textOf(state.data.texts.length - 1);
    this.all = new Map();
    if (last) {
      for (const [name, [from, to]] of last.funcs) {
        if (name === "main") continue;
        this.all.set(`@${name}`, { lines: last.lines.slice(from, to), keys: last.keys.slice(from, to), from: new Set() });
      }
      for (const op of last.ops) {
        const one = op.callee && this.all.get(`@${op.callee}`);
        if (one) for (const key of op.keys || []) one.from.add(key);
      }
    }
    for (const { name, text } of state.data.kernels) {
      const lines = text.split("\n"), file = basename(name).replace(/\.[^.]*$/, "");
      const owners = [...this.all.keys()].filter((key) => key.startsWith("@") && file.includes(key.slice(1)));
      const from = new Set(owners.flatMap((key) => [...this.all.get(key).from]));
      this.all.set(name, { lines, keys: null, from });
    }
    this.select.replaceChildren(...[...this.all.keys()].map((name) => el("option", { value: name }, name)));
  },

  update() {
    if (!this.all.size) {
      this.list.host.replaceChildren(el("p", { class: "note" }, "Kernels appear here once the module is lowered."));
      this.select.hidden = true;
    } else if (!this.now) this.open(([...this.all].find(([, one]) => one.from.size) || [""])[0]);
    else this.open(this.now);
  },

  open(name) {
    if (!this.all.has(name)) name = [...this.all.keys()][0];
    this.now = this.select.value = name;
    const one = this.all.get(name);
    this.list.set(one.lines.length, Math.min(400, Math.max(...one.lines.map((line) => line.length))));
  },

  /** Open the kernel that a place launches, sources first. */
  choose(key) {
    if (this.all.get(this.now)?.from.has(key)) return;
    const fit = [...this.all].filter(([, one]) => one.from.has(key)).map(([name]) => name);
    if (fit.length) this.open(fit[0]);
  },

  row(i) {
    const one = this.all.get(this.now), line = one.lines[i], keys = one.keys?.[i] || [...one.from];
    const isLoc = one.keys && line.trimStart().startsWith("loc ");
    return el("div", { class: `row ${isLoc ? "loc" : ""}`, "data-keys": keys.join(" ") },
      el("span", { class: "no", "aria-hidden": "true" }, String(i + 1)),
      ...(isLoc ? locTokens(line) : tokens(line, "")));
  },
};
