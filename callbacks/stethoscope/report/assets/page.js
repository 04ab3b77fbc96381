"use strict";
// Fills the figures of layers, and keeps them on one chosen cell: a layer and a step.

const data = JSON.parse(document.getElementById("data").textContent);
const chosen = { statistic: 0, row: 0, column: 0, histogram: 0 };
const at = (id) => document.getElementById(id);
const SEVERITY = { error: "#c1121f", warning: "#b35900", info: "#0067a5" };
const NAN = 3.35e38, INF = 3.2e38;

// Numbers

function decode(text, Kind) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Kind(bytes.buffer);
}

function show(value) {
  if (Number.isNaN(value)) return "not measured";
  if (value > NAN) return "NaN";
  if (value > INF) return "Inf";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-4 ? value.toExponential(2) : String(Number(value.toPrecision(3)));
}

// Place of a value on the scale of a statistic: 0 is low, 1 is high.
function bend(statistic, value) {
  if (statistic.scale === "log") return Math.log10(value);
  return statistic.scale === "asinh" ? Math.asinh(value / statistic.knee) : value;
}

function unbend(statistic, place) {
  if (statistic.scale === "log") return 10 ** place;
  return statistic.scale === "asinh" ? Math.sinh(place) * statistic.knee : place;
}

function place(statistic, value) {
  const low = bend(statistic, statistic.low), high = bend(statistic, statistic.high);
  return (bend(statistic, value) - low) / (high - low);
}

function colour(statistic, value) {
  if (Number.isNaN(value)) return NaN;
  if (value > INF) return 2;
  if (value === 0 && statistic.scale === "log") return -1;
  if (value < 0 && statistic.scale === "log") return 0;
  return Math.min(1, Math.max(0, place(statistic, value)));
}

function span(steps) {
  return steps[0] === steps[1] ? `step ${steps[0]}` : `steps ${steps[0]} to ${steps[1]}`;
}

function short(name, most) {
  if (name.length <= most) return name;
  const end = Math.ceil(most * 0.7);
  return `${name.slice(0, most - end - 1)}…${name.slice(-end)}`;
}

// Axes

function label(axis, places, texts) {
  axis.ticker.ticks = places;
  axis.major_label_overrides = new Map(places.map((value, index) => [value, texts[index]]));
}

function evenly(count, most) {
  if (count <= most) return Array.from({ length: count }, (_, index) => index);
  const every = Math.ceil(count / most);
  return Array.from({ length: Math.ceil(count / every) }, (_, index) => index * every);
}

const narrow = () => window.innerWidth < 700;

function model(name) {
  for (const doc of Bokeh.documents) {
    const found = doc.get_model_by_name(name);
    if (found) return found;
  }
  return null;
}

function figureOf(id) {
  const doc = Bokeh.documents.find((each) => each.roots().some((root) => root.id === data.figures[id].root_id));
  return doc.roots()[0];
}

function labelSteps(plot, steps) {
  const places = evenly(steps.length, Math.max(2, Math.floor(at("heat").clientWidth / 130)));
  label(plot.below[0], places.map((index) => index + 0.5), places.map((index) => String(steps[index])));
}

function labelRows(plot, rows) {
  const height = plot.height - 60;
  const places = evenly(rows.length, Math.max(2, Math.floor(height / 19)));
  label(plot.left[0], places.map((index) => index + 0.5), places.map((index) => short(rows[index] || "(model)", 26)));
  plot.left[0].visible = !narrow();
}

// Figures

function image(cells, tall, wide) {
  const { ndarray } = Bokeh.require("core/util/ndarray");
  return { image: [ndarray(cells, { dtype: "float32", shape: [tall, wide] })], x: [0], y: [0], dw: [wide], dh: [tall] };
}

