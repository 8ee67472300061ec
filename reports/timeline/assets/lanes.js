// The lanes above the calls. Each function returns a lane: title, height, traces and the settings of its y axis.

const REFUSAL_PATTERNS = ["", "/", "x", ".", "\\", "+", "-"];
const REFUSAL_COLOURS = ["#D55E00", "#E69F00", "#CC79A7", "#8C6D46", "#56B4E9", "#0072B2", "#999999"];
const DASHES = ["solid", "dot", "dash", "longdash", "dashdot", "longdashdot"];
const DISPLAY_BINS = 160;

// Sums counts by display bins, which are whole multiples of the given bins, over the window.
function rebinned(times, counts, binNs, leastNs) {
  const span = state.to - state.from;
  let width = niceStep(Math.max(span / DISPLAY_BINS, leastNs));
  if (binNs > 1) width = Math.max(Math.round(width / binNs), 1) * binNs;
  const first = Math.floor((state.from - span / 4) / width);
  const last = Math.ceil((state.to + span / 4) / width);
  const sums = new Float64Array(Math.max(last - first, 1));
  for (let index = 0; index < times.length; index++) {
    const bin = Math.floor(times[index] / width) - first;
    if (bin >= 0 && bin < sums.length) sums[bin] += counts[index];
  }
  return { width, first, sums };
}

function refusalsLane(colours) {
  const { after_ns, seen_ns, count, path, listener, cause } = data.refusals;
  const middle = seen_ns.map((seen, index) => Math.max((seen + after_ns[index]) / 2, 0));
  const least = page.refusals.one_by_one ? 1000 : page.sample_ns;
  const keys = new Map();
  for (let index = 0; index < count.length; index++) {
    const key = `${path[index]}.${listener[index]}`;
    if (!keys.has(key)) keys.set(key, { path: path[index], listener: listener[index], times: [], counts: [], causes: [] });
    const entry = keys.get(key);
    entry.times.push(middle[index]);
    entry.counts.push(count[index]);
    entry.causes.push(cause[index]);
  }
  const several = new Set(listener).size > 1;
  let width = 0;
  const order = [...keys.values()].sort((one, other) => one.path - other.path || one.listener - other.listener);
  const traces = order.map((item, place) => {
    const binned = rebinned(item.times, item.counts, 1, least);
    width = binned.width;
    const way = page.refusals.paths[item.path];
    const where = listenerName(item.listener);
    const told = way.overflow && way.name.startsWith("accept queue full") ? "" : way.rst ? " (client gets RST)" : " (silent)";
    const name = shortened(way.name.replace(": accept queue full", "")) + told + (several ? `, ${where}` : "");
    const causes = causesOf(item, binned);
    const filled = [...binned.sums.keys()].filter((bin) => binned.sums[bin]);
    return {
      type: "bar", name: plain(name), x: filled.map((bin) => toAxis((binned.first + bin + 0.5) * width)),
      y: filled.map((bin) => binned.sums[bin]), width: width / 1e9,
      marker: {
        color: REFUSAL_COLOURS[place % REFUSAL_COLOURS.length], line: { width: 0 },
        pattern: { shape: REFUSAL_PATTERNS[place % REFUSAL_PATTERNS.length], fillmode: "overlay", fgcolor: colours.paper, size: 5, solidity: 0.35 },
      },
      hovertext: filled.map((bin) => {
        const from = (binned.first + bin) * width;
        return `<b>${number(binned.sums[bin])} refused</b> within ${duration(width)}<br>from ${at(Math.max(from, 0), decimals(width) + 1)}`
          + `<br>${plain(way.name)}<br>${plain(where)}${causes.get(bin) ?? ""}`;
      }),
      hoverinfo: "text",
    };
  });
  return {
    key: "refusals", height: 92, shrinks: true, traces,
    title: "Refused connections" + (width ? ` per ${duration(width)}` : ""),
    empty: count.length ? "" : "nothing was refused",
    axis: { rangemode: "tozero", nticks: 4 },
  };
}

// What caused the refusals of each bin, as a line of its hover.
function causesOf(item, { width, first }) {
  const counted = new Map();
  item.times.forEach((time, index) => {
    const name = page.refusals.causes[item.causes[index]];
    if (!name) return;
    const bin = Math.floor(time / width) - first;
    if (!counted.has(bin)) counted.set(bin, new Map());
    counted.get(bin).set(name, (counted.get(bin).get(name) ?? 0) + item.counts[index]);
  });
  return new Map([...counted].map(([bin, causes]) => [bin, `<br>cause: ${[...causes].map(([name, count]) => `${name} ${number(count)}`).join(", ")}`]));
}

function shortened(name) {
  return name.replace("accept queue full, sampled: path not seen", "accept queue full, sampled")
    .replace(" for another reason (ListenDrops beyond overflows)", " for another reason");
}

