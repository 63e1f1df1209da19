// The drawings of one layer: groups of heads, rotations, attention patterns, and the split over ranks.

// Query heads above, key/value heads below, a line from each query head to the head it reads.
function drawGroups() {
  const { n_heads, n_kv_heads } = model, unit = 44, share = n_heads / n_kv_heads;
  const width = n_heads * unit + 110, nodes = [];
  const x = (head) => 105 + head * unit, kvX = (head) => x(head * share + (share - 1) / 2);
  const fill = (owners, head) => {
    const rank = owners ? owners.findIndex(([a, b]) => a <= head && head < b) : 0;
    return data.mp > 1 ? rankColour(rank) : "var(--panel)";
  };
  const box = (centre, y, text, colour, isChosen) => nodes.push(
    svg("rect", { x: centre - 18, y, width: 36, height: 22, rx: 4, fill: colour,
      stroke: isChosen ? "var(--accent)" : "var(--line)", "stroke-width": isChosen ? 3 : 1 }),
    svg("text", { x: centre, y: y + 15, "text-anchor": "middle",
      style: data.mp > 1 ? "fill: #111" : "" }, text));
  for (let head = 0; head < n_heads; head++) {
    const kv = Math.floor(head / share);
    nodes.push(svg("line", { x1: x(head), y1: 32, x2: kvX(kv), y2: 70, class: "edge" }));
    box(x(head), 10, `Q ${head}`, fill(data.kinds["layers.N.attention.queries"].owners, head),
      head === state.head);
  }
  for (let head = 0; head < n_kv_heads; head++) {
    box(kvX(head), 70, `KV ${head}`, fill(data.kinds["layers.N.attention.keys"].owners, head),
      head === Math.floor(state.head / share));
  }
  nodes.push(svg("text", { x: 0, y: 25 }, "queries"), svg("text", { x: 0, y: 85 }, "keys, values"));
  byId("groups").replaceChildren(svg("svg", { width, height: 104, role: "img",
    "aria-label": `${n_heads} query heads share ${n_kv_heads} key/value heads` }, ...nodes));
}

// For at most eight pairs of features of the chosen query: the point before and after the rotation.
// If the page has not all features, the rotation of the point (1, 0) is drawn.
function drawDials() {
  const pairs = model.head_dim / 2, shown = Math.min(8, pairs);
  const place = position(state.token), radius = 34;
  const figures = [];
  for (let i = 0; i < shown; i++) {
    const pair = Math.round((i * (pairs - 1)) / Math.max(1, shown - 1));
    const angle = place * data.frequencies[pair];
    const nodes = [svg("circle", { cx: 0, cy: 0, r: radius, class: "edge" })];
    const column = state.head * model.head_dim + 2 * pair;
    if (data.stride === 1) {
      const point = (name) => [0, 1].map((k) => valueAt(withLayer(name), state.token, column + k));
      const before = point("layers.N.attention.wq"), after = point("layers.N.attention.queries");
      const size = Math.hypot(...before) || 1;
      const arrow = ([a, b], colour) => svg("line", { x1: 0, y1: 0, x2: (radius * a) / size,
        y2: (-radius * b) / size, stroke: colour, "stroke-width": 3 });
      nodes.push(arrow(before, "var(--dim)"), arrow(after, "var(--accent)"));
    } else {
      nodes.push(svg("line", { x1: 0, y1: 0, x2: radius, y2: 0, stroke: "var(--dim)", "stroke-width": 3 }),
        svg("line", { x1: 0, y1: 0, x2: radius * Math.cos(angle), y2: -radius * Math.sin(angle),
          stroke: "var(--accent)", "stroke-width": 3 }));
    }
    figures.push(element("figure", {},
      svg("svg", { width: 76, height: 76, viewBox: "-38 -38 76 76", "aria-hidden": "true" }, ...nodes),
      element("figcaption", {}, `pair ${pair}`, element("br"), `${place} × ${digits(data.frequencies[pair])}`,
        element("br"), `= ${digits(angle)} rad`)));
  }
  byId("dials").replaceChildren(...figures);
}

