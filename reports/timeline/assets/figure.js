// Puts the lanes into one plotly figure with one time axis.

const MARGIN = { left: 78, right: 18, top: 62, bottom: 44 };
const TITLE_PX = 32;
const TOP_LABELS_PX = 20;
const LAPTOP_PX = 950;
const PICTURE_PX = 1280;
const CONFIG = { displayModeBar: false, responsive: false, doubleClick: false, scrollZoom: false };
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif";

// Room for the longest name to the left of the lanes.
function fitMargin() {
  const names = [...(page.servers.length > 1 ? page.servers.map((server) => server.name) : []), ...page.imported.spans.map((span) => span.source)];
  const longest = Math.max(0, ...names.map((name) => name.length));
  MARGIN.left = Math.min(Math.max(MARGIN.left, 6.6 * longest + 14), 200);
}

const chart = document.getElementById("chart");

function lanes(colours, widthPx) {
  return [refusalsLane(colours), queueLane(colours, widthPx), ratesLane(colours), stallsLane(colours, widthPx),
    flameLane(colours, widthPx), heatLane(colours), ...importedLanes(colours, widthPx)];
}

function figure(fullPx) {
  const colours = theme();
  const widthPx = fullPx - MARGIN.left - MARGIN.right;
  const shown = lanes(colours, widthPx);
  // on a laptop's screen more lanes are worth more than tall ones
  if (innerHeight < LAPTOP_PX) shown.filter((lane) => lane.shrinks).forEach((lane) => (lane.height = Math.round(lane.height * 0.78)));
  const innerPx = shown.reduce((sum, lane) => sum + lane.height + TITLE_PX, -TITLE_PX);
  const layout = baseLayout(colours, fullPx, innerPx + MARGIN.top + MARGIN.bottom);
  const traces = [];
  let top = 0;
  shown.forEach((lane, place) => {
    const suffix = place ? String(place + 1) : "";
    const domain = [1 - (top + lane.height) / innerPx, 1 - top / innerPx].map((share) => Math.min(Math.max(share, 0), 1));
    // every lane has a time axis of its own that follows the first: so each can show ticks, and all zoom together
    layout[`xaxis${suffix}`] = timeAxis(colours, widthPx, place, shown.length);
    layout[`yaxis${suffix}`] = {
      domain, fixedrange: true, anchor: `x${suffix}`, color: colours.faint, gridcolor: colours.line, zerolinecolor: colours.line,
      tickfont: { size: 10.5 }, showline: true, linecolor: colours.line, mirror: true, ...lane.axis, ...(lane.empty ? { tickvals: [] } : {}),
    };
    layout[`legend${suffix}`] = {
      // above the first lane are the labels of the time axis
      orientation: "h", x: 1, xanchor: "right", y: domain[1] + (place ? 0 : TOP_LABELS_PX / innerPx), yanchor: "bottom", yref: "paper", font: { size: 11, color: colours.ink },
      bgcolor: "rgba(0,0,0,0)", itemclick: lane.key === "flame" ? "toggle" : false, itemdoubleclick: false, tracegroupgap: 0, traceorder: "normal",
    };
    annotate(layout, lane, domain, suffix, colours);
    lane.traces.forEach((trace) => traces.push({
      ...trace, xaxis: `x${suffix}`, yaxis: `y${suffix}`, legend: `legend${suffix}`, meta: lane.key,
      hoverlabel: { align: "left", font: { size: 12, family: FONT }, bgcolor: colours.panel, bordercolor: colours.faint },
    }));
    // a lane without a trace has no plot at all
    if (!lane.traces.length) traces.push({ type: "scatter", x: [null], y: [null], xaxis: `x${suffix}`, yaxis: `y${suffix}`, showlegend: false });
    top += lane.height + TITLE_PX;
  });
  addBands(layout, colours, widthPx, innerPx);
  addTriggers(layout, colours, widthPx);
  addChosenStall(layout, colours);
  return { traces, layout };
}

function baseLayout(colours, width, height) {
  return {
    width, height, margin: { l: MARGIN.left, r: MARGIN.right, t: MARGIN.top, b: MARGIN.bottom },
    paper_bgcolor: colours.panel, plot_bgcolor: colours.panel, font: { family: FONT, size: 12, color: colours.ink },
    barmode: "stack", bargap: 0, dragmode: "zoom", hovermode: "closest", hoverdistance: 12, showlegend: true,
    uirevision: "kept", shapes: [], annotations: [],
  };
}