function drawHeat() {
  const statistic = current(), wide = statistic.steps.length, tall = statistic.rows.length;
  const plot = figureOf("heat"), cells = new Float32Array(wide * tall), bad = { x: [], y: [] };
  for (let index = 0; index < cells.length; index++) {
    cells[index] = colour(statistic, statistic.cells[index]);
    if (cells[index] === 2 && bad.x.length < 3000) {
      bad.x.push((index % wide) + 0.5);
      bad.y.push(Math.floor(index / wide) + 0.5);
    }
  }
  plot.height = Math.min(640, Math.max(240, 60 + tall * 19));
  plot.x_range.setv({ start: 0, end: wide });
  plot.y_range.setv({ start: tall, end: 0 });
  model("heat-cells").data = image(cells, tall, wide);
  model("heat-nonfinite").data = bad;
  const marks = data.marks
    .map((mark) => ({ ...mark, row: rowOf(statistic, mark.module), column: columnOf(statistic, mark.step) }))
    .filter((mark) => mark.row >= 0);
  model("heat-findings").data = {
    x: marks.map((mark) => mark.column + 0.5), y: marks.map((mark) => mark.row + 0.5), label: marks.map((mark) => mark.label),
    colour: marks.map((mark) => SEVERITY[mark.severity]),
  };
  labelSteps(plot, statistic.steps.map((steps) => steps[0]));
  labelRows(plot, statistic.rows);
  at("meaning").textContent = statistic.meaning ? `${statistic.title}: ${statistic.meaning}.` : statistic.title;
  at("low").textContent = `${show(statistic.low)} or less`;
  at("middle").textContent = show(unbend(statistic, (bend(statistic, statistic.low) + bend(statistic, statistic.high)) / 2));
  at("high").textContent = `${show(statistic.high)} or more`;
  at("scale").textContent = { log: "logarithmic", linear: "linear", asinh: "linear near 0, logarithmic beyond" }[statistic.scale];
  const joined = statistic.steps.some((steps) => steps[0] !== steps[1]);
  at("joined").hidden = !joined;
}

function drawDepth() {
  const statistic = current(), plot = figureOf("depth"), tall = statistic.rows.length, wide = statistic.steps.length;
  const y = Array.from({ length: tall }, (_, row) => row + 0.5);
  const known = (value) => !Number.isNaN(value) && value < INF && !(statistic.scale === "log" && value <= 0);
  const spot = (value) => (known(value) ? place(statistic, value) : NaN);
  const column = (index) => y.map((_, row) => spot(statistic.cells[row * wide + index]));
  const low = [], high = [];
  for (let row = 0; row < tall; row++) {
    const values = Array.from(statistic.cells.subarray(row * wide, (row + 1) * wide)).filter(known).map(spot);
    low.push(values.length ? Math.min(...values) : NaN);
    high.push(values.length ? Math.max(...values) : NaN);
  }
  const left = Math.min(...low.filter((x) => !Number.isNaN(x))), right = Math.max(...high.filter((x) => !Number.isNaN(x)));
  const bounds = Number.isFinite(left) ? [left, right] : [0, 1], room = (bounds[1] - bounds[0] || 1) * 0.05;
  plot.height = figureOf("heat").height;
  plot.x_range.setv({ start: bounds[0] - room, end: bounds[1] + room });
  plot.y_range.setv({ start: tall, end: 0 });
  model("depth-range").data = { y, low, high };
  model("depth-first").data = { x: column(0), y };
  model("depth-chosen").data = { x: column(chosen.column), y };
  model("depth-cursor").data = { y: [chosen.row + 0.5] };
  const places = [0.02, 0.34, 0.66, 0.98].map((part) => bounds[0] + part * (bounds[1] - bounds[0]));
  const bentLow = bend(statistic, statistic.low), bentHigh = bend(statistic, statistic.high);
  label(plot.below[0], places, places.map((part) => show(unbend(statistic, bentLow + part * (bentHigh - bentLow)))));
  plot.below[0].axis_label = statistic.title;
  labelRows(plot, statistic.rows);
  at("depth-first-step").textContent = span(statistic.steps[0]);
  at("depth-step").textContent = span(statistic.steps[chosen.column]);
}

function drawBins() {
  const histogram = data.distributions[chosen.histogram];
  if (!histogram) return;
  const layer = layerOf(histogram), plot = figureOf("bins"), bins = histogram.edges.length - 1, wide = histogram.steps.length;
  const cells = new Float32Array(bins * wide);
  for (let column = 0; column < wide; column++) {
    for (let bin = 0; bin < bins; bin++) {
      const share = shareOf(histogram, layer, column, bin);
      // shares from 0.01 % to 100 %, logarithmic
      cells[bin * wide + column] = Number.isNaN(share) ? NaN : share === 0 ? -1 : Math.max(0, 1 + Math.log10(share) / 4);
    }
  }
  plot.x_range.setv({ start: 0, end: wide });
  plot.y_range.setv({ start: 0, end: bins });
  model("bins-cells").data = image(cells, bins, wide);
  labelSteps(plot, histogram.steps);
  const zero = histogram.edges.findIndex((edge) => edge >= 0);
  const places = evenly(bins + 1, 9).filter((edge) => zero < 0 || Math.abs(edge - zero) > 2 || edge === zero);
  if (zero > 0 && !places.includes(zero)) places.push(zero);
  label(plot.left[0], places, places.map((edge) => show(histogram.edges[edge])));
  const step = current().steps[chosen.column][1];
  const column = histogram.steps.reduce((best, other, index) => (other <= step ? index : best), 0);
  model("bins-cursor").data = { left: [column], right: [column + 1], bottom: [0], top: [bins] };
  at("layer").value = String(layer);
}