// The places to draw of a step function: those in the window, one beside it, and no more than four a pixel column.
function stepPlaces(times, values, widthPx) {
  const [from, to] = [state.from - (state.to - state.from) / 4, state.to + (state.to - state.from) / 4];
  let first = 0;
  let last = times.length;
  while (first < times.length && times[first] < from) first++;
  while (last > first && times[last - 1] > to) last--;
  first = Math.max(first - 1, 0);
  last = Math.min(last + 1, times.length);
  const places = [];
  if (last - first <= 2 * widthPx) {
    for (let index = first; index < last; index++) places.push(index);
    return places;
  }
  const column = (to - from) / widthPx;
  for (let index = first; index < last;) {
    let [least, most, next] = [index, index, index];
    const end = Math.floor((times[index] - from) / column);
    for (; next < last && Math.floor((times[next] - from) / column) === end; next++) {
      if (values[next] < values[least]) least = next;
      if (values[next] > values[most]) most = next;
    }
    places.push(...[...new Set([index, least, most, next - 1])].sort((one, other) => one - other));
    index = next;
  }
  return places;
}

function queueLane(colours, widthPx) {
  const traces = [];
  const several = page.queues.length > 1;
  page.queues.forEach((lane, index) => {
    const { time_ns, length, limit } = data.queues[index];
    const places = stepPlaces(time_ns, length, widthPx);
    const colour = several ? functionColour(index) : colours.queue;
    const x = places.map((place) => toAxis(time_ns[place]));
    const hover = places.map((place) => `<b>${number(length[place])} waiting</b> of ${number(limit[place])}`
      + `${length[place] > limit[place] ? ": full" : ""}<br>${at(time_ns[place], decimals(state.to - state.from))}<br>${plain(lane.address)}`);
    // the queue is what it was until it is seen to change, up to the end
    const last = places.length - 1;
    const until = toAxis(page.elapsed_ns);
    const extended = (values) => (last >= 0 && places[last] === time_ns.length - 1 ? [...values, values[last]] : values);
    const xs = last >= 0 && places[last] === time_ns.length - 1 ? [...x, Math.max(until, x[last])] : x;
    traces.push({
      type: "scatter", mode: "lines", name: several ? plain(lane.address) : "waiting", x: xs,
      y: extended(places.map((place) => length[place])),
      line: { shape: "hv", width: 1.5, color: colour, dash: several ? DASHES[index % DASHES.length] : "solid" },
      fill: several ? "none" : "tozeroy", fillcolor: mixed(colour, colours.panel, 0.18), hovertext: extended(hover), hoverinfo: "text",
    });
    traces.push({
      type: "scatter", mode: "lines", name: several ? `limit of ${plain(lane.address)}` : "limit", x: xs,
      y: extended(places.map((place) => limit[place])), showlegend: !several,
      line: { shape: "hv", width: 1.5, color: several ? colour : colours.refused, dash: "dash" },
      hovertext: extended(places.map((place) => `limit ${number(limit[place])}<br>${plain(lane.address)}`)), hoverinfo: "text",
    });
  });
  return {
    key: "queue", title: several ? "Accept queues (dashed: limits), connections" : "Accept queue, connections", height: 104, shrinks: true, traces,
    empty: page.queues.length ? "" : "no accept queue was observed", axis: { rangemode: "tozero", nticks: 4 },
  };
}

function ratesLane(colours) {
  const several = new Set(page.rates.map((lane) => lane.pid)).size > 1;
  let shown = 0;
  const traces = page.rates.map((lane, index) => {
    const { bin, count } = data.rates[index];
    const times = bin.map((value) => (value + 0.5) * lane.bin_ns);
    const { width, first, sums } = rebinned(times, count, lane.bin_ns, lane.bin_ns);
    shown = Math.max(shown, width);
    const accepted = lane.name === "accepted";
    const colour = several ? functionColour(serverRow(lane.pid)) : accepted ? colours.accept : colours.queue;
    const xs = Array.from(sums, (_, place) => toAxis((first + place) * width));
    return {
      type: "scatter", mode: "lines", name: plain(lane.name) + (several ? `, ${plain(serverName(lane.pid))}` : ""), x: xs,
      y: Array.from(sums, (sum) => sum / (width / 1e9)),
      line: { shape: "hv", width: 1.5, color: colour, dash: accepted ? "solid" : "dot" },
      hovertext: Array.from(sums, (sum, place) => `<b>${threeDigits(sum / (width / 1e9))}/s</b> ${plain(lane.name)}`
        + `<br>${number(sum)} within ${duration(width)} from ${at(Math.max((first + place) * width, 0), decimals(width) + 1)}`
        + `<br>${plain(serverName(lane.pid))}`),
      hoverinfo: "text",
    };
  });
  return {
    key: "rates", title: "Connections per second", height: 92, shrinks: true, traces,
    empty: page.rates.length ? "" : "neither SYNs nor accepted connections were observed", axis: { rangemode: "tozero", nticks: 4 },
  };
}