function timeAxis(colours, widthPx, place, count) {
  const { places, labels } = ticks(state.from, state.to, widthPx);
  const labelled = place === 0 || place === count - 1;
  return {
    range: [toAxis(state.from), toAxis(state.to)], autorange: false, matches: place ? "x" : undefined, anchor: `y${place ? place + 1 : ""}`,
    side: place === 0 ? "top" : "bottom", tickvals: places.map(toAxis), ticktext: labels, showticklabels: labelled, ticks: labelled ? "outside" : "",
    tickcolor: colours.line, color: colours.faint, gridcolor: colours.line, zeroline: false, showline: true, linecolor: colours.line,
    mirror: true, tickangle: 0, tickfont: { size: 11 },
  };
}

function annotate(layout, lane, domain, suffix, colours) {
  layout.annotations.push({
    text: `<b>${lane.title}</b>`, x: 0, xref: "paper", xanchor: "left", y: domain[1], yref: "paper", yanchor: "bottom", yshift: suffix ? 2 : TOP_LABELS_PX + 2,
    showarrow: false, font: { size: 12, color: colours.ink },
  });
  if (lane.empty) {
    layout.annotations.push({
      text: lane.empty, x: 0.5, xref: "paper", y: (domain[0] + domain[1]) / 2, yref: "paper", showarrow: false,
      font: { size: 12, color: colours.faint },
    });
  }
  for (const label of lane.labels ?? []) {
    layout.annotations.push({
      text: label.text, x: 0, xref: "paper", xanchor: "left", y: label.y, yref: `y${suffix}`, showarrow: false, xshift: 4,
      font: { size: 11, color: colours.ink },
    });
  }
}

// Hatched bands over all lanes. plotly has no hatched shapes: the lines are drawn as one path.
function addBands(layout, colours, widthPx, innerPx) {
  const perPx = (state.to - state.from) / widthPx;
  for (const band of page.bands) {
    const [start, end] = [Math.max(band.start_ns, state.from), Math.min(band.end_ns, state.to)];
    if (end <= start) continue;
    const [left, right] = [(start - state.from) / perPx, Math.max((end - state.from) / perPx, (start - state.from) / perPx + 2)];
    const rect = { type: "rect", xref: "x", yref: "paper", x0: toAxis(start), x1: toAxis(state.from + right * perPx), y0: 0, y1: 1, line: { width: 0 } };
    layout.shapes.push({ ...rect, fillcolor: colours.faint, opacity: 0.1, layer: "below", name: `band ${band.kind}` });
    layout.shapes.push({
      type: "path", xref: "x", yref: "paper", path: hatch(left, right, innerPx, band.kind, perPx), opacity: 0.38, layer: "below",
      line: { width: 1, color: colours.faint },
    });
    layout.annotations.push({
      text: right - left > 90 ? `▨ ${plain(band.text.length * 6 < right - left ? band.text : band.kind)}` : "▨", x: toAxis(start), xref: "x", xanchor: "left",
      y: 0, yref: "paper", yanchor: "bottom", showarrow: false, font: { size: 10.5, color: colours.ink }, bgcolor: colours.panel, borderpad: 2,
      hovertext: `${plain(band.text)}<br>${at(band.start_ns, 3)} to ${at(band.end_ns, 3)}`, captureevents: true,
    });
  }
}

function hatch(left, right, heightPx, kind, perPx) {
  const counted = kind === "lost" || kind === "thinned";
  const gap = counted ? 13 : 9;
  const falling = !counted;
  const segments = [];
  for (let base = left - heightPx; base < right; base += gap) {
    // the line runs from (base, bottom) to (base + height, top)
    const [from, to] = [Math.max(base, left), Math.min(base + heightPx, right)];
    if (to <= from) continue;
    const [low, high] = [(from - base) / heightPx, (to - base) / heightPx].map((share) => (falling ? 1 - share : share).toFixed(4));
    segments.push(`M${toAxis(state.from + from * perPx)},${low}L${toAxis(state.from + to * perPx)},${high}`);
  }
  return segments.join("");
}