function shareOf(histogram, layer, column, bin) {
  const bins = histogram.edges.length - 1;
  const coded = histogram.cells[(layer * histogram.steps.length + column) * bins + bin];
  return coded === 65535 ? NaN : coded / 65534;
}

// Curves: one empty figure is used many times

async function drawCurve(id) {
  const spec = data.curves[id];
  const text = JSON.stringify(data.figures[spec.figure]).replace(/"p(\d+)"/g, `"${id}-$1"`);
  await Bokeh.embed.embed_item(JSON.parse(text), id);
  const doc = Bokeh.documents[Bokeh.documents.length - 1], plot = doc.roots()[0];
  const fill = (name, columns) => { doc.get_model_by_name(name).data = columns; };
  const [bottom, upper, top] = spec.y, bad = [];
  if (id === "loss") plot.height = 340;
  plot.x_range.setv({ start: spec.x[0], end: spec.x[1] });
  plot.y_range.setv({ start: bottom, end: top });
  plot.left[0].axis_label = spec.unit || null;
  spec.lines.forEach(({ label, points }, index) => {
    const of = (place) => points.map((point) => point[place] ?? NaN);
    const told = ([first, last, low, high, value, broken]) =>
      `${spec.lines.length > 1 ? `${label}: ` : ""}${value === null ? "not finite" : show(value)}` +
      (low !== high ? ` (${show(low ?? NaN)} to ${show(high ?? NaN)})` : "") +
      (broken === null ? "" : `, not finite from step ${broken}`);
    fill(`line-${index}`, {
      x: of(1), y: of(4), low: of(2), high: of(3),
      steps: points.map((point) => span(point).replace(/^steps? /, "")), text: points.map(told),
    });
    if (points.length < 40) fill(`dots-${index}`, { x: of(1), y: of(4) });
    bad.push(...points.filter((point) => point[5] !== null).map((point) => point[5]));
  });
  fill("bad", { x: bad, y: bad.map(() => upper) });
  fill("marks", {
    x: spec.marks.map((mark) => mark.step), y: spec.marks.map(() => upper), bottom: spec.marks.map(() => bottom),
    label: spec.marks.map((mark) => mark.label), what: spec.marks.map((mark) => mark.what),
    colour: spec.marks.map((mark) => SEVERITY[mark.severity]),
  });
}

// The chosen cell

const current = () => data.statistics[chosen.statistic];

function rowOf(statistic, module) {
  const exact = statistic.rows.indexOf(module);
  return exact >= 0 || !module ? exact : statistic.rows.findIndex((row) => row.startsWith(`${module}.`));
}

function columnOf(statistic, step) {
  const found = statistic.steps.findIndex((steps) => steps[1] >= step);
  return found < 0 ? statistic.steps.length - 1 : found;
}

// A parameter belongs to the layer whose name it begins with.
function layerOf(histogram) {
  const row = current().rows[chosen.row];
  const exact = histogram.layers.findIndex((layer) => row === layer || row.startsWith(`${layer}.`));
  return exact >= 0 ? exact : Math.min(chosen.row, histogram.layers.length - 1);
}

function told(row, column) {
  const statistic = current(), kind = statistic.types[row] ? ` (${statistic.types[row]})` : "";
  const value = show(statistic.cells[row * statistic.steps.length + column]);
  return `${statistic.rows[row] || "(model)"}${kind}, ${span(statistic.steps[column])}: ${value}`;
}

function choose(row, column) {
  const statistic = current();
  chosen.row = Math.min(statistic.rows.length - 1, Math.max(0, row));
  chosen.column = Math.min(statistic.steps.length - 1, Math.max(0, column));
  at("readout").textContent = told(chosen.row, chosen.column);
  at("step").max = String(statistic.steps.length - 1);
  at("step").value = String(chosen.column);
  at("step-text").textContent = span(statistic.steps[chosen.column]);
  at("step").setAttribute("aria-valuetext", span(statistic.steps[chosen.column]));
  model("heat-cursor").data = {
    left: [chosen.column], right: [chosen.column + 1], bottom: [chosen.row + 1], top: [chosen.row],
  };
  drawDepth();
  drawBins();
}

