// The sections of the page, and what happens when something is chosen.

function drawTokens() {
  const chips = allTokens().map((id, i) => {
    const { special, bytes: hex } = data.vocabulary[id], isNew = i >= data.tokens.length;
    return element("button", {
      class: `chip${special ? " special" : ""}${isNew ? " new" : ""}`,
      "aria-pressed": i === position(state.token),
      title: special ? "special token" : `bytes ${hex}`,
      onclick: () => choose(isNew ? { step: 1, token: 0 } : { step: 0, token: i }),
    }, tokenText(id), element("small", {}, `${id}`), element("small", {}, special ? "special" : hex));
  });
  byId("chips").replaceChildren(...chips.slice(0, data.tokens.length + 1));
}

function drawControls() {
  const options = (select, texts, chosen) => {
    byId(select).replaceChildren(...texts.map((text, i) => element("option", { value: i }, text)));
    byId(select).value = chosen;
  };
  options("token", step().tokens.map((_, i) => tokenAt(position(i))), state.token);
  options("layer", Array.from({ length: model.n_layers }, (_, i) => `${i}`), state.layer);
  options("head", Array.from({ length: model.n_heads }, (_, i) => `${i}`), state.head);
  byId("step").value = state.step;
}

function drawResidual() {
  const { names, rms } = data.residual;
  const most = Math.max(...rms.flat());
  const rows = names.map((name, r) => element("tr", {}, element("th", { class: "name" }, name),
    ...rms[r].map((size) => element("td", { class: "number",
      style: shade(size / most) },
    digits(size)))));
  byId("residual").replaceChildren(element("table", {}, tokenHead(""), ...rows));
}

function drawLens() {
  const { ids, probs } = data.lens;
  const rows = ids.map((row, stage) => element("tr", {},
    element("th", {}, stage === 0 ? "embedding" : `layer ${stage - 1}`),
    ...row.map((likeliest, i) => element("td", {
      title: likeliest.map((id, k) => `${tokenText(id)} ${percent(probs[stage][i][k])}`).join("\n"),
      style: shade(probs[stage][i][0]),
    }, tokenText(likeliest[0])))));
  byId("lens-table").replaceChildren(element("table", { class: "lens" }, tokenHead("after"), ...rows));
}

function drawPredictions() {
  const token = Math.min(position(state.token), data.tokens.length - 1);
  for (const node of document.querySelectorAll(".token-name")) node.textContent = tokenAt(token);
  const { ids, probs } = data.predictions;
  byId("predictions").replaceChildren(...ids[token].flatMap((id, i) =>
    bar(tokenText(id), probs[token][i] / probs[token][0], percent(probs[token][i]))));
}

// The logits of the tokens that can be drawn, the largest first.
const sortedLogits = new Float32Array(bytesOf(data.logits)).filter((x) => x > -Infinity).sort().reverse();

// The distribution of the next token at this temperature, and how many tokens top-p keeps.
function nucleus(temperature, topP) {
  const largest = sortedLogits[0];
  const weights = temperature === 0
    ? sortedLogits.map((_, i) => (i === 0 ? 1 : 0))
    : sortedLogits.map((x) => Math.exp((x - largest) / temperature));
  const total = weights.reduce((sum, w) => sum + w, 0);
  const probs = Array.from(weights, (w) => w / total);
  let before = 0, kept = 0;
  while (kept < probs.length && before <= topP && probs[kept] > 0) before += probs[kept++];
  return { probs, kept, mass: before };
}

function drawSampling() {
  const temperature = Number(byId("temperature").value), topP = Number(byId("top-p").value);
  byId("temperature-value").textContent = temperature.toFixed(2);
  byId("top-p-value").textContent = topP.toFixed(2);
  const { probs, kept, mass } = nucleus(temperature, topP);
  byId("kept").textContent = temperature === 0 ? "The likeliest token is taken."
    : kept === 1 ? `Only the likeliest of ${count(probs.length)} tokens is kept.`
      : `${count(kept)} of ${count(probs.length)} tokens are kept. Together they have ${percent(mass)} ` +
        "of the probability, which is scaled to 100 % before one is drawn.";
  const rows = [];
  data.candidates.slice(0, 24).forEach((id, i) => {
    if (i === kept) rows.push(element("span", { class: "line" }));
    const chance = i < kept ? ` → ${percent(probs[i] / mass)}` : " → 0";
    rows.push(...bar(tokenText(id), probs[i] / probs[0], percent(probs[i]) + chance, i >= kept));
  });
  byId("candidates").replaceChildren(...rows);
}