// What made this capture: a line through all lanes at each trigger, its text where there is room.
function addTriggers(layout, colours, widthPx) {
  const perPx = (state.to - state.from) / widthPx;
  let labelled = -Infinity;
  for (const trigger of page.triggers) {
    if (trigger.time_ns < state.from || trigger.time_ns > state.to) continue;
    const x = toAxis(trigger.time_ns);
    layout.shapes.push({
      type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, name: "trigger",
      line: { width: 1.5, dash: "dash", color: colours.ink },
    });
    const place = (trigger.time_ns - state.from) / perPx;
    const room = place - labelled > 6.2 * trigger.text.length + 24;
    if (room) labelled = place;
    layout.annotations.push({
      text: room ? `⚑ ${plain(trigger.text)}` : "⚑", x, xref: "x", xanchor: "left", y: 1, yref: "paper", yanchor: "top", showarrow: false,
      font: { size: 10.5, color: colours.ink }, bgcolor: colours.panel, borderpad: 1, name: "trigger",
      hovertext: `<b>${plain(trigger.text)}</b><br>${plain(trigger.seen)}<br>${at(trigger.time_ns, 3)}`, captureevents: true,
    });
  }
}

function addChosenStall(layout, colours) {
  if (state.stall < 0) return;
  const stall = stallAt(state.stall);
  layout.shapes.push({
    type: "rect", xref: "x", yref: "paper", x0: toAxis(stall.start_ns), x1: toAxis(stall.end_ns), y0: 0, y1: 1, layer: "below",
    fillcolor: colours.stall, opacity: 0.1, line: { width: 0 }, name: "chosen stall",
  });
}

// What the page says above the chart, for a picture that stands alone.
function addHeading(layout, colours) {
  const lines = wrapped(document.getElementById("verdict").textContent, 125);
  const numbers = [...document.querySelectorAll("#key-numbers > div")]
    .map((item) => `${item.querySelector("dt").textContent}: <b>${plain(item.querySelector("strong").textContent)}</b>`);
  const text = [...lines.map((line) => `<b>${plain(line)}</b>`), `<span style="font-size:12px">${numbers.join("   ·   ")}</span>`,
    `<span style="font-size:11px;color:${colours.faint}">${plain([...document.querySelectorAll(".source > *")].map((item) => item.textContent).join(" · "))}</span>`];
  const height = 4 + 23 * text.length;
  layout.margin = { ...layout.margin, t: layout.margin.t + height };
  layout.height += height;
  layout.annotations.push({
    text: text.join("<br>"), x: 0, xref: "paper", xanchor: "left", xshift: 20 - MARGIN.left, y: 1, yref: "paper", yanchor: "bottom",
    yshift: MARGIN.top - 6, showarrow: false, align: "left", font: { size: 16, color: colours.ink },
  });
}

function wrapped(text, width) {
  const lines = [""];
  for (const word of text.split(/\s+/)) {
    const line = lines[lines.length - 1];
    if (line && line.length + word.length >= width) lines.push(word);
    else lines[lines.length - 1] = line ? `${line} ${word}` : word;
  }
  return lines;
}

async function draw() {
  const { traces, layout } = figure(chartWidth());
  await Plotly.react(chart, traces, layout, CONFIG);
  makeStallsFocusable();
  showWindow();
}

const chartWidth = () => Math.max(Math.floor(chart.parentElement.clientWidth), 640);

// The bars of stalls can be reached with Tab and chosen with Enter.
function makeStallsFocusable() {
  chart.querySelectorAll(".barlayer .trace").forEach((element) => {
    const trace = element.__data__?.[0]?.trace;
    if (trace?.meta !== "stalls") return;
    element.querySelectorAll("g.point").forEach((point) => {
      const chosen = trace.customdata?.[point.__data__?.i];
      if (chosen?.stall === undefined) return;
      const stall = stallAt(chosen.stall);
      point.setAttribute("tabindex", "0");
      point.setAttribute("role", "button");
      point.dataset.stall = chosen.stall;
      point.setAttribute("aria-label", `stall of ${stallText(stall)} at ${at(stall.start_ns)}`);
    });
  });
}

function setWindow(from, to) {
  const [low, high] = wholeRange();
  const span = Math.min(Math.max(to - from, LEAST_WINDOW_NS), high - low);
  const start = Math.min(Math.max((from + to - span) / 2, low), high - span);
  [state.from, state.to] = [start, start + span];
  return draw();
}