// What is drawn of a span: never more than a quarter of the window beyond its borders, so that labels stay in view.
function clipped(start, end) {
  const edge = (state.to - state.from) / 4;
  return [Math.max(start, state.from - edge), Math.min(end, state.to + edge)];
}

function stallsLane(colours, widthPx) {
  const several = page.servers.length > 1;
  const rows = Math.max(page.servers.length, 1);
  const perPx = (state.to - state.from) / widthPx;
  const bars = { calm: [], refusing: [] };
  const drains = [];
  let hidden = 0;
  for (let index = 0; index < data.stalls.start_ns.length; index++) {
    const start = data.stalls.start_ns[index];
    const end = start + data.stalls.duration_ns[index];
    const drain = data.stalls.drain_ns[index];
    if (end + drain < state.from - (state.to - state.from) / 4 || start > state.to + (state.to - state.from) / 4) continue;
    const stall = stallAt(index);
    if (bars.calm.length + bars.refusing.length >= 2000 && !stall.refused && stall.duration_ns < perPx) {
      hidden++;
      continue;
    }
    (stall.refused ? bars.refusing : bars.calm).push(stall);
    if (drain > 0) drains.push(stall);
  }
  const bar = (name, stalls, colour, pattern) => ({
    type: "bar", orientation: "h", name, base: stalls.map((stall) => toAxis(clipped(stall.start_ns, stall.end_ns)[0])),
    x: stalls.map((stall) => Math.max(clipped(stall.start_ns, stall.end_ns).reverse().reduce((end, start) => end - start), perPx) / 1e9),
    y: stalls.map((stall) => serverRow(stall.pid)), width: 0.72,
    text: stalls.map((stall) => (stall.duration_ns > 70 * perPx ? stallText(stall) : "")),
    textposition: "inside", insidetextanchor: "middle", textangle: 0, constraintext: "none", cliponaxis: true,
    insidetextfont: { color: "#000", size: 11 },
    customdata: stalls.map((stall) => ({ stall: stall.index })),
    marker: {
      color: colour, line: { width: stalls.map((stall) => (stall.index === state.stall ? 2.5 : 1)), color: stalls.map((stall) => (stall.index === state.stall ? colours.ink : colour)) },
      pattern: { shape: pattern, fillmode: "overlay", fgcolor: "rgba(0,0,0,0.3)", size: 8, solidity: 0.15 },
    },
    hovertext: stalls.map(stallHover), hoverinfo: "text",
  });
  const drain = {
    type: "bar", orientation: "h", name: "queue drains", base: drains.map((stall) => toAxis(clipped(stall.end_ns, stall.end_ns + stall.drain_ns)[0])),
    x: drains.map((stall) => Math.max(clipped(stall.end_ns, stall.end_ns + stall.drain_ns).reverse().reduce((end, start) => end - start), 0) / 1e9),
    y: drains.map((stall) => serverRow(stall.pid)), width: 0.4,
    marker: { color: colours.panel, line: { width: 1, color: colours.queue }, pattern: { shape: "/", fgcolor: colours.queue, size: 5, solidity: 0.4 } },
    hovertext: drains.map((stall) => `${stall.drained ? "" : "more than "}${duration(stall.drain_ns)} until the accept queue was normal again`),
    hoverinfo: "text",
  };
  const traces = [bar("stall with refused connections", bars.refusing, colours.refused, "x"), bar("stall", bars.calm, colours.stall, ""), drain]
    .filter((trace) => trace.y.length);
  const rest = page.stalls.total - data.stalls.start_ns.length + hidden;
  return {
    key: "stalls", traces, height: 30 * Math.min(rows, 8) + 4, empty: page.stalls.total ? "" : "no stall",
    title: `Stalls: event loop blocked for at least ${duration(page.stall_ns)}` + (rest ? ` (${number(rest)} lesser ones not drawn at this zoom)` : ""),
    axis: {
      range: [rows - 0.5, -0.5], showgrid: false, zeroline: false, tickvals: several ? page.servers.map((_, index) => index) : [],
      ticktext: page.servers.map((server) => plain(server.name)),
    },
  };
}

function stallHover(stall) {
  const lines = [`<b>blocked for ${stallText(stall)}</b>`, `at ${at(stall.start_ns, decimals(stall.duration_ns))}`];
  if (page.servers.length > 1) lines.push(plain(serverName(stall.pid)));
  if (stall.queue_max >= 0) lines.push(`accept queue at most ${number(stall.queue_max)} of ${number(stall.queue_limit)}`);
  if (stall.connections > 0) lines.push(`${plural(stall.connections, "different connection")} refused`);
  lines.push(`unexplained: ${duration(Math.max(stall.duration_ns - stall.explained_ns, 0))}`, "click: what filled it");
  return lines.join("<br>");
}
