// Costs, remarks and passes as tables.

const COLUMNS = [
  ["op", "op", (row) => row.name], ["times", "times", null], ["bytes", "bytes", (row) => quantity(row.bytes, "B")],
  ["flops", "flops", (row) => quantity(row.flops, "")], ["intensity", "flop/B", (row) => digits(row.intensity)],
  ["us", "at best", (row) => micros(row.us)], ["share", "share", null], ["limiter", "limit", (row) => row.limiter || "–"],
  ["where", "line", (row) => row.where],
];

const costs = {
  title: "Costs",
  hint: "click a heading to sort · g groups by line",
  by: "us",
  down: true,
  grouped: true,

  show(host) {
    const found = state.data.costs;
    if (!found || !found.ops.length) {
      return host.replaceChildren(empty("No costs", "The dump has no costs.json: its run did not finish, or is of an older sparsec."));
    }
    if (!found.chip && this.by === "us") this.by = "bytes";
    const sizes = Object.entries(found.sizes).map(([name, size]) => `${name} = ${size}`).join(", ");
    const group = (value) => {
      this.grouped = value;
      this.update();
    };
    this.heads = el("div", { class: "grid head", role: "row" });
    this.list = new RowList("Costs", (i) => this.row(this.rows[i]), 24);
    this.list.drawn = () => light(state.key);
    this.total = el("p", { class: "caption" });
    this.note = `${found.chip ? `On ${found.chip}, at best; launches and caches left out` : "No chip is known for the target, so no times"}${sizes ? `; with ${sizes}` : ""}.`;
    host.replaceChildren(el("div", { class: "bar" },
      choice("Rows", [[true, "By line"], [false, "Every op"]], this.grouped, group), this.total), el("div", { class: "table", role: "table", "aria-label": "Costs" }, this.heads, this.list.host));
    linked(this.list.host, (key) => light((state.pinned = state.pinned === key ? -1 : key)));
    this.update();
  },

  update() {
    const rows = new Map();
    state.data.costs.ops.forEach((op, i) => {
      const name = op.callee ? `@${op.callee}` : op.op, where = op.file ? `${basename(op.file)}:${op.line}` : op.scope;
      const key = this.grouped ? `${name} ${where}` : i;
      const row = rows.get(key) || { name, where: this.grouped ? where : `${where}  ${op.scope}`, times: 0, bytes: 0, flops: 0, us: 0,
        limiter: op.limiter, place: op.file ? placeId(op.file, op.line) : "" };
      for (const what of ["bytes", "flops", "us"]) row[what] += op[what];
      row.times += 1;
      rows.set(key, row);
    });
    this.all = [...rows.values()];
    const scale = this.by === "us" || this.all.some((row) => row.us) ? "us" : "bytes", whole = sum(this.all.map((row) => row[scale])) || 1;
    for (const row of this.all) {
      row.intensity = row.bytes ? row.flops / row.bytes : 0;
      row.op = row.name;
      row.share = row[scale] / whole;
    }
    const total = (what) => sum(this.all.map((row) => row[what]));
    this.total.replaceChildren(el("b", {}, `${total("us") ? `${micros(total("us"))}, ` : ""}${quantity(total("bytes"), "B")}, ${quantity(total("flops"), "FLOP")}. `), this.note);
    this.sort();
  },

  sort() {
    const query = state.query, sign = this.down ? -1 : 1;
    const key = this.by;
    this.rows = this.all.filter((row) => `${row.name} ${row.where} ${row.limiter}`.toLowerCase().includes(query));
    this.rows.sort((a, b) => sign * (typeof a[key] === "string" ? a[key].localeCompare(b[key]) : a[key] - b[key]));
    this.most = Math.max(...this.all.map((row) => row.share), 1e-9);
    this.heads.replaceChildren(...COLUMNS.map(([name, label]) => el("button", {
      type: "button", role: "columnheader", class: `c-${name}`, "aria-sort": name === key ? (this.down ? "descending" : "ascending") : "none",
      onclick: () => {
        this.down = name === this.by ? !this.down : !["op", "where", "limiter"].includes(name);
        this.by = name;
        this.sort();
      },
    }, label, el("i", { "aria-hidden": "true" }, name === key ? (this.down ? "↓" : "↑") : ""))));
    this.list.set(this.rows.length);
  },

  row(row) {
    const cells = COLUMNS.map(([name, , text]) => {
      if (name === "share") return el("span", { class: "c-share", role: "cell" }, el("i", { style: { width: `${(100 * row.share) / this.most}%` } }), el("em", {}, percent(row.share)));
      if (name === "times") return el("span", { class: "c-times", role: "cell" }, row.times > 1 ? `×${row.times}` : "");
      return el("span", { class: `c-${name}`, role: "cell" }, text(row));
    });
    return el("div", { class: "grid", role: "row", "data-keys": row.place }, ...cells);
  },

  key(key) {
    if (key !== "g" || !this.list) return false;
    this.grouped = !this.grouped;
    show("costs");
    return true;
  },

  find() {
    if (this.list) this.sort();
    return state.query ? this.rows || [] : [];
  },
};

