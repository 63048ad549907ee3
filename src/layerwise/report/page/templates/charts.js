"use strict";
// Elements, scales and lines over epochs or depth, whose values are read by pointer, touch or arrow keys.
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "12 4", "4 2"];
const MARKS = ["circle", "square", "triangle", "diamond", "cross", "ring", "bar"];
const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes, parent, text) {
  const made = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function ticks(low, high, wanted) {
  const raw = Math.max(high - low, 1e-9) / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= raw);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(Number(at.toFixed(6)));
  return found;
}

const show = (value) => (value === null || value === undefined ? "–" : value.toFixed(value % 1 ? 2 : 1));
const colour = (index) => `var(--c${index % 7})`;

function mark(kind, x, y, index, parent) {
  const shapes = {
    square: `M${x - 3} ${y - 3}h6v6h-6z`, triangle: `M${x} ${y - 4}l4 7h-8z`, diamond: `M${x} ${y - 4}l4 4-4 4-4-4z`,
    cross: `M${x - 3} ${y - 3}l6 6m0-6l-6 6`, bar: `M${x} ${y - 4}v8`,
    circle: `M${x - 3} ${y}a3 3 0 1 0 6 0a3 3 0 1 0-6 0z`, ring: `M${x - 3} ${y}a3 3 0 1 0 6 0a3 3 0 1 0-6 0z`,
  };
  const filled = !["ring", "cross", "bar"].includes(kind);
  const style = `fill:${filled ? colour(index) : "none"};stroke:${colour(index)};stroke-width:1.4`;
  element("svg:path", { d: shapes[kind], style }, parent);
}

// series: [{name, xs, values, spread, colour, dash, marked: whether every point has a mark}]
// options: {title, x, y, names: label of an x, range: lowest and highest value where charts share an axis}
function lineChart(box, series, options) {
  box.classList.add("chart");
  element("h4", {}, box, options.title);
  const frame = element("div", {}, box);
  const legend = element("ul", { class: "legend" }, box);
  const tip = element("div", { class: "tip", role: "status", hidden: "" }, box);
  for (const one of series) legendEntry(legend, one);
  const svg = element("svg:svg", {
    tabindex: "0", role: "img", "aria-label": `${options.title}. ${options.y} over ${options.x}. Arrow keys read the values.`,
  }, frame);
  const reader = lineReader(box, svg, tip, series, options);
  drawToFit(box, frame, (room) => reader.place(drawLines(svg, series, room, options)));
}

function legendEntry(legend, one) {
  const entry = element("li", {}, legend);
  const swatch = element("svg:svg", { viewBox: "0 0 34 10", "aria-hidden": "true" }, entry);
  const style = `stroke:${colour(one.colour)};stroke-dasharray:${one.dash};stroke-width:1.8`;
  element("svg:path", { d: "M0 5h34", style }, swatch);
  mark(MARKS[one.colour % MARKS.length], 17, 5, one.colour, swatch);
  entry.append(one.name + (one.seeds > 1 ? ` (${one.seeds} seeds)` : ""));
}

// a chart is drawn anew when its room changes; its element stays, and so does what is being read in it
function drawToFit(box, frame, draw) {
  let drawn = -Infinity;
  const fit = () => {
    if (Math.abs(frame.clientWidth - drawn) < 2) return;
    drawn = frame.clientWidth;
    draw(Math.max(240, drawn || 320));
  };
  fit();
  new ResizeObserver(fit).observe(box);
}

function extent(series, shared) {
  const xs = series.flatMap((one) => one.xs);
  const spreads = (one) => one.values.flatMap((value, index) => {
    if (value === null) return [];
    const half = one.spread ? one.spread[index] : 0;
    return [value - half, value + half];
  });
  const values = shared || series.flatMap(spreads);
  const low = Math.min(...values), high = Math.max(...values), room = (high - low || 1) * 0.06;
  const floor = low < 0 ? low - room : Math.max(0, low - room); // no room below 0 for what is never negative
  return { left: Math.min(...xs), right: Math.max(...xs), low: floor, high: high + room };
}

// returns where things are, for the one that reads values
function drawLines(svg, series, width, options) {
  const height = Math.min(300, Math.max(200, width * 0.55));
  const edge = { left: 46, right: 12, top: 8, bottom: 36 };
  const range = extent(series, options.range);
  const x = (value) => edge.left + ((value - range.left) / (range.right - range.left || 1)) * (width - edge.left - edge.right);
  const y = (value) => height - edge.bottom - ((value - range.low) / (range.high - range.low)) * (height - edge.top - edge.bottom);
  fresh(svg, width, height);
  axes(svg, x, y, range, width, height, edge, options);
  for (const one of series) drawOne(svg, one, x, y);
  const cursor = element("svg:line", { class: "cursor", y1: edge.top, y2: height - edge.bottom, visibility: "hidden" }, svg);
  return { x, width, cursor };
}

