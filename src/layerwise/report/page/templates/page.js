const DATA = JSON.parse(document.getElementById("data").textContent);

function sortTable(button) {
  const heading = button.closest("th"), table = button.closest("table"), body = table.tBodies[0];
  const up = heading.getAttribute("aria-sort") === "descending" || heading.getAttribute("aria-sort") === "none" ? 1 : -1;
  const headings = [...heading.parentElement.children], column = headings.indexOf(heading);
  const value = (row) => {
    const cell = row.children[column];
    if (!("value" in cell.dataset)) return cell.textContent.trim();
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };
  const compare = (one, other) => {
    const [a, b] = [value(one), value(other)];
    if (a === null || b === null) return (a === null) - (b === null); // what is unknown stays last
    return up * (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));
  };
  body.append(...[...body.rows].sort(compare));
  for (const one of headings) one.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", up === 1 ? "ascending" : "descending");
}

function definitions(parent, entries) {
  const list = element("dl", {}, parent);
  for (const [name, value] of entries) {
    if (value === null || value === undefined || value === "") continue;
    element("dt", {}, list, name);
    element("dd", {}, list, value);
  }
}

const amount = (value, digits) => (value === null ? null : value.toLocaleString("en", { maximumFractionDigits: digits }));

function describeRun(box, run) {
  element("h4", {}, box, "The command that trains it again");
  element("pre", {}, box, run.command);
  element("h4", {}, box, "What differs from the defaults");
  definitions(box, Object.entries(run.config).map(([name, value]) => [name, String(value)]));
  element("h4", {}, box, "Where and how long");
  const result = run.result;
  definitions(box, [
    ["folder", run.path], ["hierarchy", run.hierarchy], ["machine", run.machine], ["commit", run.commit],
    ["seconds", amount(result.seconds, 0)], ["images per second", amount(result.images_per_second, 0)],
    ["peak memory, MB", result.peak_memory_bytes === null ? null : amount(result.peak_memory_bytes / 1e6, 0)],
    ["parameters", amount(result.parameters, 0)], ["best epoch on validation", amount(result.best_epoch, 0)],
    ["test accuracy of that epoch, %", amount(result.best_test_accuracy, 2)],
  ]);
  const whole = element("details", { class: "all" }, box);
  element("summary", {}, whole, "Every option");
  definitions(whole, Object.entries({ ...DATA.defaults, ...run.config }).map(([name, value]) => [name, String(value)]));
}

function runCurves(box, run) {
  const lines = [["test", run.test, 0, ""], ["validation", run.val, 1, "7 4"]];
  const series = lines.filter(([, values]) => values.some((value) => value !== null))
    .map(([name, values, index, dash]) => ({ name, xs: run.epochs, values, colour: index, dash }));
  if (series.length) lineChart(element("div", {}, box), series, { title: "Accuracy over epochs", x: "epoch", y: "accuracy, %" });
  else element("p", { class: "faint" }, box, "No epoch of it was evaluated.");
}

// accuracy of every early exit against its cost; the last entry is of the ensemble
function runExits(box, run) {
  const exits = run.exits;
  if (!exits || exits.accuracy.length < 2) return;
  const most = Math.max(...exits.multiply_adds);
  const [word, scale] = most < 1e4 ? ["", 1] : most < 1e7 ? [", thousands", 1e3] : most < 1e10 ? [", millions", 1e6] : [", billions", 1e9];
  const names = DATA.names[exits.names], ensemble = exits.accuracy.length - 1;
  const points = names.map((name, place) => ({
    cost: exits.multiply_adds[place] / scale, accuracy: exits.accuracy[place],
    told: `${name}: ${amount(exits.multiply_adds[place], 0)} multiply-adds`,
  }));
  const heads = points.slice(0, ensemble).sort((one, other) => one.cost - other.cost);
  const line = (name, chosen, index) => ({
    name, xs: chosen.map((point) => point.cost), values: chosen.map((point) => point.accuracy), colour: index, dash: DASHES[index], marked: true,
  });
  const series = [line("up to each unit, with its local head", heads, 0), line(names[ensemble], [points[ensemble]], 1)];
  const told = Object.fromEntries(points.map((point) => [point.cost, point.told]));
  lineChart(element("div", {}, box), series, {
    title: "Early exits: accuracy against cost", x: `multiply-adds of an image${word}`, y: "test accuracy, %", names: told,
  });
  unitTable(box, "Early exits, on test images", names, [
    ["accuracy, %", (unit) => show(exits.accuracy[unit])],
    ["multiply-adds of an image", (unit) => amount(exits.multiply_adds[unit], 0)],
  ]);
}

