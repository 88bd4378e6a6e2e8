
"use strict";
// Draw the page's data. Text from runs becomes text nodes and attributes, never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = 7;
const FIRST = 7; // curves that are drawn at the start
const IN_TIP = 10;

function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}
function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}
function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}
const breakable = (text) => text.split(/(?<=_)/).flatMap((part) => [part, el("wbr")]); // headings break nowhere else
const bdi = (text) => el("bdi", { class: "name" }, ...text.split(/(?<=[,\/_=])/).flatMap((part) => [part, el("wbr")]));
const colour = (i) => `var(--c${i % COLOURS})`;
const dash = (i) => ["", "7 4", "2 3", "9 3 2 3"][Math.floor(i / COLOURS) % 4];
// One shape per colour, so that colour is never the only sign.
const SHAPES = [
  "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0", "M-3.6,-3.6h7.2v7.2h-7.2z", "M0,-4.6L4.3,3.4H-4.3z", "M0,-5L5,0L0,5L-5,0z",
  "M0,4.6L4.3,-3.4H-4.3z", "M-4,-1.4h2.6v-2.6h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6z", "M-1.6,-4.5h3.2v9h-3.2z",
];
const shape = (i, x, y, attributes = {}) =>
  svg("path", { d: SHAPES[i % COLOURS], transform: `translate(${x.toFixed(1)},${y.toFixed(1)})`, fill: colour(i), ...attributes });

function format(value, digits, signed = false) {
  if (value === null || value === undefined) return "–";
  const text = value.toFixed(digits).replace("-", "−");
  return signed && value > 0 ? `+${text}` : text;
}
function formatPlain(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e5 || size < 1e-3 ? value.toExponential(1).replace(".0e", "e").replace("e+", "e") : String(+value.toPrecision(4));
  return text.replace(/-/g, "−");
}
function chooseTicks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 2.5, 5, 10].find((m) => m * power >= rough) || 10);
  const values = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) values.push(+(i * step).toPrecision(12));
  return values;
}
function padRange(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
  if (low > high) return [0, 1];
  const room = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
  return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
}

// Theme

function setUpTheme() {
  const button = byId("theme"), root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");
  const now = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  const update = () => { button.textContent = now() === "dark" ? "Light" : "Dark"; button.setAttribute("aria-label", `Switch to ${now() === "dark" ? "light" : "dark"} colours`); };
  try { const stored = localStorage.getItem("mtcl-theme"); if (stored === "dark" || stored === "light") root.dataset.theme = stored; } catch { /* not kept, then */ }
  button.addEventListener("click", () => {
    root.dataset.theme = now() === "dark" ? "light" : "dark";
    try { localStorage.setItem("mtcl-theme", root.dataset.theme); } catch { /* not kept, then */ }
    update();
  });
  dark.addEventListener("change", update);
  button.hidden = false;
  update();
}

// Results

function setUpSorting() {
  const table = byId("table");
  if (!table) return;
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((_, column) => { // "±" below "±"
    const spreads = [...body.rows].map((row) => row.cells[column].querySelector(".spread")).filter(Boolean);
    const widest = Math.max(0, ...spreads.map((spread) => spread.offsetWidth));
    spreads.forEach((spread) => { spread.style.minWidth = `${widest}px`; });
  });
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending" ? true
      : head.getAttribute("aria-sort") === "descending" ? false : column > 0 && data.columns[column - 1]?.higher;
    heads.forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.value;
    const collator = new Intl.Collator("en", { numeric: true });
    const order = (a, b) => {
      if (column === 0) return collator.compare(a.cells[0].textContent, b.cells[0].textContent) * (down ? -1 : 1);
      if (value(a) === "" || value(b) === "") return (value(a) === "") - (value(b) === ""); // rows without a value come last
      return (Number(value(a)) - Number(value(b))) * (down ? -1 : 1);
    };
    const fixed = (row) => row.classList.contains("baseline");
    const rows = [...body.rows];
    body.append(...rows.filter(fixed), ...rows.filter((row) => !fixed(row)).sort(order));
  }));
}

// Charts

