// Groups of horizontal bars with their values beside them; a phone has room for as many as there are.
const BAR = { height: 13, group: 36, left: 92, right: 96, foot: 34 };

// panel: {title, labels: [[name, hierarchy]], bars: [{name, values, spread}]}
function barChart(box, panel) {
  box.classList.add("chart");
  element("h4", {}, box, panel.title);
  const frame = element("div", {}, box), legend = element("ul", { class: "legend" }, box);
  panel.bars.forEach((one, index) => {
    const entry = element("li", {}, legend), swatch = element("svg:svg", { viewBox: "0 0 34 10", "aria-hidden": "true" }, entry);
    element("svg:rect", { width: 34, height: 10, style: barLook(index) }, swatch);
    entry.append(one.name);
  });
  const told = panel.labels.map(([name, hierarchy], group) =>
    `${name} ${hierarchy}: ${panel.bars.map((one) => `${one.name} ${barText(one, group)}`).join(", ")}`);
  const svg = element("svg:svg", { role: "img", "aria-label": `${panel.title}. ${told.join("; ")}.` }, frame);
  drawToFit(box, frame, (room) => drawBars(svg, panel, room));
}

const barLook = (index) => `fill:${colour(index)};fill-opacity:${index ? 0.25 : 0.9};stroke:${colour(index)}`;

function barText(one, group) {
  const value = one.values[group], half = one.spread[group];
  return value === null ? "–" : `${value.toFixed(2)}${half === null ? "" : ` ± ${half.toFixed(2)}`}`;
}

function drawBars(svg, panel, width) {
  const height = panel.labels.length * BAR.group + BAR.foot, bottom = height - BAR.foot;
  const known = panel.bars.flatMap((one) => one.values).filter((value) => value !== null);
  const ends = panel.bars.flatMap((one) => one.values.map((value, group) => value + (one.spread[group] || 0)));
  const high = Math.max(...ends), room = Math.max(2, high - Math.min(...known));
  const low = Math.max(0, Math.min(...known) - 0.35 * room);
  const x = (value) => BAR.left + ((value - low) / (high - low)) * (width - BAR.left - BAR.right);
  fresh(svg, width, height);
  for (const at of ticks(low, high, Math.min(6, (width - BAR.left - BAR.right) / 45))) {
    element("svg:line", { class: "grid", x1: x(at), x2: x(at), y1: 0, y2: bottom }, svg);
    element("svg:text", { x: x(at), y: bottom + 14, "text-anchor": "middle" }, svg, at);
  }
  const note = `test accuracy, %${low > 0 ? " (the axis does not begin at 0)" : ""}`;
  element("svg:text", { x: width / 2, y: height - 4, "text-anchor": "middle" }, svg, note);
  panel.labels.forEach(([name, hierarchy], group) => {
    const top = group * BAR.group + 4;
    element("svg:text", { x: BAR.left - 6, y: top + 11, "text-anchor": "end", class: "name" }, svg, name);
    element("svg:text", { x: BAR.left - 6, y: top + 24, "text-anchor": "end" }, svg, hierarchy);
    panel.bars.forEach((one, index) => drawBar(svg, one, group, index, x, top + index * (BAR.height + 1)));
  });
}

function drawBar(svg, one, group, index, x, top) {
  const value = one.values[group], half = one.spread[group] || 0, middle = top + BAR.height / 2;
  if (value === null) return;
  element("svg:rect", { x: BAR.left, y: top, width: x(value) - BAR.left, height: BAR.height, style: barLook(index) }, svg);
  if (half) element("svg:path", { class: "whisker", d: `M${x(value - half)} ${middle}H${x(value + half)}` }, svg);
  element("svg:text", { x: x(value + half) + 4, y: middle + 4, class: "value" }, svg, barText(one, group));
}
