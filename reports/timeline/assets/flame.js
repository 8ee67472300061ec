// The flame lane and the heat map. Calls are drawn as bars where there is room; the rest of the window is density.

const MAX_BARS = 2500;
const DENSITY_COLUMNS = 600;
const HEAT_ROWS = 72;
const HEAT_STEPS = 8;
const HEAT_FLOOR_NS = 100;
const HEAT_COLUMNS = 400;
const LEAST_HEAT_ROWS = 2 * HEAT_STEPS;

function callHover(index) {
  const { start_ns, duration_ns, inside_ns, thread, unfinished } = data.calls;
  const called = page.functions[data.calls.function[index]];
  const parent = data.parent[index];
  const lines = [
    `<b>${plain(called.name)}</b>`,
    `latency ${unfinished[index] ? "at least " : ""}${duration(duration_ns[index])}, self ${duration(duration_ns[index] - inside_ns[index])}`,
    `at ${at(start_ns[index], Math.max(decimals(duration_ns[index]), 6))}`,
  ];
  if (parent >= 0) lines.push(`called by ${plain(page.functions[data.calls.function[parent]].name)} (${duration(duration_ns[parent])})`);
  for (const argument of called.arguments) lines.push(plain(argumentText(argument, argumentOf(index, argument))));
  if (page.threads.length > 1) lines.push(plain(page.threads[thread[index]].name));
  return lines.join("<br>");
}

const argumentOf = (index, argument) => data.columns.get(argument.column)[data.place[index]];

// The calls of the window that get a bar, and those that do not: slow ones first, then the longest.
function splitCalls(from, to, perPx) {
  const { start_ns, duration_ns } = data.calls;
  const wide = [];
  const narrow = [];
  for (let index = 0; index < start_ns.length; index++) {
    const length = duration_ns[index];
    if (start_ns[index] > to || start_ns[index] + length < from) continue;
    (length >= 0.7 * perPx || length >= page.slow_ns ? wide : narrow).push(index);
  }
  if (wide.length > MAX_BARS) {
    wide.sort((one, other) => duration_ns[other] - duration_ns[one]);
    return { bars: wide.slice(0, MAX_BARS), rest: narrow.concat(wide.slice(MAX_BARS)) };
  }
  return { bars: wide, rest: narrow };
}

function flameLane(colours, widthPx) {
  const span = state.to - state.from;
  const [from, to] = [state.from - span / 4, state.to + span / 4];
  const perPx = span / widthPx;
  const { bars, rest } = splitCalls(from, to, perPx);
  const rowPx = Math.min(Math.max(420 / data.rows, 7), 27);
  const traces = [];
  const counted = densityTrace(rest, from, to, colours, traces);
  const byFunction = page.functions.map(() => []);
  for (const index of bars) byFunction[data.calls.function[index]].push(index);
  let legendPx = widthPx - 330;
  page.functions.forEach((called, place) => {
    if (!called.calls) return;
    const mine = byFunction[place];
    legendPx -= 46 + 6.4 * called.name.length;
    traces.push(callBars(called.name, place, mine, perPx, rowPx, colours, legendPx > 0));
  });
  const notes = bars.length ? [`${plural(bars.length, "call")} one by one`] : [counted ? "none one by one" : "none at this place"];
  if (counted) notes.push(`${number(counted)} shorter ones as density`);
  return {
    key: "flame", title: page.calls.total ? `Calls: ${notes.join(", ")}` : "Calls", traces, height: Math.max(Math.round(rowPx * data.rows) + 6, 40),
    empty: page.calls.total ? "" : "no call was recorded",
    axis: { range: [data.rows - 0.5, -0.5], showgrid: false, zeroline: false, tickvals: [] },
    labels: page.threads.length > 1 ? page.threads.map((thread, index) => ({ text: plain(thread.name), y: data.firstRow[index] - 1 })) : [],
  };
}