// A figure that is redrawn when its width changes. draw(svg, width) returns {positions, describe(position) -> rows} for the
// pointer and the keys; values() -> {head, rows} is the chart as a table.
function makeChart(title, alt, height, draw, values) {
  const plot = svg("svg", { role: "img", "aria-label": alt, tabindex: 0, height });
  const tip = el("div", { class: "tip", hidden: true, role: "status" });
  const details = el("details", {}, el("summary", {}, "values"));
  const figure = el("figure", { class: "chart" }, el("figcaption", {}, title), plot, tip, values ? details : "");
  let current = null, at = -1, width = 0;
  const redraw = () => {
    width = plot.clientWidth || 300;
    plot.replaceChildren();
    plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
    current = draw(plot, width);
    hide();
    if (details.open) write();
  };
  const write = () => {
    const { head, rows } = values();
    const line = (cells, tag) => el("tr", {}, ...cells.map((cell, i) => el(i ? tag : "th", {}, cell)));
    const table = el("table", {}, el("thead", {}, line(head, "th")), el("tbody", {}, ...rows.map((row) => line(row, "td"))));
    details.replaceChildren(details.firstChild, el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `${title}, values` }, table));
  };
  details.addEventListener("toggle", () => details.open && write());
  const hide = () => { tip.hidden = true; at = -1; current?.leave?.(); };
  const show = (index) => {
    if (!current?.positions.length) return;
    at = Math.max(0, Math.min(current.positions.length - 1, index));
    const { head, rows, x } = current.describe(at);
    const shown = rows.slice(0, IN_TIP);
    tip.replaceChildren(el("strong", {}, head), ...shown.map(([label, value, i]) => {
      const mark = svg("svg", { width: 12, height: 12, viewBox: "-6 -6 12 12", "aria-hidden": "true" });
      if (i !== null) mark.append(shape(i, 0, 0));
      return el("div", {}, el("span", {}, i === null ? "" : mark, " ", bdi(label)), el("span", {}, value));
    }));
    if (rows.length > shown.length) tip.append(el("small", {}, `and ${rows.length - shown.length} more`));
    tip.hidden = false;
    const box = tip.offsetWidth;
    tip.style.left = `${Math.max(0, x + 12 + box > width ? Math.max(0, x - box - 12) : x + 12)}px`;
    tip.style.top = `${plot.getBoundingClientRect().top - figure.getBoundingClientRect().top + 8}px`;
  };
  const nearest = (event) => {
    const box = plot.getBoundingClientRect();
    show(current.find ? current.find(event.clientX - box.left, event.clientY - box.top) : findClosest(current.positions, event.clientX - box.left));
  };
  plot.addEventListener("pointermove", nearest);
  plot.addEventListener("pointerdown", nearest);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const last = current ? current.positions.length - 1 : 0;
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at < 0 ? last : at - 1, ArrowUp: at < 0 ? last : at - 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined) return;
    event.preventDefault();
    show(to);
  });
  new ResizeObserver(() => { if (plot.clientWidth !== width) redraw(); }).observe(plot);
  figure.redraw = redraw;
  return figure;
}
function findClosest(positions, x) {
  let best = 0;
  positions.forEach((position, i) => { if (Math.abs(position - x) < Math.abs(positions[best] - x)) best = i; });
  return best;
}