function fresh(svg, width, height) {
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
}

function axes(svg, x, y, range, width, height, edge, options) {
  for (const at of ticks(range.low, range.high, 5)) {
    element("svg:line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: y(at), y2: y(at) }, svg);
    element("svg:text", { x: edge.left - 6, y: y(at) + 4, "text-anchor": "end" }, svg, at);
  }
  for (const at of ticks(range.left, range.right, Math.min(6, width / 70)).filter(Number.isInteger)) {
    element("svg:line", { class: "grid", x1: x(at), x2: x(at), y1: height - edge.bottom, y2: height - edge.bottom + 4 }, svg);
    element("svg:text", { x: x(at), y: height - edge.bottom + 16, "text-anchor": "middle" }, svg, at);
  }
  element("svg:text", { x: (edge.left + width) / 2, y: height - 4, "text-anchor": "middle" }, svg, options.x);
  const middle = (height - edge.bottom) / 2;
  element("svg:text", { x: 11, y: middle, "text-anchor": "middle", transform: `rotate(-90 11 ${middle})` }, svg, options.y);
}

function drawOne(svg, one, x, y) {
  const known = one.xs.map((at, index) => [at, one.values[index], one.spread ? one.spread[index] : 0]).filter((p) => p[1] !== null);
  if (!known.length) return;
  if (one.spread) {
    const up = known.map(([at, value, half]) => `${x(at)} ${y(value + half)}`);
    const down = known.map(([at, value, half]) => `${x(at)} ${y(value - half)}`).reverse();
    element("svg:path", { class: "band", d: `M${up.concat(down).join("L")}Z`, style: `fill:${colour(one.colour)}` }, svg);
  }
  const path = known.map(([at, value]) => `${x(at).toFixed(1)} ${y(value).toFixed(1)}`).join("L");
  const style = `stroke:${colour(one.colour)};stroke-dasharray:${one.dash}`;
  element("svg:path", { class: "series", d: `M${path}`, style }, svg);
  const every = one.marked ? 1 : Math.max(1, Math.ceil(known.length / 6));
  known.forEach(([at, value], index) => {
    if ((index + one.colour) % every === 0 || known.length === 1) mark(MARKS[one.colour % MARKS.length], x(at), y(value), one.colour, svg);
  });
}

// values at the x nearest to the pointer, or at the one that arrow keys moved to
function lineReader(box, svg, tip, series, options) {
  const places = [...new Set(series.flatMap((one) => one.xs))].sort((a, b) => a - b);
  let index = -1, x, width, cursor;
  const hide = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); };
  const read = (to) => {
    index = Math.max(0, Math.min(places.length - 1, to));
    const at = places[index];
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, x(at));
    cursor.setAttribute("visibility", "visible");
    const lines = series.map((one) => [one, one.xs.indexOf(at)]).filter(([one, place]) => place >= 0 && one.values[place] !== null)
      .sort(([one, a], [other, b]) => other.values[b] - one.values[a])
      .map(([one, place]) => `${show(one.values[place])}${one.spread ? ` ± ${show(one.spread[place])}` : ""}  ${one.name}`);
    const head = options.names ? options.names[at] : `${options.x} ${at}`;
    tell(box, tip, svg, x(at) / width, [head, ...lines].join("\n"));
  };
  const nearest = (event) => {
    const frame = svg.getBoundingClientRect(), at = ((event.clientX - frame.left) / frame.width) * width;
    const distances = places.map((place) => Math.abs(x(place) - at));
    read(distances.indexOf(Math.min(...distances)));
  };
  svg.addEventListener("pointermove", nearest);
  svg.addEventListener("pointerdown", nearest);
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
  svg.addEventListener("blur", hide);
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) read(index < 0 ? places.length - 1 : index); });
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: places.length - 1 };
    if (event.key === "Escape") hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    read(moves[event.key]);
  });
  return {
    place: (drawn) => {
      ({ x, width, cursor } = drawn);
      if (!tip.hidden) read(index);
    },
  };
}

function tell(box, tip, svg, share, text) {
  tip.textContent = text;
  tip.hidden = false;
  const room = box.clientWidth - tip.offsetWidth;
  const at = share * box.clientWidth + (share > 0.5 ? -tip.offsetWidth - 12 : 12);
  tip.style.left = `${Math.max(0, Math.min(room, at))}px`;
  tip.style.top = `${svg.getBoundingClientRect().top - box.getBoundingClientRect().top + 10}px`;
}
