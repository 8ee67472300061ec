// Lanes of what other tools saw: packets of a capture, SLOWLOG and LATENCY, fields of INFO.

const SPAN_SOURCES = 6;

function importedLanes(colours, widthPx) {
  const { packets, spans, samples } = page.imported;
  const lanes = [];
  if (packets.length) lanes.push(packetsLane(colours));
  if (spans.length) lanes.push(spansLane(colours, widthPx));
  if (samples.length) lanes.push(samplesLane(colours, widthPx));
  return lanes;
}

// What an undisturbed connection does not have is drawn; SYNs beside it as a line.
function packetsLane(colours) {
  let width = 0;
  let place = 0;
  const traces = page.imported.packets.flatMap((lane, index) => {
    if (!lane.trouble && lane.name !== "SYN") return [];
    const { bin, count } = data.packets[index];
    const binned = rebinned(bin.map((value) => (value + 0.5) * lane.bin_ns), count, lane.bin_ns, lane.bin_ns);
    width = binned.width;
    const bins = [...binned.sums.keys()].filter((at) => binned.sums[at] || !lane.trouble);
    const common = {
      name: plain(lane.name), hoverinfo: "text",
      hovertext: bins.map((at_) => `<b>${plural(binned.sums[at_], "packet")}</b>: ${plain(lane.name)}<br>within ${duration(width)} from ${at(Math.max((binned.first + at_) * width, 0), decimals(width) + 1)}`),
      x: bins.map((bin_) => toAxis((binned.first + bin_ + (lane.trouble ? 0.5 : 0)) * width)), y: bins.map((bin_) => binned.sums[bin_]),
    };
    if (!lane.trouble) return [{ ...common, type: "scatter", mode: "lines", line: { shape: "hv", width: 1.2, color: colours.faint } }];
    const colour = REFUSAL_COLOURS[place % REFUSAL_COLOURS.length];
    const shape = REFUSAL_PATTERNS[place % REFUSAL_PATTERNS.length];
    place++;
    return [{ ...common, type: "bar", width: width / 1e9, marker: { color: colour, line: { width: 0 }, pattern: { shape, fillmode: "overlay", fgcolor: colours.paper, size: 5, solidity: 0.35 } } }];
  });
  return {
    key: "packets", title: `Captured packets${width ? ` per ${duration(width)}` : ""}`, height: 86, shrinks: true, traces,
    empty: traces.length ? "" : "nothing was sent again and nothing was reset", axis: { rangemode: "tozero", nticks: 4 },
  };
}

// Redis tells when a command ended to the second: the bar is as long as the command, the thin line where it may have been.
function spansLane(colours, widthPx) {
  const perPx = (state.to - state.from) / widthPx;
  const sources = page.imported.spans.slice(0, SPAN_SOURCES);
  const traces = sources.flatMap((source, row) => {
    const { start_ns, duration_ns, uncertain_ns, text } = data.spans[row];
    const seen = [...start_ns.keys()].filter((index) => start_ns[index] < state.to + 1e9 && start_ns[index] + uncertain_ns[index] + duration_ns[index] > state.from - 1e9);
    const hover = seen.map((index) => `<b>${plain(source.source)} ${duration(duration_ns[index])}</b><br>${plain(source.texts[text[index]] ?? "")}`
      + `<br>began ${at(start_ns[index])}${uncertain_ns[index] ? ` or up to ${duration(uncertain_ns[index])} later` : ""}`);
    const bars = (length, height, marker) => ({
      type: "bar", orientation: "h", base: seen.map((index) => toAxis(start_ns[index])), x: seen.map((index) => Math.max(length(index), perPx) / 1e9),
      y: seen.map(() => row), width: height, marker, hovertext: hover, hoverinfo: "text", showlegend: false,
    });
    return [
      bars((index) => uncertain_ns[index] + duration_ns[index], 0.25, { color: mixed(functionColour(row), colours.panel, 0.35), line: { width: 0 } }),
      bars((index) => duration_ns[index], 0.7, { color: colourOf(row), line: { width: 0 }, pattern: { shape: patternOf(row), fillmode: "overlay", fgcolor: colours.panel } }),
    ];
  });
  const left = page.imported.spans.reduce((sum, source) => sum + source.left_out, 0);
  return {
    key: "spans", title: `SLOWLOG and LATENCY${left ? ` (${number(left)} shorter entries are not drawn)` : ""}; the thin line: where it may have been`,
    height: 24 * Math.max(sources.length, 1) + 6, traces, empty: "",
    axis: { range: [sources.length - 0.5, -0.5], showgrid: false, zeroline: false, tickvals: sources.map((_, row) => row), ticktext: sources.map((source) => plain(source.source)) },
  };
}

function samplesLane(colours, widthPx) {
  const series = page.imported.samples[state.sample];
  const places = stepPlaces(series.time_ns, series.value, widthPx);
  const shown = (value) => (series.unit === "B" ? bytes(value) : `${number(value)} ${series.unit}`.trim());
  return {
    key: "samples", title: `INFO ${plain(series.name)}${series.unit ? `, ${plain(series.unit)}` : ""}`, height: 80, shrinks: true, empty: "",
    traces: [{
      type: "scatter", mode: "lines+markers", x: places.map((place) => toAxis(series.time_ns[place])), y: places.map((place) => series.value[place]),
      line: { width: 1.5, color: colours.queue }, marker: { size: 5 }, showlegend: false,
      hovertext: places.map((place) => `<b>${shown(series.value[place])}</b><br>${plain(series.name)}<br>${at(series.time_ns[place])}`), hoverinfo: "text",
    }],
    // a field that never changed would be drawn on a scale of rounding errors
    axis: { nticks: 4, tickformat: "~s", rangemode: series.value.every((value) => value === series.value[0]) ? "tozero" : "normal" },
  };
}