function changeStatistic(index) {
  const before = current(), step = before.steps[chosen.column][0], row = before.rows[chosen.row];
  chosen.statistic = index;
  drawHeat();
  choose(Math.max(0, rowOf(current(), row)), columnOf(current(), step));
}

function listen() {
  at("statistic").addEventListener("change", (event) => changeStatistic(Number(event.target.value)));
  at("step").addEventListener("input", (event) => choose(chosen.row, Number(event.target.value)));
  const arrows = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  at("heat-frame").addEventListener("keydown", (event) => {
    const move = arrows[event.key];
    if (!move) return;
    event.preventDefault();
    choose(chosen.row + move[0], chosen.column + move[1]);
  });
  const plot = figureOf("heat"), tip = at("tip");
  const cell = (event) => [Math.floor(event.y), Math.floor(event.x)];
  const inside = ([row, column]) =>
    row >= 0 && column >= 0 && row < current().rows.length && column < current().steps.length;
  plot.on_event("tap", (event) => inside(cell(event)) && choose(...cell(event)));
  plot.on_event("mousemove", (event) => {
    const over = inside(cell(event));
    tip.hidden = !over;
    if (!over) return;
    tip.textContent = told(...cell(event));
    const room = at("heat-frame").clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(0, Math.min(event.sx + 14, room))}px`;
    tip.style.top = `${event.sy + 18}px`;
  });
  plot.on_event("mouseleave", () => { tip.hidden = true; });
  if (!data.distributions.length) return;
  at("layer").addEventListener("change", (event) => {
    const histogram = data.distributions[chosen.histogram], name = histogram.layers[Number(event.target.value)];
    const row = rowOf(current(), name);
    if (row >= 0) choose(row, chosen.column);
  });
  const bins = figureOf("bins");
  const say = (event) => {
    const histogram = data.distributions[chosen.histogram], column = Math.floor(event.x), bin = Math.floor(event.y);
    if (column < 0 || bin < 0 || column >= histogram.steps.length || bin >= histogram.edges.length - 1) return;
    const share = shareOf(histogram, layerOf(histogram), column, bin);
    at("bins-readout").textContent = `step ${histogram.steps[column]}: ${Number.isNaN(share) ? "not measured" : `${(100 * share).toPrecision(3)} % of the values`} from ${show(histogram.edges[bin])} to ${show(histogram.edges[bin + 1])}`;
  };
  bins.on_event("mousemove", say);
  bins.on_event("tap", say);
}

// The library makes each figure a stop of the tab key that does nothing; ours are the frame and the controls.
function quiet(root) {
  for (const element of root.querySelectorAll("*")) {
    if (element.classList.contains("bk-events")) element.tabIndex = -1;
    if (element.shadowRoot) quiet(element.shadowRoot);
  }
}

// Light and dark

function paint() {
  const style = getComputedStyle(document.documentElement);
  const text = style.getPropertyValue("--text").trim(), line = style.getPropertyValue("--line").trim();
  for (const doc of Bokeh.documents) {
    for (const plot of doc.roots()) {
      for (const axis of [...plot.below, ...plot.left]) {
        axis.setv({
          axis_label_text_color: text, major_label_text_color: text, axis_line_color: line, major_tick_line_color: line,
        });
      }
      for (const part of plot.center) {
        if (part.type === "Grid") part.grid_line_color = line;
      }
    }
  }
}

async function start() {
  for (const id of ["heat", "depth", "bins"]) {
    if (data.figures[id]) await Bokeh.embed.embed_item(data.figures[id], id);
  }
  if (data.statistics.length) {
    for (const statistic of data.statistics) statistic.cells = decode(statistic.values, Float32Array);
    for (const histogram of data.distributions) histogram.cells = decode(histogram.shares, Uint16Array);
    const mark = data.marks.find((each) => rowOf(current(), each.module) >= 0);
    listen();
    drawHeat();
    choose(mark ? rowOf(current(), mark.module) : 0, mark ? columnOf(current(), mark.step) : current().steps.length - 1);
  }
  quiet(document);
  paint();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  // curves are drawn when they come near, so that a page with many of them opens at once
  const near = new IntersectionObserver(async (seen) => {
    for (const { isIntersecting, target } of seen) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      await drawCurve(target.id);
      quiet(target);
      paint();
    }
  }, { rootMargin: "800px" });
  for (const id of Object.keys(data.curves)) near.observe(at(id));
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width || !data.statistics.length) return;
    width = window.innerWidth;
    drawHeat();
    drawDepth();
    drawBins();
  });
  document.documentElement.dataset.ready = "true";
}

start();