const withNames = (panel) => ({ ...panel, names: DATA.names[panel.names] });

function runUnits(box, run) {
  for (const panel of run.units) depthCharts(element("div", { class: "charts" }, box), [withNames(panel)]);
}

function unitTable(box, summary, names, columns) {
  if (!names.length) return;
  const whole = element("details", {}, box);
  element("summary", {}, whole, summary);
  const table = element("table", {}, element("div", { class: "scroll" }, whole)), head = element("tr", {}, element("thead", {}, table));
  for (const name of ["unit", ...columns.map(([heading]) => heading)]) element("td", {}, head, name);
  const body = element("tbody", {}, table);
  names.forEach((name, unit) => {
    const row = element("tr", {}, body);
    element("th", { scope: "row" }, row, name);
    for (const [, cell] of columns) element("td", { class: "number" }, row, cell(unit));
  });
}

function unitTables(box, run) {
  const last = run.last, found = run.separable;
  unitTable(box, "Units in the last epoch, on training images", DATA.names[last.names], [
    ["loss", (unit) => (last.loss[unit] === null ? "–" : last.loss[unit].toFixed(4))],
    ["accuracy, %", (unit) => show(last.accuracy[unit])],
  ]);
  if (!found) return;
  unitTable(box, `Separability of the features after epoch ${found.epoch}, on held-out images`, DATA.names[found.names], [
    ["resolution", (unit) => found.resolution[unit] || "–"],
    ...Object.entries(found.measures).map(([heading, values]) => [heading, (unit) => show(values[unit])]),
    ["gain, points", (unit) => show(found.gain[unit]) + (found.gain_error[unit] === null ? "" : ` ± ${show(found.gain_error[unit])}`)],
    ["mismatched", (unit) => (found.mismatched[unit] ? "yes" : "")],
  ]);
}

function openRun(details) {
  const box = details.querySelector(".run");
  if (!details.open || box.childElementCount) return;
  const run = DATA.runs[Number(details.dataset.run)];
  describeRun(box, run);
  runCurves(box, run);
  runExits(box, run);
  runUnits(box, run);
  unitTables(box, run);
}

function goTo(hash) {
  const target = /^#run-\d+$/.test(hash) && document.getElementById(hash.slice(1));
  if (!target) return;
  target.hidden = false;
  target.open = true;
  openRun(target);
  target.scrollIntoView({ block: "start" });
}

function findRuns(words) {
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = new Map([...document.querySelectorAll("#runs > .scroll tbody tr")].map((row) => [row.querySelector("a").hash, row]));
  let shown = 0;
  for (const details of document.querySelectorAll("#details > details")) {
    const row = rows.get(`#${details.id}`);
    const text = `${row.textContent} ${details.textContent}`.toLowerCase();
    const hide = !wanted.every((word) => text.includes(word));
    row.hidden = details.hidden = hide;
    shown += !hide;
  }
  document.getElementById("found").textContent = wanted.length ? `${shown} of ${DATA.runs.length}` : "";
}

function epochChart(box, chart) {
  const series = chart.series.map((one) => ({ ...one, xs: one.epochs, dash: one.dashed ? "7 4" : "" }));
  lineChart(box, series, { title: chart.title, x: "epoch", y: chart.y });
}

const FIGURES = {
  bars: (box, panels) => panels.forEach((panel) => barChart(element("div", {}, box), panel)),
  lines: (box, panels) => panels.forEach((panel) => epochChart(element("div", {}, box), panel)),
  depths: (box, panels) => depthCharts(box, panels.map(withNames)),
};

function start() {
  for (const button of document.querySelectorAll("table.sortable thead button")) {
    button.addEventListener("click", () => sortTable(button));
  }
  const charts = document.getElementById("charts");
  if (!DATA.charts.length) element("p", {}, charts, "No finished run of a row of the paper.");
  for (const chart of DATA.charts) epochChart(element("div", {}, charts), chart);
  for (const [name, figure] of Object.entries(DATA.figures)) {
    FIGURES[figure.kind](document.querySelector(`[id="figure-${name}"] .charts`), figure.panels);
  }
  for (const details of document.querySelectorAll("#details > details")) {
    details.addEventListener("toggle", () => openRun(details));
  }
  document.getElementById("find").addEventListener("input", (event) => findRuns(event.target.value));
  window.addEventListener("hashchange", () => goTo(location.hash));
  document.getElementById("runs").addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (link && link.hash) goTo(link.hash); // also when it is the present one
  });
  goTo(location.hash);
}

start();
