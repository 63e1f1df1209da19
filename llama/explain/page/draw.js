// Drawings that are used in several places: heat maps, histograms, bars and SVG.

const RANK_COLOURS = ["#e6a176", "#8fb8de", "#b5cf8f", "#d8a7c9", "#e3cf7a", "#9ad1c4", "#c3b1e1", "#d0b49f"];
const rankColour = (rank) => RANK_COLOURS[rank % RANK_COLOURS.length];

function colours() {
  const style = getComputedStyle(document.documentElement);
  const triple = (name) => style.getPropertyValue(name).split(",").map(Number);
  return { low: triple("--low"), high: triple("--high"), zero: triple("--zero") };
}

// Paint one pixel for each value. largest: the absolute value that gets the full colour. Values
// below zero have another colour. Minus infinity has the colour of zero.
function paint(canvas, rows, columns, value, largest) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  const { low, high, zero } = colours();
  for (let i = 0; i < rows * columns; i++) {
    const number = value(Math.floor(i / columns), i % columns);
    const part = Number.isFinite(number) ? Math.min(1, Math.abs(number) / largest) : 0;
    const end = number < 0 ? low : high;
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = zero[c] + (end[c] - zero[c]) * part;
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

// Row and column of the cell under the pointer.
function cellAt(event, canvas, rows, columns) {
  const box = canvas.getBoundingClientRect();
  const index = (part, n) => Math.max(0, Math.min(n - 1, Math.floor(part * n)));
  return [index((event.clientY - box.top) / box.height, rows),
    index((event.clientX - box.left) / box.width, columns)];
}

// Show the cell under the pointer, or the cell that the arrow keys choose on a focused canvas.
function readout(canvas, rows, columns, show) {
  let row = 0, column = 0;
  const move = (newRow, newColumn) => {
    row = Math.max(0, Math.min(rows - 1, newRow));
    column = Math.max(0, Math.min(columns - 1, newColumn));
    show(row, column);
  };
  const follow = (event) => move(...cellAt(event, canvas, rows, columns));
  canvas.onpointermove = follow;
  canvas.onpointerdown = follow;
  canvas.tabIndex = 0;
  canvas.onfocus = () => move(row, column);
  canvas.onkeydown = (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (!moves[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    move(row + moves[event.key][0], column + moves[event.key][1]);
  };
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function histogram(counts) {
  const most = Math.max(1, ...counts), width = 100 / counts.length;
  const bars = counts.map((n, i) => svg("rect", {
    x: i * width, y: 30 - (30 * n) / most, width: width * 0.9, height: (30 * n) / most,
    fill: "var(--dim)",
  }));
  return svg("svg", { class: "histogram", viewBox: "0 0 100 30", preserveAspectRatio: "none",
    "aria-hidden": "true" }, ...bars);
}

// The background of a cell or chip: the larger the part from 0 to 1, the stronger the colour.
const shade = (part) => `background: color-mix(in srgb, var(--accent) ${Math.round(65 * part)}%, var(--back))`;

// The head of a table with a column for each token of the prompt.
const tokenHead = (corner) => element("tr", {}, element("th", {}, corner), ...data.tokens.map((id, i) =>
  element("th", state.step === 0 && i === state.token ? { class: "here" } : {}, tokenText(id))));

// One row of a bar chart: text, bar, number. part: the length of the bar, from 0 to 1. isCut: the
// bar is grey.
function bar(text, part, number, isCut = false) {
  return [element("span", { class: "text" }, text),
    element("span", { class: isCut ? "bar cut" : "bar", style: `width: ${100 * part}%` }),
    element("span", {}, number)];
}

function table(head, rows) {
  const line = (cells, tag) => element("tr", {}, ...cells.map((cell) =>
    cell instanceof Node ? cell : element(tag, /^[\d,.]+( .iB| bytes)?$/.test(cell) ? { class: "number" } : {}, cell)));
  return element("table", {}, line(head, "th"), ...rows.map((row) => line(row, "td")));
}

// The card of a tensor: what it is, its values and its parts on the ranks.
function drawCard(card, name) {
  const found = tensor(name), kind = kindOf(name);
  const letters = kind.shape.replaceAll(" ", " × "), sizes = found.shape.join(" × ");
  const canvas = element("canvas", { role: "img", "aria-label": `values of ${name}` });
  const output = element("output", {});
  card.className = "card";
  card.replaceChildren(
    element("div", { class: "name" }, name),
    element("p", {}, kind.meaning),
    element("div", { class: "formula" }, kind.formula),
    element("div", { class: "facts" }, `${letters} = ${sizes}, ${found.dtype}; ${kind.place}`),
    canvas, ...ownerStrip(kind, found), output, histogram(found.histogram),
    element("div", { class: "facts" }, `from ${digits(found.min)} to ${digits(found.max)}, ` +
      `mean ${digits(found.mean)}, root mean square ${digits(found.rms)}`));
  const isOfHeads = kind.shape.startsWith("B H"), columns = found.columns;
  // Of the weights and scores of attention, the rows of the chosen head are drawn.
  const rows = isOfHeads ? found.shape[2] : found.rows, first = isOfHeads ? state.head * rows : 0;
  const largest = isOfHeads ? found.max : 3 * found.rms;
  paint(canvas, rows, columns, (row, column) => valueAt(name, first + row, column), largest || 1);
  readout(canvas, rows, columns, (shownRow, column) => {
    const row = first + shownRow;
    output.textContent = `${cellText(name, row, column)}: ${digits(valueAt(name, row, column))}`;
    Object.assign(output.dataset, { name, row, column });
  });
  if (isOfHeads) output.textContent = `head ${state.head}`;
  else if (data.stride > 1) output.textContent = `one feature of every ${data.stride} is shown`;
}

// The indices from a to b - 1 of a kind of thing, such as "head 0" or "heads 0 to 3".
const range = (kind, a, b) => (b - a === 1 ? `${kind} ${a}` : `${kind}s ${a} to ${b - 1}`);

// A strip below a heat map that shows which rank owns which columns. Attention's weights and scores
// have the heads as rows, so they have a line of text instead.
function ownerStrip(kind, found) {
  if (data.mp === 1) return [];
  const all = kind.exchange ? `${kind.exchange}: then every rank has all` : "every rank has all";
  if (!kind.owners) return [element("div", { class: "facts" }, all)];
  if (kind.shape.startsWith("B H")) {
    const parts = kind.owners.map(([a, b], rank) => `rank ${rank}: ${range("head", a, b)}`);
    return [element("div", { class: "facts" }, parts.join("; "))];
  }
  const end = kind.owners.at(-1)[1];
  const shared = kind.owners.filter(([a]) => a === kind.owners[0][0]).length;
  const owners = kind.owners.filter((_, rank) => rank % shared === 0);
  const spans = owners.map(([a, b], i) => {
    const ranks = shared > 1 ? `${i * shared}–${(i + 1) * shared - 1}` : `${i}`;
    return element("span", { title: `rank ${ranks}: ${a} to ${b - 1}`,
      style: `width: ${(100 * (b - a)) / end}%; background: ${rankColour(i * shared)}` }, `rank ${ranks}`);
  });
  const note = kind.exchange ? [element("div", { class: "facts" }, all)] : [];
  return [element("div", { class: "owner" }, ...spans), ...note];
}
