// The page's data, what is chosen on the page, and numbers, tokens and cells as text.

const data = JSON.parse(document.getElementById("data").textContent);
const model = data.model;
// What is chosen. step: 0 is the prompt, 1 the next token. token: a row of the step's tensors.
const state = { step: 0, token: data.tokens.length - 1, layer: 0, head: 0 };
let tokenOfPrompt = state.token; // the one that was chosen last

const byId = (id) => document.getElementById(id);
const step = () => data.steps[state.step];
const position = (row) => step().start_pos + row;
const allTokens = () => [...data.tokens, ...data.generated];
const withLayer = (name) => name.replace("layers.N", `layers.${state.layer}`);

// An element with attributes and children. A child that is a string becomes text, never markup.
function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") node.onclick = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0)).buffer;
}

// A float16 number from its 16 bits.
function half(bits) {
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
}

// A tensor of the chosen step with its values as numbers. They are decoded at the first use.
function tensor(name) {
  const found = step().tensors[name];
  if (!found.numbers) {
    const halves = new Uint16Array(bytesOf(found.values));
    found.numbers = Float32Array.from(halves, (bits) => half(bits) * found.scale);
    found.rows = found.numbers.length / found.columns;
  }
  return found;
}

const valueAt = (name, row, column) => {
  const { numbers, columns } = tensor(name);
  return numbers[row * columns + column];
};

// A number with three digits: -0.0123, 4.56, 1.23e-7, −∞.
function digits(number) {
  if (number === null) return "–";
  if (number === -Infinity) return "−∞";
  if (number === 0) return "0";
  const size = Math.abs(number);
  const text = size < 1e-4 || size >= 1e6 ? number.toExponential(2) : number.toPrecision(3);
  return text.includes("e") && size >= 1000 && size < 1e6 ? String(Math.round(number)) : text;
}

const percent = (p) => `${(100 * p).toPrecision(3)} %`;
const count = (n) => n.toLocaleString("en");

function bytes(n) {
  for (const unit of ["bytes", "KiB", "MiB", "GiB"]) {
    if (n < 1024 || unit === "GiB") return `${unit === "bytes" ? n : n.toFixed(2)} ${unit}`;
    n /= 1024;
  }
}

// A token as it is shown: a space as ·, a line break as ⏎, a tab as ⇥, bytes that are no character
// as their digits, and an id without text as the id.
function tokenText(id) {
  const { text, special } = data.vocabulary[id];
  if (special) return text || `id ${id}`;
  if (/[\ufffd\u0000-\u0008\u000b-\u001f\u007f-\u009f]/.test(text)) return `bytes ${data.vocabulary[id].bytes}`;
  return text.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || `id ${id}`;
}

// The kind of a tensor, which has its formula, meaning and split.
const kindOf = (name) => data.kinds[name.replace(/^layers\.\d+/, "layers.N")];

// What the row and the column of a heat map stand for, such as "3 “fox”, head 1, feature 17".
function cellText(name, row, column) {
  const shape = kindOf(name).shape.split(" ");
  if (shape[1] === "H") {
    const length = tensor(name).shape[2];
    return `head ${Math.floor(row / length)}: ${tokenAt(position(row % length))} looks at ` +
      tokenAt(column);
  }
  const token = tokenAt(shape[1] === "T" ? row : position(row));
  const feature = column * data.stride;
  const last = shape.at(-1);
  if (name === "freqs_cis") {
    return `${tokenAt(position(row))}, pair ${Math.floor(feature / 2)}, ${feature % 2 ? "sine" : "cosine"}`;
  }
  if (last.endsWith("hd")) {
    const head = Math.floor(feature / model.head_dim);
    return `${token}, head ${head}, feature ${feature % model.head_dim}`;
  }
  return last === "V" ? `${token}, logit of id ${feature}` : `${token}, feature ${feature}`;
}

const tokenAt = (index) => `${index} “${tokenText(allTokens()[index])}”`;