function drawYAxis(plot, low, high, height, left, right, top, bottom) {
  const y = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);
  for (const tick of chooseTicks(low, high, 4)) {
    plot.append(svg("line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) }),
      svg("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, formatPlain(tick)));
  }
  return y;
}
function computeLeftMargin(low, high) {
  return 14 + 6.4 * Math.max(...chooseTicks(low, high, 4).map((tick) => formatPlain(tick).length));
}

// Curves

const shownLines = new Set();

// Over steps: mean, lowest and highest of the seeds that have a value.
function mergeSeeds(seeds) {
  const at = new Map();
  for (const [steps, values] of seeds) steps.forEach((step, i) => { if (!at.has(step)) at.set(step, []); at.get(step).push(values[i]); });
  return [...at.entries()].sort((a, b) => a[0] - b[0])
    .map(([step, values]) => ({ step, mean: values.reduce((a, b) => a + b) / values.length, low: Math.min(...values), high: Math.max(...values), count: values.length }));
}

function fillCurves() {
  const host = byId("curve-charts");
  if (!host) return;
  const { charts, lines } = data.curves;
  const present = lines.map((line, i) => i).filter((i) => Object.keys(lines[i]).length);
  present.slice(0, FIRST).forEach((i) => shownLines.add(i));
  const cache = lines.map(() => ({}));
  const curve = (i, c) => (cache[i][c] ??= mergeSeeds(lines[i][c] || []));
  const visible = (c) => present.filter((i) => shownLines.has(i) && lines[i][c]);
  const figures = [];
  for (const [group, heading] of [["metric", "Validation"], ["loss", "Training losses"]]) {
    const groupCharts = charts.map((about, c) => [about, c]).filter(([about]) => about.group === group);
    if (!groupCharts.length) continue;
    const grid = el("div", { class: "charts" });
    for (const [about, c] of groupCharts) {
      const drawn = makeChart(about.title, `${about.title} over training steps, a curve per row; the arrow keys tell values`, 190,
        (plot, width) => drawCurves(plot, width, 190, visible(c).map((i) => [i, curve(i, c)]), about),
        () => tabulateCurves(visible(c).map((i) => [i, curve(i, c)]), about));
      figures.push(drawn);
      grid.append(drawn);
    }
    host.append(el("h3", {}, heading), grid);
  }
  addLegend(present, () => figures.forEach((figure) => figure.redraw()));
}

function drawCurves(plot, width, height, curves, about) {
  const steps = [...new Set(curves.flatMap(([, points]) => points.map((p) => p.step)))].sort((a, b) => a - b);
  if (!steps.length) {
    plot.append(svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "no row chosen has values here"));
    return { positions: [] };
  }
  const [low, high] = padRange(curves.flatMap(([, points]) => points.flatMap((p) => [p.low, p.high])));
  const left = computeLeftMargin(low, high), right = width - 10, top = 8, bottom = 24;
  const y = drawYAxis(plot, low, high, height, left, right, top, bottom);
  const first = steps[0], last = steps.at(-1);
  const x = (step) => (last === first ? (left + right) / 2 : left + ((step - first) / (last - first)) * (right - left));
  plot.append(svg("line", { class: "axis", x1: left, x2: right, y1: height - bottom, y2: height - bottom }));
  const marks = last === first ? [first] : chooseTicks(first, last, Math.max(2, Math.floor((right - left) / 75)));
  for (const tick of marks) {
    const text = formatPlain(tick);
    plot.append(svg("text", { x: Math.min(x(tick), width - 3.2 * text.length), y: height - 7, "text-anchor": "middle" }, text));
  }
  for (const [i, points] of curves) {
    const pathOf = (value) => points.map((p, k) => `${k ? "L" : "M"}${x(p.step).toFixed(1)},${y(value(p)).toFixed(1)}`).join("");
    if (points.some((p) => p.count > 1)) {
      const back = [...points].reverse().map((p) => `L${x(p.step).toFixed(1)},${y(p.low).toFixed(1)}`).join("");
      plot.append(svg("path", { d: `${pathOf((p) => p.high)}${back}Z`, fill: colour(i), opacity: 0.13 }));
    }
    plot.append(svg("path", { d: pathOf((p) => p.mean), fill: "none", stroke: colour(i), "stroke-width": 1.8, "stroke-dasharray": dash(i), "stroke-linejoin": "round" }));
    const marked = points.length <= 12 ? points : [points.at(-1)];
    for (const p of marked) plot.append(shape(i, x(p.step), y(p.mean)));
  }
  const cursor = svg("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  plot.append(cursor);
  return {
    positions: steps.map(x),
    leave: () => cursor.setAttribute("visibility", "hidden"),
    describe: (at) => {
      const step = steps[at], cursorX = x(step);
      cursor.setAttribute("x1", cursorX); cursor.setAttribute("x2", cursorX); cursor.setAttribute("visibility", "visible");
      const rows = curves.flatMap(([i, points]) => points.filter((p) => p.step === step).map((p) => [data.rows[i].label, formatValue(p, about), i]));
      return { head: `step ${step}`, rows, x: cursorX };
    },
  };
}
function formatValue(p, about) {
  const unit = about.unit && about.unit !== "%" ? ` ${about.unit}` : about.unit === "%" ? " %" : "";
  const text = Math.abs(p.mean) < 1 && about.digits > 2 ? p.mean.toPrecision(4) : p.mean.toFixed(about.digits);
  return `${text}${unit}`;
}
function tabulateCurves(curves, about) {
  const rows = curves.map(([i, points]) => {
    const best = (value) => points.reduce((a, b) => (value(a, b) ? a : b));
    return [data.rows[i].label, String(Math.max(...points.map((p) => p.count))), formatValue(points[0], about), formatValue(best((a, b) => a.mean <= b.mean), about), formatValue(best((a, b) => a.mean >= b.mean), about), formatValue(points.at(-1), about)];
  });
  return { head: ["row", "seeds", "first", "lowest", "highest", "last"], rows };
}

function addLegend(present, changed) {
  const host = byId("legend"), buttons = new Map(), items = el("ul", { "aria-label": "Rows that are drawn" });
  const update = () => buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(shownLines.has(i))));
  for (const i of present) {
    const mark = svg("svg", { width: 28, height: 12, viewBox: "0 0 28 12", "aria-hidden": "true" },
      svg("line", { x1: 0, x2: 28, y1: 6, y2: 6, stroke: colour(i), "stroke-width": 2, "stroke-dasharray": dash(i) }), shape(i, 14, 6));
    const button = el("button", { type: "button", class: "toggle", onclick: () => { if (!shownLines.delete(i)) shownLines.add(i); update(); changed(); } }, mark, bdi(data.rows[i].label));
    buttons.set(i, button);
    items.append(el("li", {}, button));
  }
  const only = (chosen) => { shownLines.clear(); chosen.forEach((i) => shownLines.add(i)); update(); changed(); };
  if (present.length > 1) {
    const bar = el("div", { class: "bar" },
      el("button", { type: "button", onclick: () => only(present) }, "All"), el("button", { type: "button", onclick: () => only([]) }, "None"));
    if (present.length > 12) {
      const search = el("input", { type: "search", placeholder: "part of a name", "aria-label": "Only rows whose name contains" });
      search.addEventListener("input", () => items.querySelectorAll("li").forEach((li, k) => { li.hidden = !data.rows[present[k]].label.toLowerCase().includes(search.value.toLowerCase()); }));
      bar.append(search, el("button", { type: "button", onclick: () => only(present.filter((i, k) => !items.children[k].hidden)) }, "Draw matches"));
    }
    host.append(bar);
  }
  if (present.length > FIRST) host.append(el("p", { class: "hint" }, `At first ${FIRST} of ${present.length} rows are drawn; a name switches its curve.`));
  host.append(items);
  update();
}

