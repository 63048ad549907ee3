// A measure over depth at some epochs, over epochs at some depths, and as a map of both.
// panel: {kind, axis, names, epochs, values: of each unit over epochs, spread: likewise, or nothing}
const isNumber = (value) => value !== null && value !== undefined;
const spaced = (count) => [...new Set([0, 1, 2, 3].map((index) => Math.round((index * (count - 1)) / 3)))];

// panels stand side by side and share their scales
function depthCharts(box, panels) {
  const means = panels.flatMap((panel) => panel.values.flat()).filter(isNumber);
  const ends = panels.flatMap((panel) => panel.values.flatMap((values, unit) => values.flatMap((value, place) => {
    const half = panel.spread ? panel.spread[unit][place] : 0;
    return isNumber(value) ? [value - half, value + half] : [];
  })));
  const draw = (chart, known) => {
    const range = [Math.min(...known), Math.max(...known)];
    for (const panel of panels) chart(element("div", {}, box), panel, range);
  };
  draw(overDepth, ends);
  draw(overEpochs, ends);
  draw((place, panel, range) => mapChart(place, panel, { title: `Over depth and epochs: ${panel.kind}`, range }), means);
}

function overDepth(box, panel, range) {
  const { names, epochs, values, spread } = panel;
  const series = spaced(epochs.length).map((place, index) => ({
    name: `epoch ${epochs[place]}`, xs: names.map((_, unit) => unit), values: values.map((of) => of[place]),
    spread: spread && spread.map((of) => of[place]), colour: index, dash: DASHES[index],
  }));
  lineChart(box, someKnown(series), { title: `Over depth: ${panel.kind}`, x: "depth, units", y: panel.axis, names, range });
}

function overEpochs(box, panel, range) {
  const { names, epochs, values, spread } = panel;
  const series = spaced(names.length).map((unit, index) => ({
    name: `${unit}: ${names[unit]}`, xs: epochs, values: values[unit], spread: spread && spread[unit], colour: index, dash: DASHES[index],
  }));
  lineChart(box, someKnown(series), { title: `Over epochs: ${panel.kind}`, x: "epoch", y: panel.axis, range });
}

const someKnown = (series) => series.filter((one) => one.values.some(isNumber));

const MAP = [[0, 34, 78], [59, 80, 108], [112, 114, 120], [166, 154, 106], [254, 232, 56]]; // Cividis, in five steps

// what follows a value: its axis ends in it, or is it
function unitOf(found) {
  return found.axis.endsWith("%") ? " %" : found.axis === "points" ? " points" : "";
}

function mapColour(share) {
  const place = Math.max(0, Math.min(1, share)) * (MAP.length - 1), low = Math.min(MAP.length - 2, Math.floor(place));
  const mixed = MAP[low].map((value, channel) => Math.round(value + (MAP[low + 1][channel] - value) * (place - low)));
  return `rgb(${mixed.join(",")})`;
}

// depth from left to right, epochs from top to bottom
function mapChart(box, found, options) {
  box.classList.add("chart");
  element("h4", {}, box, options.title);
  const frame = element("div", {}, box);
  const tip = element("div", { class: "tip", role: "status", hidden: "" }, box);
  const label = `${options.title}. Arrow keys read the values.`;
  const svg = element("svg:svg", { tabindex: "0", role: "img", "aria-label": label }, frame);
  const reader = mapReader(box, svg, tip, found);
  drawToFit(box, frame, (room) => reader.place(drawMap(svg, found, room, options.range)));
  const known = options.range;
  const range = `dark ${show(Math.min(...known))}${unitOf(found)}, bright ${show(Math.max(...known))}${unitOf(found)}`;
  element("p", { class: "faint" }, box, `${range}; depth from left to right, epochs from top to bottom.`);
}

function drawMap(svg, found, width, range) {
  const left = 46, rows = found.epochs.length, columns = found.names.length;
  const high = Math.max(8, Math.min(18, 260 / rows)), wide = (width - left - 8) / columns, height = rows * high + 24;
  const low = Math.min(...range), top = Math.max(...range);
  fresh(svg, width, height);
  found.epochs.forEach((epoch, row) => {
    if (row % Math.ceil(rows / 6) === 0) element("svg:text", { x: left - 6, y: (row + 0.5) * high + 4, "text-anchor": "end" }, svg, epoch);
    for (let unit = 0; unit < columns; unit += 1) {
      const value = found.values[unit][row];
      if (value === null) continue;
      const fill = mapColour((value - low) / (top - low || 1));
      element("svg:rect", { x: left + unit * wide, y: row * high, width: wide + 0.4, height: high + 0.4, fill }, svg);
    }
  });
  element("svg:text", { x: 11, y: height / 2, "text-anchor": "middle", transform: `rotate(-90 11 ${height / 2})` }, svg, "epoch");
  element("svg:text", { x: (left + width) / 2, y: height - 5, "text-anchor": "middle" }, svg, "depth, units");
  return { width, left, wide, high };
}

function mapReader(box, svg, tip, found) {
  let row = found.epochs.length - 1, unit = 0, size;
  const read = (toRow, toUnit) => {
    row = Math.max(0, Math.min(found.epochs.length - 1, toRow));
    unit = Math.max(0, Math.min(found.names.length - 1, toUnit));
    const text = `${found.names[unit]}\nepoch ${found.epochs[row]}: ${show(found.values[unit][row])}${unitOf(found)}`;
    tell(box, tip, svg, (size.left + unit * size.wide) / size.width, text);
  };
  const point = (event) => {
    const frame = svg.getBoundingClientRect(), scale = size.width / frame.width;
    const across = (event.clientX - frame.left) * scale - size.left, down = (event.clientY - frame.top) * scale;
    read(Math.floor(down / size.high), Math.floor(across / size.wide));
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") tip.hidden = true; });
  svg.addEventListener("blur", () => { tip.hidden = true; });
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!moves) return;
    event.preventDefault();
    read(row + moves[0], unit + moves[1]);
  });
  return {
    place: (drawn) => {
      size = drawn;
      if (!tip.hidden) read(row, unit);
    },
  };
}
