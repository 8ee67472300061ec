// Draws both sides: timelines on one axis, the distribution of one function, and the differential flame graph.

const page = JSON.parse(document.getElementById("document").textContent);
const byId = (id) => document.getElementById(id);
const CONFIG = { displayModeBar: false, responsive: false, doubleClick: "reset" };
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif";
const LANE_PX = { stalls: 84, queue: 70 };
const MOST_FOLD = 8;

function theme() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(["panel", "ink", "faint", "line", "refused", "stall", "queue", "before", "after"]
    .map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

const widthOf = (id) => Math.max(Math.floor(byId(id).parentElement.clientWidth), 320);

function frame(colours, width, height, margin) {
  return {
    width, height, margin, paper_bgcolor: colours.panel, plot_bgcolor: colours.panel, font: { family: FONT, size: 12, color: colours.ink },
    hovermode: "closest", hoverlabel: { align: "left", bgcolor: colours.panel, bordercolor: colours.faint, font: { color: colours.ink, family: FONT } },
    annotations: [], uirevision: "kept",
  };
}

const axis = (colours) => ({
  color: colours.faint, gridcolor: colours.line, zeroline: false, showline: true, linecolor: colours.line, mirror: true, tickfont: { size: 11 },
});

// Each recording has a lane of its stalls and one of its accept queue with what was refused; all share one time axis.
function drawTimelines(colours) {
  const width = widthOf("timelines");
  const gap = 26;
  const each = LANE_PX.stalls + LANE_PX.queue + 2 * gap;
  const inner = each * page.timelines.length;
  const layout = frame(colours, width, inner + 60, { l: 70, r: 18, t: 14, b: 44 });
  const traces = [];
  const longest = Math.max(1, ...page.timelines.flatMap((line) => line.stalls.duration_ns));
  page.timelines.forEach((line, place) => {
    const colour = colours[line.side];
    const top = place * each;
    const lanes = [[top + gap, LANE_PX.stalls], [top + gap + LANE_PX.stalls + gap, LANE_PX.queue]];
    lanes.forEach(([from, height], index) => {
      const number = 2 * place + index + 1;
      const suffix = number === 1 ? "" : String(number);
      layout[`yaxis${suffix}`] = {
        ...axis(colours), domain: [1 - (from + height) / inner, 1 - from / inner], fixedrange: true, anchor: "free", position: 0,
        ...(index === 0 ? { range: [0, longest / 1e6 * 1.08], ticksuffix: " ms", nticks: 4 } : { range: [0, 1.12], tickformat: ".0%", nticks: 3 }),
      };
    });
    const stallAxis = place === 0 ? "y" : `y${2 * place + 1}`;
    const queueAxis = `y${2 * place + 2}`;
    const { start_ns, duration_ns, refused, left } = line.stalls;
    traces.push({
      type: "bar", name: `stalls ${line.side}`, meta: `stalls ${place}`, yaxis: stallAxis, marker: { color: colour, line: { width: 1, color: colour } }, showlegend: false,
      x: start_ns.map((start, index) => (start + duration_ns[index] / 2) / 1e9), width: duration_ns.map((length) => length / 1e9),
      y: duration_ns.map((length) => length / 1e6), hoverinfo: "text",
      hovertext: start_ns.map((start, index) => `stall of ${duration(duration_ns[index])} at ${(start / 1e9).toFixed(3)} s<br>${number(refused[index])} refused`),
    });
    traces.push({
      type: "scatter", mode: "lines", name: `accept queue ${line.side}`, meta: `queue ${place}`, yaxis: queueAxis, line: { color: colours.queue, width: 1.3, shape: "hv" },
      x: line.queue.bin.map((bin) => bin * line.bin_ns / 1e9), y: line.queue.share, fill: "tozeroy", hoverinfo: "text", showlegend: false,
      hovertext: line.queue.share.map((share, index) => `accept queue ${(100 * share).toFixed(0)}% of its limit<br>at ${(line.queue.bin[index] * line.bin_ns / 1e9).toFixed(2)} s`),
    });
    traces.push({
      type: "scatter", mode: "markers", name: `refused ${line.side}`, meta: `refused ${place}`, yaxis: queueAxis, marker: { symbol: "x", size: 7, color: colours.refused }, showlegend: false,
      x: line.refused.bin.map((bin) => (bin + 0.5) * line.bin_ns / 1e9), y: line.refused.bin.map(() => 1.05), hoverinfo: "text",
      hovertext: line.refused.count.map((count, index) => `${plural(count, "connection")} refused<br>within ${duration(line.bin_ns)} from ${(line.refused.bin[index] * line.bin_ns / 1e9).toFixed(2)} s`),
    });
    const total = line.refused.count.reduce((sum, count) => sum + count, 0);
    const words = [`${plural(start_ns.length + left, "stall")}`, left ? `the ${number(start_ns.length)} longest drawn` : ""].filter(Boolean).join(", ");
    const label = (text, y) => layout.annotations.push({
      text, x: 0, xref: "paper", xanchor: "left", y: 1 - y / inner, yref: "paper", yanchor: "bottom", yshift: 2, showarrow: false, font: { size: 12 },
    });
    label(`<b style="color:${colour}">${line.side}</b> <b>${plain(line.name)}</b> ${plain(line.server)}: ${words}`, top + gap);
    label(`accept queue, share of its limit; <span style="color:${colours.refused}">×</span> ${number(total)} refused`, top + gap + LANE_PX.stalls + gap);
  });
  layout.xaxis = { ...axis(colours), range: [0, page.elapsed_ns / 1e9], ticksuffix: " s", side: "bottom", anchor: "free", position: 0, mirror: false };
  layout.bargap = 0;
  layout.dragmode = "zoom";
  return Plotly.react(byId("timelines"), traces, layout, CONFIG);
}

// A logarithmic axis of durations: round decades with their units.
function durationAxis(colours, values) {
  const low = Math.floor(Math.log10(Math.max(Math.min(...values), 1)));
  const high = Math.max(Math.ceil(Math.log10(Math.max(...values, 1))), low + 1);
  const decades = Array.from({ length: high - low + 1 }, (_, index) => 10 ** (low + index));
  return { ...axis(colours), type: "log", range: [low, high], tickvals: decades, ticktext: decades.map(duration), fixedrange: true };
}

async function drawDistribution(colours) {
  const chosen = page.distributions[Number(byId("function").value)];
  const all = chosen.sides.flatMap((side) => side.duration_ns);
  const width = widthOf("ecdf");
  const legend = { orientation: "h", x: 0, y: 1.12, font: { color: colours.ink } };
  const named = (side) => `${side.side} (${plural(side.calls, "call")}${side.short ? `, ${number(side.short)} only counted` : ""})`;
  const hover = (side) => side.duration_ns.map((length, index) => `${side.side}: ${(100 * side.share[index]).toPrecision(6).replace(/\.?0+$/, "")}% took at most ${duration(length)}`);
  const line = (side) => ({
    type: "scatter", mode: side.duration_ns.length < 40 ? "lines+markers" : "lines", name: named(side), line: { color: colours[side.side], width: 2, dash: side.side === "before" ? "dot" : "solid" },
    hovertext: hover(side), hoverinfo: "text",
  });
  await Plotly.react(byId("ecdf"), chosen.sides.map((side) => ({
    ...line(side), line: { ...line(side).line, shape: "hv" }, x: side.duration_ns.map((length) => Math.max(length, 1)), y: side.share,
  })), {
    ...frame(colours, width, 330, { l: 60, r: 18, t: 46, b: 52 }), legend, xaxis: { ...durationAxis(colours, all), title: { text: `duration of ${plain(chosen.name)}` } },
    yaxis: { ...axis(colours), range: [0, 1.03], tickformat: ".0%", title: { text: "share of calls" }, fixedrange: true },
  }, CONFIG);
  // the rarer half of the calls, by how rare they are: 1 in 2 on the left, 1 in a million on the right
  const rarest = Math.max(10, ...chosen.sides.map((side) => side.calls));
  const ticks = [2, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7].filter((many) => many <= 10 * rarest);
  const names = { 2: "p50", 10: "p90", 100: "p99", 1000: "p99.9", 10000: "p99.99" };
  await Plotly.react(byId("quantiles"), chosen.sides.map((side) => ({
    ...line(side), y: side.duration_ns.map((length) => Math.max(length, 1)),
    // the longest of n calls stands for the quantile 1 - 1/(n + 1)
    x: side.share.map((share) => 1 / (1 - share * side.calls / (side.calls + 1))),
  })), {
    ...frame(colours, width, 330, { l: 76, r: 18, t: 46, b: 52 }), legend, yaxis: durationAxis(colours, all),
    xaxis: { ...axis(colours), type: "log", range: [0, Math.log10(2 * rarest)], tickvals: ticks, ticktext: ticks.map((many) => names[many] ?? `1 in ${number(many)}`), title: { text: `quantile of ${plain(chosen.name)}` }, fixedrange: true },
  }, CONFIG);
}

// Red for more, blue for less, by how many times; beyond eight times no deeper.
function foldColour(before, after, colours) {
  const grey = [136, 146, 160];
  if (before <= 0 && after <= 0) return `rgb(${grey.join(",")})`;
  const fold = before <= 0 ? MOST_FOLD : after <= 0 ? 1 / MOST_FOLD : after / before;
  const share = Math.min(Math.abs(Math.log2(fold)) / Math.log2(MOST_FOLD), 1);
  const end = fold > 1 ? [213, 94, 0] : [0, 114, 178];
  return `rgb(${grey.map((part, index) => Math.round(part + (end[index] - part) * share)).join(",")})`;
}

function change(before, after) {
  if (before <= 0) return after <= 0 ? "as before" : "only after";
  if (after <= 0) return "gone after";
  return after >= before ? `${(after / before).toPrecision(3)} times as much` : `${(100 * (1 - after / before)).toPrecision(3)}% less`;
}

function drawGraph(colours) {
  const side = Number(byId("width").value);
  const shown = page.graph.map((node, index) => ({ ...node, index })).filter((node) => node.total[side] > 0);
  const perSecond = (ns) => `${duration(ns)}/s`;
  const box = byId("graph");
  const depth = (node) => (node.parent < 0 ? 1 : 1 + depth(page.graph[node.parent]));
  const rows = 1 + Math.max(1, ...shown.map(depth));
  return Plotly.react(box, [{
    type: "icicle", ids: ["all", ...shown.map((node) => `n${node.index}`)], labels: [`all calls ${side ? "after" : "before"}`, ...shown.map((node) => node.name)],
    parents: ["", ...shown.map((node) => (node.parent < 0 ? "all" : `n${node.parent}`))], values: [0, ...shown.map((node) => node.self[side])], branchvalues: "remainder",
    hovertext: [shown.length ? "" : "no call was recorded on this side", ...shown.map((node) => `<b>${plain(node.name)}</b>: ${change(...node.total)}<br>before ${perSecond(node.total[0])} (self ${perSecond(node.self[0])})<br>after ${perSecond(node.total[1])} (self ${perSecond(node.self[1])})`)],
    hoverinfo: "text", textinfo: "label", sort: false, tiling: { orientation: "v", pad: 1 }, pathbar: { visible: false },
    marker: { colors: [colours.line, ...shown.map((node) => foldColour(...node.total, colours))], line: { width: 1, color: colours.panel } },
    textfont: { size: 12, color: [colours.ink, ...shown.map(() => "#ffffff")] },
  }], { ...frame(colours, widthOf("graph"), 30 * rows + 20, { l: 8, r: 8, t: 8, b: 8 }), uniformtext: { minsize: 10, mode: "hide" } }, CONFIG);
}

async function draw() {
  const colours = theme();
  await drawTimelines(colours);
  if (!page.distributions.length) return;
  await drawDistribution(colours);
  await drawGraph(colours);
}

// Sort a table by the column whose head was clicked; again turns it round.
function sortTable(head) {
  const table = head.closest("table");
  const column = [...head.parentElement.children].indexOf(head);
  const falls = head.getAttribute("aria-sort") === "ascending";
  const sign = falls ? -1 : 1;
  const numeric = head.classList.contains("number");
  const key = (row) => row.cells[column].dataset.key;
  const rows = [...table.tBodies[0].rows].sort((one, other) => sign * (numeric ? Number(key(one)) - Number(key(other)) : key(one).localeCompare(key(other))));
  table.tBodies[0].append(...rows);
  table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", falls ? "descending" : "ascending");
}

async function start() {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old for the charts; use one of 2023 or later");
  const script = document.createElement("script");
  script.textContent = new TextDecoder().decode(await inflate(byId("plotly").textContent));
  document.head.append(script);
  await draw();
  byId("loading").remove();
  byId("function").addEventListener("change", () => drawDistribution(theme()));
  byId("width").addEventListener("change", () => drawGraph(theme()));
  byId("everything").addEventListener("click", () => Plotly.relayout(byId("timelines"), { "xaxis.range": [0, page.elapsed_ns / 1e9] }));
  byId("dark").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    draw();
  });
  document.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => sortTable(button.closest("th"))));
  let waiting = 0;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(draw, 150);
  });
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => {
  byId("loading").textContent = `The charts cannot be drawn: ${error.message}`;
  document.documentElement.dataset.ready = "failed";
  throw error;
});