// Sweeps

// A scale for swept values: logarithmic if they span more than a decade, 0 before a gap.
function makeSweepScale(values, left, right) {
  const distinct = [...new Set(values.filter((v) => v !== null))].sort((a, b) => a - b);
  const positive = distinct.filter((v) => v > 0);
  const logarithmic = distinct[0] >= 0 && positive.length > 1 && positive.at(-1) / positive[0] > 12;
  if (!logarithmic) {
    const [low, high] = [distinct[0], distinct.at(-1)];
    const room = (right - left) * 0.05;
    const x = (v) => left + room + ((v - low) / (high - low || 1)) * (right - left - 2 * room);
    return { x, marks: distinct.length <= 8 ? distinct : chooseTicks(low, high, 5), gap: null };
  }
  const zero = distinct[0] === 0 ? (right - left) * 0.16 : 0;
  const [low, high] = [Math.log10(positive[0]), Math.log10(positive.at(-1))];
  const start = left + (right - left) * 0.05 + zero;
  const x = (v) => (v === 0 ? left + (right - left) * 0.05 : start + ((Math.log10(v) - low) / (high - low)) * (right - (right - left) * 0.05 - start));
  let marks = distinct;
  if (distinct.length > 8) {
    marks = zero ? [0] : [];
    const steps = high - low < 2.5 ? [1, 2, 5] : [1];
    for (let power = Math.floor(low); power <= high; power++) {
      marks.push(...steps.map((m) => +(m * 10 ** power).toPrecision(3)).filter((v) => v >= positive[0] && v <= positive.at(-1)));
    }
  }
  return { x, marks, gap: zero ? left + (right - left) * 0.05 + zero / 2 : null };
}

function fillSweeps() {
  const host = byId("sweep-charts");
  if (!host) return;
  const choice = byId("sweep-key");
  for (const key of Object.keys(data.swept)) choice.append(el("option", { value: key }, key));
  const draw = () => {
    const key = choice.value, { values, series } = data.swept[key];
    const names = [...new Set(series.filter((_, i) => values[i] !== null))];
    const many = names.length > COLOURS;
    host.replaceChildren(...data.columns.map((column, c) => {
      const points = values.map((value, i) => ({ value, i, cell: data.cells[i]?.[c], series: names.indexOf(series[i]) }))
        .filter((p) => p.value !== null && p.cell && p.cell[0] !== null).sort((a, b) => a.value - b.value);
      const rows = () => points.map((p) => [data.rows[p.i].label, formatPlain(p.value), formatCell(p.cell, column)]);
      return makeChart(column.heading, `${column.heading} against ${key}, ${points.length} rows; the arrow keys tell values`, 210,
        (plot, width) => drawSweep(plot, width, 210, points, column, key, many ? 1 : names.length),
        () => ({ head: ["row", key, column.heading], rows: rows() }));
    }));
    const lines = host.parentElement.querySelector(".keybox");
    lines?.remove();
    if (names.length > 1 && !many) host.after(el("ul", { class: "keybox" }, ...names.map((name, k) => el("li", {}, svg("svg", { width: 14, height: 14, viewBox: "-7 -7 14 14", "aria-hidden": "true" }, shape(k, 0, 0)), bdi(name)))));
  };
  choice.addEventListener("change", draw);
  draw();
}
function formatCell([mean, std], column) {
  return `${format(mean * column.scale, column.digits)}${std === null ? "" : ` ± ${format(std * column.scale, column.digits)}`}${column.unit ? ` ${column.unit}` : ""}`;
}