const remarks = {
  title: "Remarks",
  hint: "what passes did and declined, by layer",
  kind: "all",

  show(host) {
    if (!state.data.remarks.length) return host.replaceChildren(empty("No remarks", "No pass said what it did or declined."));
    const of = (kind) => state.data.remarks.filter((one) => kind === "all" || one.kind === kind).length;
    const options = [["all", `All ${of("all")}`], ["passed", `Done ${of("passed")}`], ["missed", `Declined ${of("missed")}`]];
    const pick = (kind) => {
      this.kind = kind;
      this.update();
    };
    this.list = new RowList("Remarks", (i) => this.row(this.rows[i]), 50);
    this.list.drawn = () => light(state.key);
    host.replaceChildren(el("div", { class: "bar" }, choice("Kind", options, this.kind, pick)), el("div", { class: "remarks" }, this.list.host));
    linked(this.list.host, (key) => {
      state.pinned = key;
      show("phases");
      phases.lastHit = -1;
      state.pinned = -1;
      phases.pick(key);
    });
    this.update();
  },

  update() {
    const text = (one) => `${one.message} ${one.pass_name} ${one.rule} ${one.scope} ${one.file} ${one.suggestion}`.toLowerCase();
    this.rows = state.data.remarks.filter((one) => (this.kind === "all" || one.kind === this.kind) && text(one).includes(state.query));
    this.list.set(this.rows.length);
  },

  row(one) {
    const place = one.file ? `${basename(one.file)}:${one.line}` : "";
    return el("div", { class: `remark ${one.kind}`, "data-keys": one.file ? placeId(one.file, one.line, one.source) : "", title: one.source },
      el("span", { class: "kind" }, one.kind === "missed" ? "declined" : "done"),
      el("span", { class: "what" }, one.message, one.suggestion ? el("em", {}, ` Try: ${one.suggestion}`) : null),
      el("span", { class: "by" }, el("b", {}, one.pass_name), ` ${one.rule.startsWith(one.pass_name) ? one.rule.slice(one.pass_name.length) : one.rule}`),
      el("span", { class: "at" }, el("b", {}, one.scope), ` ${place}`));
  },

  find() {
    if (this.list) this.update();
    return state.query ? this.rows || [] : [];
  },
};

const timeline = {
  title: "Timeline",
  hint: "j k pass · enter or click opens it",

  show(host) {
    const { passes } = state.data, total = sum(passes.map((pass) => pass.ms)), whole = total || 1, most = Math.max(1, ...passes.map((pass) => Math.max(pass.before, pass.after)));
    let at = 0;
    this.rows = passes.map((pass, i) => {
      const from = at;
      at += pass.ms;
      const delta = pass.after - pass.before, did = Object.entries(pass.rules).map(([rule, n]) => `${n}× ${rule.split(" (")[0]}`).join(", ");
      return el("tr", { class: pass.changed ? "" : "idle", tabindex: "-1", onclick: () => open(i) },
        el("td", { class: "num dim" }, String(i)), el("td", { class: "dim" }, pass.phase), el("th", { scope: "row" }, i ? pass.name : "(as captured)"),
        el("td", { class: "lane" }, el("div", { style: { left: `${(100 * from) / whole}%`, width: `${(100 * pass.ms) / whole}%` } })),
        el("td", { class: "num" }, i ? `${digits(pass.ms)} ms` : ""), el("td", { class: "ops" }, el("div", { style: { width: `${(100 * (pass.after || pass.before)) / most}%` } })),
        el("td", { class: "num" }, i ? `${grouped(pass.before)} → ${grouped(pass.after)}` : ""),
        el("td", { class: `num ${delta < 0 ? "less" : delta > 0 ? "more" : "dim"}` }, delta && i ? `${delta > 0 ? "+" : "−"}${grouped(Math.abs(delta))}` : ""),
        el("td", { class: "did", title: did }, did));
    });
    const open = (i) => {
      state.pass = i;
      show("phases");
    };
    const names = ["#", "phase", "pass", "when", "time", "ops", "before → after", "", "did"];
    host.replaceChildren(el("div", { class: "bar" }, el("p", { class: "caption" }, el("b", {}, `${digits(total)} ms`), ` in ${Math.max(0, passes.length - 1)} passes, verification left out.`)),
      el("div", { class: "scroll" }, el("table", { class: "timeline" },
        el("thead", {}, el("tr", {}, ...names.map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, ...this.rows))));
    this.update();
  },

  update() {
    this.rows.forEach((row, i) => row.classList.toggle("chosen", i === state.pass));
    this.rows[state.pass]?.scrollIntoView({ block: "nearest" });
  },

  key(key) {
    if (key !== "Enter") return false;
    show("phases");
    return true;
  },
};