function callBars(name, place, calls, perPx, rowPx, colours, inLegend) {
  const { start_ns, duration_ns, depth, thread } = data.calls;
  const spans = calls.map((index) => clipped(start_ns[index], start_ns[index] + duration_ns[index]));
  const colour = functionColour(place);
  const label = (index, span) => {
    const room = ((span[1] - span[0]) / perPx - 8) / 6.2;
    if (rowPx < 13 || room < 6) return "";
    const long = `${name} ${duration(duration_ns[index])}`;
    return plain(long.length <= room ? long : name.length <= room ? name : `${name.slice(0, Math.floor(room) - 1)}…`);
  };
  return {
    type: "bar", orientation: "h", name: plain(name), legendgroup: name, showlegend: inLegend, visible: true,
    // an empty trace has no entry in the legend
    base: spans.length ? spans.map((span) => toAxis(span[0])) : [null],
    x: spans.length ? spans.map((span) => Math.max(span[1] - span[0], 0.4 * perPx) / 1e9) : [null],
    y: spans.length ? calls.map((index) => data.firstRow[thread[index]] + depth[index]) : [null],
    width: 0.9, text: calls.map((index, at) => label(index, spans[at])), textposition: "inside", insidetextanchor: "middle",
    textangle: 0, constraintext: "none", textfont: { size: 11, color: inkOn(colour) }, cliponaxis: true,
    customdata: calls.map((index) => ({ call: index })),
    marker: {
      color: colour, line: { width: perPx * 4 < 1e9 ? 0.5 : 0, color: colours.panel },
      pattern: { shape: functionPattern(place), fillmode: "overlay", fgcolor: colours.panel, size: 6, solidity: 0.25 },
    },
    hovertext: calls.map(callHover), hoverinfo: "text",
  };
}

// Adds the density of the window to the traces; returns how many calls it stands for in the window itself.
function densityTrace(rest, from, to, colours, traces) {
  const { group, bin, calls, busy_ns, longest_ns } = data.density;
  const binNs = page.density.bin_ns;
  let width = (to - from) / DENSITY_COLUMNS;
  if (group.length) width = Math.max(Math.ceil(width / binNs), 1) * binNs;
  const first = Math.floor(Math.max(from, 0) / width);
  const columns = Math.max(Math.ceil(Math.min(to, page.elapsed_ns) / width) - first, 1);
  const size = data.rows * columns;
  const count = new Float64Array(size);
  const busy = new Float64Array(size);
  const longest = new Float64Array(size).fill(-1);
  const which = new Int16Array(size).fill(-1);
  let total = 0;
  const add = (row, start, number, time, most, called) => {
    const column = Math.floor(start / width) - first;
    if (column < 0 || column >= columns) return;
    if (start >= state.from - width && start <= state.to) total += number;
    const cell = row * columns + column;
    count[cell] += number;
    busy[cell] += time;
    if (most > longest[cell]) [longest[cell], which[cell]] = [most, called];
  };
  for (const index of rest) {
    const start = data.calls.start_ns[index];
    const length = data.calls.duration_ns[index];
    add(data.firstRow[data.calls.thread[index]] + data.calls.depth[index], start, 1, length, length, data.calls.function[index]);
  }
  for (let index = 0; index < group.length; index++) {
    const [thread, depth, called] = page.density.groups[group[index]];
    add(data.firstRow[thread] + depth, bin[index] * binNs, calls[index], busy_ns[index], longest_ns[index], called);
  }
  const used = page.functions.length || 1;
  const [z, hover] = [[], []];
  let any = false;
  for (let row = 0; row < data.rows; row++) {
    const [values, texts] = [[], []];
    for (let column = 0; column < columns; column++) {
      const cell = row * columns + column;
      if (!count[cell]) {
        values.push(null);
        texts.push("");
        continue;
      }
      any = true;
      const share = Math.min(busy[cell] / width, 1);
      values.push(which[cell] + 0.12 + 0.87 * Math.sqrt(share));
      const name = plain(page.functions[which[cell]].name);
      texts.push(`<b>${plural(count[cell], "call")}</b> within ${duration(width)}, ${(100 * share).toPrecision(2)}% of the time`
        + `<br>the longest: ${name} ${duration(longest[cell])}<br>from ${at((first + column) * width, decimals(width) + 1)}; zoom in to see each`);
    }
    z.push(values);
    hover.push(texts);
  }
  if (any) {
    const scale = [];
    for (let place = 0; place < used; place++) {
      scale.push([place / used, mixed(functionColour(place), colours.panel, 0.3)], [(place + 0.999) / used, functionColour(place)]);
    }
    scale.push([1, functionColour(used - 1)]);
    traces.push({
      type: "heatmap", z, x0: toAxis((first + 0.5) * width), dx: width / 1e9, y0: 0, dy: 1, zmin: 0, zmax: used, zsmooth: false,
      ygap: 3, colorscale: scale, showscale: false, hovertext: hover, hoverinfo: "text", showlegend: false,
    });
  }
  return total;
}