function drawSweep(plot, width, height, points, column, key, series) {
  if (!points.length) {
    plot.append(svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "no values"));
    return { positions: [] };
  }
  const s = column.scale;
  const [low, high] = padRange(points.flatMap((p) => [(p.cell[0] - (p.cell[1] || 0)) * s, (p.cell[0] + (p.cell[1] || 0)) * s]));
  const left = computeLeftMargin(low, high), right = width - 8, top = 8, bottom = 38;
  const y = drawYAxis(plot, low, high, height, left, right, top, bottom);
  const { x, marks, gap } = makeSweepScale(points.map((p) => p.value), left, right);
  const floor = height - bottom;
  plot.append(svg("line", { class: "axis", x1: left, x2: right, y1: floor, y2: floor }));
  if (gap !== null) plot.append(svg("path", { d: `M${gap - 4},${floor + 5}l4,-10m1,10l4,-10`, stroke: "var(--quiet)", fill: "none" }));
  let end = -Infinity;
  for (const mark of marks) {
    const text = formatPlain(mark), markX = x(mark), half = 3.3 * text.length;
    plot.append(svg("line", { class: "axis", x1: markX, x2: markX, y1: floor, y2: floor + 4 }));
    if (markX - half < end + 4) continue;
    plot.append(svg("text", { x: markX, y: floor + 16, "text-anchor": "middle" }, text));
    end = markX + half;
  }
  plot.append(svg("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, key));
  for (let k = 0; k < series; k++) {
    const members = series === 1 ? points : points.filter((p) => p.series === k);
    const joined = new Set(members.map((p) => p.series)).size === 1 && members.length > 1;
    if (joined) plot.append(svg("path", { d: members.map((p, n) => `${n ? "L" : "M"}${x(p.value)},${y(p.cell[0] * s)}`).join(""), fill: "none", stroke: colour(k), "stroke-width": 1.6, "stroke-dasharray": dash(k), opacity: 0.8 }));
    for (const p of members) {
      const pointX = x(p.value);
      if (p.cell[1] !== null) {
        const [a, b] = [y((p.cell[0] - p.cell[1]) * s), y((p.cell[0] + p.cell[1]) * s)];
        plot.append(svg("path", { d: `M${pointX - 4},${a}h8M${pointX},${a}V${b}M${pointX - 4},${b}h8`, stroke: colour(k), "stroke-width": 1.4, fill: "none" }));
      }
      plot.append(shape(k, pointX, y(p.cell[0] * s), members.length > 40 ? { opacity: 0.7 } : {}));
    }
  }
  const cursor = svg("circle", { r: 8, fill: "none", stroke: "var(--ink)", visibility: "hidden" });
  plot.append(cursor);
  const places = points.map((p) => [x(p.value), y(p.cell[0] * s)]);
  return {
    positions: places.map(([px]) => px),
    find: (px, py) => { let best = 0; places.forEach(([a, b], i) => { if ((a - px) ** 2 + (b - py) ** 2 < (places[best][0] - px) ** 2 + (places[best][1] - py) ** 2) best = i; }); return best; },
    leave: () => cursor.setAttribute("visibility", "hidden"),
    describe: (at) => {
      const [px, py] = places[at], p = points[at];
      cursor.setAttribute("cx", px); cursor.setAttribute("cy", py); cursor.setAttribute("visibility", "visible");
      return { head: `${key} = ${formatPlain(p.value)}`, rows: [[data.rows[p.i].label, formatCell(p.cell, column), series === 1 ? 0 : p.series]], x: px };
    },
  };
}

// Parallel coordinates

const between = (part) => `color-mix(in oklab, var(--high) ${(100 * part).toFixed(0)}%, var(--low))`;

function fillParallel() {
  const host = byId("parallel");
  if (!host) return;
  const choice = byId("parallel-by"), scale = byId("parallel-scale");
  const metrics = data.columns.map((column, c) => ({ column, c })).filter(({ c }) => data.cells.some((row) => row[c][0] !== null));
  metrics.forEach(({ column, c }) => choice.append(el("option", { value: c }, column.heading)));
  if (metrics.length) choice.value = metrics.at(-1).c;
  const keys = Object.keys(data.swept);
  const axes = [
    ...keys.map((key) => ({ name: key.split("."), values: data.swept[key].values, better: false, text: formatPlain })),
    ...metrics.map(({ column, c }) => ({
      name: column.axis,
      values: data.cells.map((row) => (row[c][0] === null ? null : row[c][0] * column.scale)), better: true, higher: column.higher, text: (v) => format(v, column.digits),
    })),
  ];
  const rows = data.cells.map((_, i) => i).filter((i) => axes.filter((axis) => axis.values[i] !== null).length > 1 && !data.rows[i].baseline);
  const drawn = makeChart("", "Parallel coordinates of the swept settings and the metrics, a line per row; the arrow keys step through the rows", 330, (plot, width) => {
    const height = 330, top = 56, bottom = 22, edge = 46;
    const axisX = (k) => edge + (k * (width - 2 * edge)) / Math.max(1, axes.length - 1);
    const fits = axes.map((axis) => {
      const sorted = axis.values.filter((v, i) => v !== null && rows.includes(i)).sort((a, b) => a - b);
      const logarithmic = !axis.better && sorted[0] > 0 && sorted.at(-1) / sorted[0] > 12;
      const shape = (v) => (logarithmic ? Math.log10(v) : v);
      const [low, high] = [shape(sorted[0]), shape(sorted.at(-1))];
      const part = (v) => (high === low ? 0.5 : (shape(v) - low) / (high - low));
      const up = (v) => (axis.better && !axis.higher ? 1 - part(v) : part(v));
      return { sorted, y: (v) => height - bottom - up(v) * (height - top - bottom), up };
    });
    const by = metrics.findIndex(({ c }) => c === Number(choice.value)) + keys.length;
    const paths = rows.map((i) => {
      const value = axes[by]?.values[i];
      const d = axes.map((axis, k) => [axis.values[i], k]).filter(([v]) => v !== null).map(([v, k], n) => `${n ? "L" : "M"}${axisX(k).toFixed(1)},${fits[k].y(v).toFixed(1)}`).join("");
      return svg("path", { class: "row", d, stroke: value === null || value === undefined ? "var(--quiet)" : between(fits[by].up(value)) });
    });
    plot.append(...paths);
    axes.forEach((axis, k) => {
      const { sorted } = fits[k];
      plot.append(svg("line", { class: "axis", x1: axisX(k), x2: axisX(k), y1: top, y2: height - bottom }));
      const nameParts = axis.name.slice(-2);
      nameParts.forEach((part, n) => plot.append(svg("text", { x: axisX(k), y: top - 38 + 13 * (n + 2 - nameParts.length), "text-anchor": "middle" }, part)));
      const ends = axis.better && !axis.higher ? [sorted.at(-1), sorted[0]] : [sorted[0], sorted.at(-1)];
      plot.append(svg("text", { x: axisX(k), y: height - 6, "text-anchor": "middle" }, axis.text(ends[0])), svg("text", { x: axisX(k), y: top - 6, "text-anchor": "middle" }, axis.text(ends[1])));
    });
    const light = (at) => paths.forEach((path, n) => { path.classList.toggle("lit", n === at); path.classList.toggle("dim", at >= 0 && n !== at); if (n === at) plot.append(path); });
    const distance = (n, px, py) => { // distance of the pointer from a line, at the pointer's x
      const corners = axes.map((axis, k) => [axis.values[rows[n]], k]).filter(([v]) => v !== null).map(([v, k]) => [axisX(k), fits[k].y(v)]);
      const beyond = corners.findIndex(([x]) => x >= px), k = beyond < 0 ? corners.length - 1 : Math.max(1, beyond);
      const [[x0, y0], [x1, y1]] = [corners[k - 1], corners[k]];
      return Math.abs(y0 + ((y1 - y0) * (px - x0)) / (x1 - x0) - py);
    };
    return {
      positions: rows.map(() => width / 2),
      find: (px, py) => rows.reduce((best, _, n) => (distance(n, px, py) < distance(best, px, py) ? n : best), 0),
      leave: () => light(-1),
      describe: (at) => {
        light(at);
        return { head: data.rows[rows[at]].label, rows: axes.map((axis) => [axis.name.join(axis.better ? " " : "."), axis.values[rows[at]] === null ? "–" : axis.text(axis.values[rows[at]]), null]), x: width / 2 };
      },
    };
  }, null);
  drawn.style.setProperty("--least", `${axes.length * 6.2}rem`);
  host.append(drawn);
  const update = () => {
    const column = data.columns[Number(choice.value)];
    scale.replaceChildren("worse", el("i"), "better");
    scale.setAttribute("aria-label", `from worse to better ${column ? column.heading : ""}`);
    drawn.redraw();
  };
  choice.addEventListener("change", update);
  if (metrics.length) update(); else choice.closest(".bar").hidden = true;
}

// Images

const view = { image: 0, kind: "prediction" };
const KINDS = { prediction: "prediction", error: "error map" };

function makeImage(source, alt, map = true) {
  return el("img", { src: source, alt, class: map ? "map" : null, decoding: "async" });
}
function makeSelect(label, options, value, changed) {
  const choice = el("select", {}, ...options.map(([key, text]) => el("option", { value: key }, text)));
  choice.value = value;
  choice.addEventListener("change", () => changed(choice.value));
  return el("label", {}, label, choice);
}
const linesOf = (entry) => Object.keys(entry.lines).map(Number);
const labelOf = (i) => data.rows[i].label;

function fillWall() {
  const bar = byId("wall-bar");
  if (!bar) return;
  const images = data.wall.map((entry, i) => [i, entry.id]);
  bar.append(makeSelect("image", images, 0, (value) => { view.image = Number(value); drawWall(); drawSlider(); }),
    makeSelect("show", Object.entries(KINDS), view.kind, (value) => { view.kind = value; drawWall(); }));
  drawWall();
  drawSlider();
}

function drawWall() {
  const entry = data.wall[view.image], tasks = Object.keys(entry.tasks);
  const cell = (task, content) => el("td", {}, el("span", { class: "what" }, ...breakable(task)), content);
  const head = el("thead", {}, el("tr", {}, el("td", { class: "lead-cell" }), ...tasks.map((task) => el("th", { scope: "col" }, ...breakable(task)))));
  const label = el("tr", {}, el("th", { scope: "row" }, "label"), ...tasks.map((task) => cell(task, el("span", { class: "still" }, makeImage(entry.tasks[task].label, `label of ${task}, image ${entry.id}`)))));
  const rows = linesOf(entry).map((i) => el("tr", {}, el("th", { scope: "row" }, bdi(labelOf(i))), ...tasks.map((task) => {
    const maps = entry.lines[i][task];
    if (!maps) return cell(task, "–");
    const caption = `${KINDS[view.kind]} of ${task}, ${labelOf(i)}, image ${entry.id}`;
    return cell(task, el("button", { type: "button", class: "tile", "aria-label": `Enlarge: ${caption}`, onclick: () => openViewer(i, task) }, makeImage(maps[view.kind], caption)));
  })));
  const top = el("tr", {}, el("th", { scope: "row" }, "image"), el("td", {}, el("span", { class: "still" }, makeImage(entry.image, `image ${entry.id}`, false))));
  byId("wall").replaceChildren(el("table", { class: "wall" }, el("caption", { class: "hidden" }, `Picture ${entry.id}: label, then ${KINDS[view.kind]} of each row`), head, el("tbody", {}, top, label, ...rows)), makeKeybox(entry, tasks));
  const table = byId("wall").firstChild;
  table.style.setProperty("max-width", `${12 + tasks.length * 17}rem`);
}
// The meaning of the colours of a task's labels and predictions, beside its name.
function makeTaskLegend(entry, task) {
  const rows = entry.tasks[task].legend.filter(([text]) => !text.startsWith("error: "));
  return rows.length ? el("div", {}, el("span", {}, ...breakable(task)), makeLegendList(rows)) : "";
}
// The meaning of the colours of predictions, or of the darkest colour of the error maps, task by task.
function makeKeybox(entry, tasks) {
  if (view.kind !== "error") return el("div", { class: "legends" }, ...tasks.map((task) => makeTaskLegend(entry, task)));
  const rows = tasks.map((task) => [task, entry.tasks[task].legend.filter(([text]) => text.startsWith("error: "))]).filter(([, errors]) => errors.length === 2);
  if (!rows.length) return makeLegendList([]);
  const [[, [[none, right], [, wrong]]]] = rows, tasksOf = new Map();
  for (const [task, [, [text]]] of rows) tasksOf.set(text.slice(7), [...(tasksOf.get(text.slice(7)) || []), task]);
  const largest = [...tasksOf].map(([text, names]) => `${text}${/\d/.test(text) ? " or more" : ""} (${names.join(", ")})`);
  return makeLegendList([[none, right], [largest.join(", "), wrong]]);
}
function makeLegendList(rows) {
  return el("ul", { class: "keybox" }, ...rows.map(([text, rgb]) => {
    const swatch = el("span", { class: "swatch" });
    swatch.style.backgroundColor = rgb;
    return el("li", {}, swatch, text);
  }));
}

function openViewer(line, task) {
  const dialog = byId("viewer"), entry = data.wall[view.image];
  const lines = linesOf(entry), tasks = Object.keys(entry.tasks);
  let [row, column] = [lines.indexOf(line), tasks.indexOf(task)];
  const draw = () => {
    const i = lines[row], name = tasks[column], maps = entry.lines[i][name], about = `${name}, image ${entry.id}`;
    const part = (title, source, alt, map = true) => el("figure", {}, el("figcaption", {}, title), source ? makeImage(source, alt, map) : "–");
    const arrow = (text, label, dx, dy) => el("button", { type: "button", "aria-label": label, title: label, onclick: () => move(dx, dy) }, text);
    dialog.replaceChildren(el("div", { class: "viewer" },
      el("div", { class: "top" }, el("h2", { id: "viewer-title" }, `${name}: `, bdi(labelOf(i))),
        el("div", { class: "arrows" }, arrow("←", "previous task (left arrow)", -1, 0), arrow("→", "next task (right arrow)", 1, 0),
          arrow("↑", "previous row (up arrow)", 0, -1), arrow("↓", "next row (down arrow)", 0, 1),
          el("button", { type: "button", autofocus: true, onclick: () => dialog.close() }, "Close"))),
      el("div", { class: "grid2" },
        part("prediction", maps?.prediction, `prediction of ${about}`), part("label", entry.tasks[name].label, `label of ${about}`),
        part("error", maps?.error, `error map of ${about}`), part(`image ${entry.id}`, entry.image, `image ${entry.id}`, false)),
      makeLegendList(entry.tasks[name].legend)));
  };
  const move = (dx, dy) => {
    column = (column + dx + tasks.length) % tasks.length;
    row = (row + dy + lines.length) % lines.length;
    const index = [...dialog.querySelectorAll("button")].indexOf(document.activeElement);
    draw();
    dialog.querySelectorAll("button")[Math.max(0, index)]?.focus();
  };
  dialog.onkeydown = (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    move(...step);
  };
  dialog.onclick = (event) => { if (event.target === dialog) dialog.close(); };
  dialog.onclose = () => dialog.replaceChildren();
  draw();
  dialog.showModal();
}

const sides = { task: null, left: null, right: null, cut: 50 };
function drawSlider() {
  const host = byId("slider"), entry = data.wall[view.image], tasks = Object.keys(entry.tasks), lines = linesOf(entry);
  if (!tasks.length) return host.replaceChildren(el("p", { class: "empty" }, "This image has no predictions."));
  const options = [...lines.map((i) => [String(i), labelOf(i)]), ["label", "label"], ["image", "image"]];
  const keys = options.map(([key]) => key);
  if (!tasks.includes(sides.task)) sides.task = tasks[0];
  if (!keys.includes(sides.left)) sides.left = keys[0];
  if (!keys.includes(sides.right)) sides.right = lines.length > 1 ? keys[lines.length - 1] : "label";
  const source = (key) => (key === "image" ? entry.image : key === "label" ? entry.tasks[sides.task].label : entry.lines[key]?.[sides.task]?.prediction);
  const text = (key) => Object.fromEntries(options)[key];
  const choose = (key) => (value) => { sides[key] = value; drawSlider(); };
  const [left, right] = [source(sides.left), source(sides.right)];
  const bar = el("div", { class: "bar" }, makeSelect("task", tasks.map((t) => [t, t]), sides.task, choose("task")),
    makeSelect("left", options, sides.left, choose("left")), makeSelect("right", options, sides.right, choose("right")));
  const again = [...host.querySelectorAll("select")].indexOf(document.activeElement);
  if (!left || !right) {
    host.replaceChildren(bar, el("p", { class: "empty" }, "One of the two has no prediction of this task."));
  } else {
    const over = el("div", { class: "over" }, makeImage(left, `left: ${sides.task}, ${text(sides.left)}`, sides.left !== "image"));
    const range = el("input", { type: "range", min: 0, max: 100, step: 1, value: sides.cut, "aria-label": "Where the left image ends, in percent" });
    const box = el("div", { class: "slider" }, makeImage(right, `right: ${sides.task}, ${text(sides.right)}`, sides.right !== "image"), over, el("div", { class: "edge" }), range);
    const moveCut = () => { sides.cut = Number(range.value); box.style.setProperty("--cut", `${sides.cut}%`); };
    range.addEventListener("input", moveCut);
    moveCut();
    const captions = el("div", { class: "sides" }, bdi(text(sides.left)), bdi(text(sides.right)));
    host.replaceChildren(bar, box, captions, el("div", { class: "legends" }, makeTaskLegend(entry, sides.task)));
  }
  if (again >= 0) host.querySelectorAll("select")[again].focus();
}

setUpTheme();
setUpSorting();
fillSweeps();
fillParallel();
fillCurves();
fillWall();