function drawCosts() {
  const costs = data.costs, n = data.tokens.length;
  const block = (k, name) => data.steps[k].tensors[`layers.0.${name}`].shape.join(" × ");
  const rows = ["attention.wq", "attention.keys", "attention.cache_k", "attention.weights", "feed_forward.w1"]
    .map((name) => [`layers.0.${name}`, block(0, name), block(1, name)]);
  byId("costs").replaceChildren(
    table(["tensor", `prompt: ${n} tokens`, "next token, with the cache"], rows),
    element("p", { id: "saved" }, `The step takes ${count(costs.flops_with_cache)} floating-point ` +
      `operations with the cache and ${count(costs.flops_without_cache)} without it, which is about ` +
      `${Math.round(costs.flops_without_cache / costs.flops_with_cache)} times as many. The cache holds ` +
      `${bytes(costs.cache_bytes_per_token)} a token, ${bytes(costs.cache_bytes)} for ${n + 1} tokens.`));
}

function drawTable() {
  const rows = Object.entries(data.kinds).map(([name, kind]) => {
    const found = data.steps[0].tensors[name.replace("layers.N", "layers.0")];
    const parts = kind.owners ? kind.owners.map(([a, b], rank) => `${rank}: ${b - a === 1 ? a : `${a}–${b - 1}`}`).join(", ") : "all";
    return [name, `${kind.shape.replaceAll(" ", " × ")} = ${found.shape.join(" × ")}`, found.dtype,
      kind.formula, kind.place, ...(data.mp > 1 ? [kind.exchange ? `${parts}; ${kind.exchange}` : parts] : [])];
  });
  byId("table").replaceChildren(table(["name", "shape", "dtype", "formula", "code",
    ...(data.mp > 1 ? ["part of each rank"] : [])], rows));
}

// Draw all that depends on the choice.
function draw() {
  drawControls();
  drawTokens();
  drawResidual();
  drawGroups();
  drawDials();
  drawPatterns();
  drawLens();
  drawPredictions();
  for (const node of document.querySelectorAll(".layer-number")) node.textContent = state.layer;
  for (const card of document.querySelectorAll("[data-tensor]")) drawCard(card, withLayer(card.dataset.tensor));
}

function choose(change) {
  if (change.step === 0 && state.step === 1) state.token = tokenOfPrompt;
  Object.assign(state, change);
  const last = step().tokens.length - 1;
  state.token = Math.max(0, Math.min(last, state.token));
  state.layer = Math.max(0, Math.min(model.n_layers - 1, state.layer));
  state.head = Math.max(0, Math.min(model.n_heads - 1, state.head));
  if (state.step === 0) tokenOfPrompt = state.token;
  draw();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  draw();
}

function start() {
  byId("model").textContent = model.name;
  document.title = `${data.tokens.slice(0, 8).map(tokenText).join("")} – through Llama`;
  const scaled = model.rope_factor ? `, scaled by ${model.rope_factor}` : "";
  byId("summary").textContent = `${count(model.parameters)} parameters in ${model.n_layers} layers; ` +
    `${model.dim} features a token; ${model.n_heads} query heads on ${model.n_kv_heads} key/value heads ` +
    `of ${model.head_dim}; feed-forward ${model.ffn_dim}; vocabulary ${count(model.vocab_size)}; RoPE theta ` +
    `${count(model.rope_theta)}${scaled}; computed in ${model.dtype}. Values of tensors are rounded to three digits.`;
  for (const node of document.querySelectorAll("[data-size]")) node.textContent = count(model[node.dataset.size]);
  byId("contents").append(...[...document.querySelectorAll("section")].map((section) =>
    element("li", {}, element("a", { href: `#${section.id}` }, section.querySelector("h2").textContent.replace(/ in layer .*/, "")))));
  for (const name of ["step", "token", "layer", "head"]) {
    byId(name).onchange = (event) => choose({ [name]: Number(event.target.value) });
  }
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const flip = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  byId("theme").onclick = flip;
  byId("temperature").oninput = drawSampling;
  byId("top-p").oninput = drawSampling;
  const keys = {
    ArrowLeft: () => choose({ token: state.token - 1 }), ArrowRight: () => choose({ token: state.token + 1 }),
    "[": () => choose({ layer: state.layer - 1 }), "]": () => choose({ layer: state.layer + 1 }),
    ",": () => choose({ head: state.head - 1 }), ".": () => choose({ head: state.head + 1 }),
    s: () => choose({ step: 1 - state.step }), t: flip,
  };
  document.onkeydown = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
    keys[event.key.length === 1 ? event.key.toLowerCase() : event.key]?.();
  };
  setTheme(isDark ? "dark" : "light");
  drawSampling();
  drawCosts();
  drawSplit();
  drawTable();
}

start();