// The pattern of each head, and what the chosen token looks at with the chosen head.
function drawPatterns() {
  const name = withLayer("layers.N.attention.weights"), { shape } = tensor(name);
  const [, heads, length, visible] = shape;
  const patterns = [];
  for (let head = 0; head < heads; head++) {
    const canvas = element("canvas", { "aria-hidden": "true" });
    paint(canvas, length, visible, (row, column) => valueAt(name, head * length + row, column), 1);
    const button = element("button", { class: length === 1 ? "pattern row" : "pattern",
      "aria-pressed": head === state.head, onclick: () => choose({ head }) }, canvas, `head ${head}`);
    canvas.onpointermove = (event) => {
      const [row, column] = cellAt(event, canvas, length, visible);
      showWeight(name, head * length + row, column);
    };
    patterns.push(button);
  }
  byId("patterns").replaceChildren(...patterns);
  const row = state.head * length + state.token;
  const place = position(state.token);
  byId("looks").textContent = `With head ${state.head} of layer ${state.layer}, token ${tokenAt(place)} looks at:`;
  const chips = [];
  for (let column = 0; column <= place; column++) {
    const weight = valueAt(name, row, column);
    chips.push(element("span", { class: "chip", style: shade(weight) },
    tokenText(allTokens()[column]), element("small", {}, percent(weight))));
  }
  byId("weights").replaceChildren(...chips);
}

function showWeight(name, row, column) {
  byId("looks").textContent = `${cellText(name, row, column)}: ${percent(valueAt(name, row, column))}`;
}

// One layer of the model on all ranks, with the exchanges between them.
function drawSplit() {
  const place = byId("split"), n = data.mp;
  if (n === 1) {
    place.replaceChildren(element("p", {}, "This page shows one rank. The option --mp 2 of llama " +
      "explain draws how two ranks share each tensor and where they exchange results."));
    return;
  }
  const gap = 14, width = Math.max(190, 500 / n), total = n * (width + gap);
  const nodes = [], x = (rank) => rank * (width + gap) + gap / 2;
  const arrow = (from, to, at) => nodes.push(svg("line", { x1: at, y1: from, x2: at, y2: to,
    stroke: "var(--dim)", "marker-end": "url(#tip)" }));
  const whole = (y, text) => nodes.push(
    svg("rect", { x: gap / 2, y, width: total - gap, height: 26, rx: 4, fill: "var(--accent-back)",
      stroke: "var(--line)" }),
    svg("text", { x: total / 2, y: y + 17, "text-anchor": "middle" }, text));
  const part = (y, lines) => {
    for (let rank = 0; rank < n; rank++) {
      nodes.push(svg("rect", { x: x(rank), y, width, height: 16 * lines(rank).length + 8, rx: 4,
        fill: rankColour(rank) }));
      lines(rank).forEach((line, i) => nodes.push(svg("text", { x: x(rank) + width / 2,
        y: y + 16 * (i + 1), "text-anchor": "middle", style: "fill: #111" }, line)));
      arrow(y - 18, y - 2, x(rank) + width / 2);
      arrow(y + 16 * lines(rank).length + 8, y + 16 * lines(rank).length + 24, x(rank) + width / 2);
    }
  };
  const partOf = (name, rank, unit) => range(unit, ...data.kinds[name].owners[rank]);
  whole(6, "residual stream and attention_norm: every rank has all");
  part(52, (rank) => [`rank ${rank}`, `wq: ${partOf("layers.N.attention.queries", rank, "query head")}`,
    `wk, wv: ${partOf("layers.N.attention.keys", rank, "head")}`, "attention of these heads",
    "wo: a partial sum"]);
  whole(160, "all-reduce: the partial sums are added; then ffn_norm on every rank");
  part(206, (rank) => [`rank ${rank}`, `w1, w3: ${partOf("layers.N.feed_forward.w1", rank, "feature")}`,
    "silu(w1) · w3", "w2: a partial sum"]);
  whole(298, "all-reduce: the partial sums are added; on to the next layer");
  const tip = svg("defs", {}, svg("marker", { id: "tip", viewBox: "0 0 8 8", refX: 7, refY: 4,
    markerWidth: 7, markerHeight: 7, orient: "auto" }, svg("path", { d: "M0 0 L8 4 L0 8 z", fill: "var(--dim)" })));
  const drawing = svg("svg", { viewBox: `0 0 ${total} 332`,
    style: `width: 100%; max-width: ${total}px; min-width: ${170 * n}px`, role: "img",
    "aria-label": `one layer on ${n} ranks` }, tip, ...nodes);
  const exchanges = 2 * model.n_layers + 1;
  place.replaceChildren(
    element("p", {}, `One layer on ${n} ranks. The matrices wq, wk, wv, w1 and w3 are split by rows: ` +
      "each rank computes its own heads and features without any exchange. The matrices wo and w2 are " +
      "split by columns: each rank gets a partial sum, and an all-reduce adds the sums. A forward has " +
      `${exchanges} exchanges before the logits: one after the embedding and two a layer.`),
    element("div", { class: "scroll" }, drawing));
}
