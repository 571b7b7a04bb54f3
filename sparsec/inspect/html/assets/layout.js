// The ops of @main as a tree of modules, layers that repeat folded into one, laid out from top to bottom.

const ROW = 26, GAP = 14, PAD = 12, HEAD = 24, CHAR = 6.6;
const MOST = 600; // ops of one module that are drawn

/** The tree: nodes {id, label, path, kids, ops, times}; leaves hold `op`. */
function moduleTree(ops) {
  const root = { id: "", label: "", path: "", kids: [], parent: null, times: 1, first: 0 };
  const byPath = new Map([["", root]]);
  const enter = (path, first) => {
    if (byPath.has(path)) return byPath.get(path);
    const cut = path.lastIndexOf("."), parent = enter(cut < 0 ? "" : path.slice(0, cut), first);
    const node = { id: path, label: path.slice(cut + 1), path, kids: [], parent, times: 1, first };
    parent.kids.push(node);
    byPath.set(path, node);
    return node;
  };
  ops.forEach((op, i) => {
    const parent = enter(op.scope, i);
    parent.kids.push({ id: `op ${i}`, label: op.name, op, kids: [], parent, times: 1, first: i });
  });
  const folded = new Map(); // leaf id -> the leaf that stands for it
  fold(root, folded);
  count(root);
  return { root, folded };
}

/** What a module is made of: repeated layers have the same. */
function signature(node) {
  if (node.op) return node.op.name + node.op.type;
  return `(${node.kids.map((kid) => (kid.op ? "" : /^\d+$/.test(kid.label) ? "#" : kid.label) + signature(kid)).join(";")})`;
}

function fold(node, folded) {
  const kept = [];
  for (const kid of node.kids) {
    const last = kept.at(-1);
    if (/^\d+$/.test(kid.label) && last && /^\d+$/.test(last.label) && !last.op) {
      kid.signature = signature(kid);
      last.signature ??= signature(last);
      if (kid.signature === last.signature) {
        last.times += 1;
        last.until = kid.label;
        merge(last, kid, folded);
        continue;
      }
    }
    kept.push(kid);
  }
  node.kids = kept;
  for (const kid of kept) if (!kid.op) fold(kid, folded);
}

function merge(into, from, folded) {
  from.kids.forEach((kid, i) => {
    if (kid.op) folded.set(kid.id, into.kids[i]);
    else merge(into.kids[i], kid, folded);
  });
}

function count(node) {
  node.ops = node.op ? 1 : sum(node.kids.map(count));
  return node.ops * node.times;
}

/** Edges between leaves: [from, to], through `folded`. */
function leafEdges(ops, root, folded) {
  const leaves = new Map(), made = new Map(), edges = [];
  const visit = (node) => (node.op ? leaves.set(node.id, node) : node.kids.forEach(visit));
  visit(root);
  const leaf = (i) => folded.get(`op ${i}`) || leaves.get(`op ${i}`);
  ops.forEach((op, i) => {
    for (const value of new Set(op.operands)) {
      if (made.has(value)) edges.push([leaf(made.get(value)), leaf(i)]);
    }
    for (const value of op.results) made.set(value, i);
  });
  return edges.filter(([from, to]) => from && to && from !== to);
}

/** The node in sight that stands for a leaf: itself, or the outermost closed module around it. */
function standIn(leaf, isOpen) {
  let shown = leaf;
  for (let node = leaf.parent; node && node.parent; node = node.parent) if (!isOpen(node)) shown = node;
  return shown;
}

/** Give every node in sight x, y, w, h; edges between those in sight. */
function layOut(root, leaves, isOpen) {
  const pairs = new Map();
  for (const [a, b] of leaves) {
    const from = standIn(a, isOpen), to = standIn(b, isOpen);
    if (from !== to && !inside(to, from) && !inside(from, to)) pairs.set(`${from.id} ${to.id}`, [from, to]);
  }
  const edges = [...pairs.values()];
  measure(root, edges, isOpen);
  shift(root, 0, 0);
  return edges;
}

function inside(node, group) {
  for (let at = node.parent; at; at = at.parent) if (at === group) return true;
  return false;
}

function measure(node, edges, isOpen) {
  const label = title(node);
  node.cut = 0;
  if (node.op || (node.parent && !isOpen(node))) {
    node.w = Math.max(70, label.length * CHAR + 22);
    node.h = ROW;
    return;
  }
  const kids = node.kids.slice(0, MOST);
  node.cut = node.kids.length - kids.length;
  node.drawn = kids;
  for (const kid of kids) measure(kid, edges, isOpen);
  const own = new Map();
  for (const kid of kids) kid.rank = 0;
  for (const [from, to] of edges) {
    const [a, b] = [childOf(from, node), childOf(to, node)];
    if (a && b && a !== b && a.first < b.first && kids.includes(a) && kids.includes(b)) own.set(`${a.id} ${b.id}`, [a, b]);
  }
  const before = new Map(kids.map((kid) => [kid, []]));
  for (const [a, b] of own.values()) before.get(b).push(a);
  for (const kid of [...kids].sort((x, y) => x.first - y.first)) {
    for (const other of before.get(kid)) kid.rank = Math.max(kid.rank, other.rank + 1);
  }
  const ranks = [];
  for (const kid of kids) (ranks[kid.rank] ||= []).push(kid);
  const span = (rank) => sum(rank.map((kid) => kid.w)) + GAP * (rank.length - 1);
  const inner = Math.max(label.length * CHAR + 30, ...ranks.map(span));
  let y = node.parent ? HEAD + 6 : PAD;
  for (const rank of ranks) {
    const aim = (kid) => { // below what it reads
      const from = before.get(kid);
      return from.length ? sum(from.map((other) => other.dx + other.w / 2)) / from.length : inner / 2;
    };
    rank.sort((a, b) => aim(a) - aim(b) || a.first - b.first);
    let x = PAD + (inner - span(rank)) / 2;
    const tall = Math.max(...rank.map((kid) => kid.h));
    for (const kid of rank) {
      [kid.dx, kid.dy] = [x, y + (tall - kid.h) / 2];
      x += kid.w + GAP;
    }
    y += tall + GAP + 6;
  }
  node.w = inner + 2 * PAD;
  node.h = y - GAP + 4;
}

function childOf(node, group) {
  let at = node;
  while (at && at.parent !== group) at = at.parent;
  return at;
}

function shift(node, x, y) {
  [node.x, node.y] = [x, y];
  for (const kid of node.drawn || []) shift(kid, x + kid.dx, y + kid.dy);
}

function title(node) {
  if (node.op) return node.op.callee ? `@${node.op.callee}` : node.op.name.replace(/^aten\./, "");
  return `${shortName(node)} · ${grouped(node.ops)} op${node.ops === 1 ? "" : "s"}`;
}

function shortName(node) {
  return node.until ? `${node.label}–${node.until} ×${node.times}` : node.label;
}