function heatLane(colours) {
  const { cell, calls } = data.heat;
  const { columns, column_ns: columnNs } = page.heat;
  const span = state.to - state.from;
  const [from, to] = [Math.max(state.from - span / 4, 0), Math.min(state.to + span / 4, page.elapsed_ns)];
  const merged = Math.max(Math.ceil((to - from) / columnNs / HEAT_COLUMNS), 1);
  const first = Math.floor(from / columnNs / merged);
  const shown = Math.max(Math.ceil(to / columnNs / merged) - first, 1);
  const counts = new Float64Array(shown * HEAT_ROWS);
  let [low, high] = [HEAT_ROWS, -1];
  for (let index = 0; index < cell.length; index++) {
    const row = cell[index] % HEAT_ROWS;
    const place = (cell[index] - row) / HEAT_ROWS;
    const called = Math.floor(place / columns);
    if (state.heatFunction >= 0 && called !== state.heatFunction) continue;
    [low, high] = [Math.min(low, row), Math.max(high, row)];
    const column = Math.floor((place % columns) / merged) - first;
    if (column >= 0 && column < shown) counts[row * shown + column] += calls[index];
  }
  if (high >= 0 && high - low < LEAST_HEAT_ROWS) {
    low = Math.max(low - Math.ceil((LEAST_HEAT_ROWS - (high - low)) / 2), 0);
    high = Math.min(low + LEAST_HEAT_ROWS, HEAT_ROWS - 1);
  }
  const traces = [];
  const width = columnNs * merged;
  const edge = (row) => HEAT_FLOOR_NS * 10 ** (row / HEAT_STEPS);
  if (high >= 0) {
    const [z, hover] = [[], []];
    for (let row = low; row <= high; row++) {
      const range = `${duration(edge(row))} to ${duration(edge(row + 1))}`;
      const values = Array.from(counts.subarray(row * shown, (row + 1) * shown));
      z.push(values.map((count) => (count ? Math.log10(count) : null)));
      hover.push(values.map((count, column) => (count
        ? `<b>${plural(count, "call")}</b> of ${range}<br>within ${duration(width)} from ${at((first + column) * width, decimals(width) + 1)}` : "")));
    }
    traces.push({
      type: "heatmap", z, x0: toAxis((first + 0.5) * width), dx: width / 1e9, y0: low, dy: 1, zmin: 0, zsmooth: false,
      colorscale: heatScale(colours), showscale: false, hovertext: hover, hoverinfo: "text",
    });
  }
  const decades = [];
  for (let row = 0; row <= HEAT_ROWS; row += HEAT_STEPS) if (row >= low && row <= high + 1) decades.push(row);
  const name = state.heatFunction < 0 ? "all functions" : page.functions[state.heatFunction].name;
  return {
    key: "heat", traces, height: 140, shrinks: true, title: `Latency heat map: ${plain(name)}, calls per ${duration(width)}`,
    empty: high >= 0 ? "" : "no call was recorded",
    axis: {
      range: high >= 0 ? [low - 0.5, high + 0.5] : [0, 1], showgrid: false, zeroline: false,
      tickvals: decades.map((row) => row - 0.5), ticktext: decades.map((row) => duration(edge(row))),
    },
  };
}

// One hue from pale to strong: its order survives colour blindness and a black-and-white print.
function heatScale(colours) {
  const dark = colours.panel.toLowerCase() !== "#ffffff";
  return dark ? [[0, "#2c6288"], [0.5, "#56b4e9"], [1, "#f4f9a8"]] : [[0, "#b9d9f0"], [0.5, "#2f7fb8"], [1, "#0b1f4b"]];
}
