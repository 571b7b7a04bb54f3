// The graph of @main: modules open and close, repeated layers are one.

const graph = {
  title: "Graph",
  hint: "click opens and closes a module · + − zoom · e opens all, w closes all",
  open: new Map(),
  zoom: 1,

  show(host) {
    this.canvas = svg("svg", { role: "group", "aria-label": "Graph of the module" });
    this.host = el("div", { class: "graph", tabindex: "0" }, this.canvas);
    this.caption = el("p", { class: "caption" });
    host.replaceChildren(this.caption, this.host);
    linked(this.host, () => {});
    this.update();
  },

  update() {
    const pass = state.data.passes[state.pass], text = pass && textOf(pass.text);
    if (!text || !text.ops.length) return this.host.replaceChildren(empty("No ops", "The text of this pass has no @main."));
    if (this.text !== text) {
      this.text = text;
      this.tree = moduleTree(text.ops);
      this.leaves = leafEdges(text.ops, this.tree.root, this.tree.folded);
    }
    const heads = state.pass ? pass.name.split("{")[0] : pass.phase;
    this.caption.replaceChildren("After ", el("b", {}, heads), `, ${grouped(text.ops.length)} ops. `,
      el("span", { class: "dim" }, "j k steps through passes."));
    this.draw();
    if (this.host.firstChild !== this.canvas) this.host.replaceChildren(this.canvas);
  },

  isOpen(node) {
    const set = graph.open.get(node.id);
    if (set !== undefined) return set;
    let depth = 0;
    for (let at = node.parent; at; at = at.parent) depth += 1;
    return depth <= 1 || node.times > 1 || (depth === 2 && node.kids.some((kid) => kid.times > 1));
  },

  draw() {
    const { root } = this.tree, edges = layOut(root, this.leaves, this.isOpen);
    const boxes = svg("g"), lines = svg("g", { class: "edges" });
    this.byNode = new Map();
    const visit = (node) => {
      if (node.parent) boxes.append(this.box(node));
      for (const kid of (node.op || (node.parent && !this.isOpen(node)) ? [] : node.drawn)) visit(kid);
    };
    visit(root);
    for (const [from, to] of edges) {
      if (!this.byNode.has(from) || !this.byNode.has(to)) continue;
      const line = this.edge(from, to);
      lines.append(line);
      for (const end of [from, to]) this.byNode.get(end).push(line);
    }
    const outer = svg("g"), groups = [...boxes.children].filter((box) => box.classList.contains("open"));
    outer.append(...groups);
    this.canvas.replaceChildren(outer, lines, boxes);
    this.size();
  },

  size() {
    const { w, h } = this.tree.root;
    fill(this.canvas, { viewBox: `0 0 ${w} ${h}`, width: w * this.zoom, height: h * this.zoom }, []);
  },

  box(node) {
    const isOpen = !node.op && this.isOpen(node), lines = [];
    this.byNode.set(node, lines);
    const kind = node.op ? (/^(moe|kernel)\./.test(node.op.name) ? "own" : "op") : isOpen ? "open" : "shut";
    const light_ = (on) => lines.forEach((line) => line.classList.toggle("on", on));
    const toggle = () => {
      if (node.op) return;
      this.open.set(node.id, !isOpen);
      this.draw();
      byId("view").querySelector(`[data-node="${CSS.escape(node.id)}"]`)?.focus();
    };
    const name = node.op ? title(node) : shortName(node);
    const text = title(node) + (node.cut ? `, first ${MOST} shown` : "");
    const group = svg("g", {
      class: `node ${kind}`, transform: `translate(${node.x} ${node.y})`, "data-node": node.id,
      "data-keys": node.op && node.op.keys ? node.op.keys.join(" ") : undefined,
      role: node.op ? "img" : "button", tabindex: node.op ? undefined : "0", "aria-label": text,
      "aria-expanded": node.op ? undefined : String(isOpen),
      onclick: toggle, onpointerenter: () => light_(true), onpointerleave: () => light_(false),
      onkeydown: (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        toggle();
      },
    }, svg("rect", { width: node.w, height: node.h, rx: 5 }), svg("text", { x: isOpen ? PAD : node.w / 2, y: 17 }, name, node.op ? null : svg("tspan", { class: "dim" }, text.slice(name.length))));
    const { op } = node;
    group.append(svg("title", {}, op ? `${op.results.join(", ")} = ${op.name}\n${op.type}\n${op.scope}` : node.path));
    return group;
  },

  edge(from, to) {
    const x1 = from.x + from.w / 2, y1 = from.y + from.h, x2 = to.x + to.w / 2, y2 = to.y;
    const bend = clamp(Math.abs(y2 - y1) / 2, 10, 60);
    return svg("path", { d: `M${x1} ${y1}C${x1} ${y1 + bend} ${x2} ${y2 - bend} ${x2} ${y2}` });
  },

  key(key) {
    if (key === "+" || key === "=" || key === "-") {
      this.zoom = clamp(this.zoom * (key === "-" ? 0.8 : 1.25), 0.2, 4);
      this.size();
    } else if (key === "e" || key === "w") {
      const visit = (node) => {
        if (node.op) return;
        if (node.parent) this.open.set(node.id, key === "e");
        node.kids.forEach(visit);
      };
      visit(this.tree.root);
      this.draw();
    } else return false;
    return true;
  },

  find(query) {
    const found = [...this.canvas.querySelectorAll(".node")];
    this.found = found.filter((node) => query && (node.getAttribute("aria-label").toLowerCase().includes(query) ||
      (node.querySelector("title")?.textContent || "").toLowerCase().includes(query)));
    found.forEach((node) => node.classList.toggle("found", this.found.includes(node)));
    return this.found;
  },

  reveal(node) {
    node.scrollIntoView({ block: "center", inline: "center" });
  },
};
