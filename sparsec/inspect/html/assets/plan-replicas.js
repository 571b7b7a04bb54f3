// The experts of a layer: their load, and on which ranks they are.

const PLACES = [["expert", "expert"], ["load", "load"], ["most", "at most"], ["copies", "copies"], ["per", "per copy"], ["where", "on ranks (share)"]];

const replicas = {
  title: "Replicas",
  hint: "[ ] layer · / finds an expert (12) or a rank (rank 3)",
  by: "load",
  down: true,

  show(host) {
    if (!state.data.replicas) return host.replaceChildren(empty("Too many slots to show", "plan.json has them all."));
    const { layers } = state.data;
    this.field = el("select", { onchange: () => this.choose(Number(this.field.value)) }, ...layers.map((layer, i) => el("option", { value: String(i) }, `layer ${layer}`)));
    this.heads = el("div", { class: "grid places head", role: "row" });
    this.list = new RowList("Experts of the layer", (i) => this.row(this.rows[i]), 26);
    this.total = el("p", { class: "caption" });
    host.replaceChildren(el("div", { class: "bar" }, el("label", { class: "pick" }, "Layer ", this.field), this.total),
      el("div", { class: "table", role: "table", "aria-label": "Experts of the layer" }, this.heads, this.list.host));
    this.choose(state.layer);
  },

  choose(layer) {
    const { layers, replicas: found, experts, moved } = state.data;
    state.layer = clamp(layer, 0, layers.length - 1);
    this.field.value = String(state.layer);
    const of = found.size.flatMap((size, rank) => new Array(size).fill(rank)), fresh = new Set(moved?.slots[state.layer]);
    this.all = Array.from({ length: experts }, (_, expert) => ({ expert, load: found.mean[state.layer][expert], most: found.most[state.layer][expert], places: [] }));
    found.slots[state.layer].forEach((expert, slot) => this.all[expert].places.push({ rank: of[slot], share: found.split[state.layer][slot], fresh: fresh.has(slot) }));
    for (const one of this.all) {
      one.copies = one.places.length;
      one.per = one.load / one.copies;
      one.text = `expert ${one.expert} ${one.places.map((place) => `rank ${place.rank}`).join(" ")} `;
    }
    const twice = this.all.filter((one) => one.copies > 1).length;
    this.total.replaceChildren(el("b", {}, `${grouped(found.slots[state.layer].length)} slots`), ` hold ${experts} experts; ${twice} of them more than once, at most ${Math.max(...this.all.map((one) => one.copies))} times${moved ? `; ${fresh.size} slots to load anew, in yellow` : ""}`);
    this.sort();
  },

  sort() {
    const { query } = state, sign = this.down ? -1 : 1, key = this.by === "where" ? "expert" : this.by;
    const wanted = /^\d+$/.test(query) ? `expert ${query}` : query;
    this.rows = this.all.filter((one) => one.text.includes(wanted ? `${wanted} ` : ""));
    this.rows.sort((a, b) => sign * (a[key] - b[key]) || a.expert - b.expert);
    this.heads.replaceChildren(...PLACES.map(([name, label]) => el("button", {
      type: "button", role: "columnheader", class: `c-${name}`, "aria-sort": name === this.by ? (this.down ? "descending" : "ascending") : "none",
      onclick: () => {
        this.down = name === this.by ? !this.down : name !== "expert";
        this.by = name;
        this.sort();
      },
    }, label, el("i", { "aria-hidden": "true" }, name === this.by ? (this.down ? "↓" : "↑") : ""))));
    this.list.set(this.rows.length);
  },

  row(one) {
    const chips = one.places.map((place) => el("span", { class: `place${place.fresh ? " fresh" : ""}`, title: place.fresh ? "to be loaded anew" : "" },
      String(place.rank), one.copies > 1 ? el("small", {}, percent(place.share / 1000)) : null));
    return el("div", { class: "grid places", role: "row" }, el("span", { class: "c-expert", role: "cell" }, String(one.expert)),
      el("span", { class: "c-load", role: "cell" }, times(one.load)), el("span", { class: "c-most", role: "cell" }, times(one.most)),
      el("span", { class: "c-copies", role: "cell" }, String(one.copies)), el("span", { class: "c-per", role: "cell" }, times(one.per)), el("span", { class: "c-where", role: "cell" }, ...chips));
  },

  find() {
    if (this.list) this.sort();
    return state.query ? this.rows || [] : [];
  },

  key(key) {
    if (!this.list || (key !== "[" && key !== "]")) return false;
    this.choose(state.layer + (key === "]" ? 1 : -1));
    return true;
  },
};
