// What is shown now: the window, the clock, the chosen stall; and the data, read once.

const page = JSON.parse(document.getElementById("document").textContent);
const state = { from: 0, to: page.elapsed_ns, clock: "start", stall: -1, heatFunction: -1, sample: 0, icicle: "" };
let data = null;

const LEAST_WINDOW_NS = 1000;

// The whole timeline, with what is beyond the end of a recording that was cut short.
function wholeRange() {
  return [0, Math.max(page.elapsed_ns, ...page.bands.map((band) => band.end_ns))];
}

// Axis values are seconds since the recording's start: a double holds them to the nanosecond for 100 days.
const toAxis = (ns) => (page.offset_ns + ns) / 1e9;
const fromAxis = (seconds) => Math.round(seconds * 1e9) - page.offset_ns;

const OKABE_ITO = ["#0072B2", "#E69F00", "#009E73", "#56B4E9", "#CC79A7", "#F0E442", "#8C6D46", "#999999"];
const PATTERNS = ["", "/", ".", "x", "\\", "+", "-", "|"];

// past the eighth colour they come again, with a pattern
const colourOf = (place) => OKABE_ITO[place % OKABE_ITO.length];
const patternOf = (place) => PATTERNS[Math.floor(place / OKABE_ITO.length) % PATTERNS.length];
// a function has the same colour on every page, so that pages can be compared
const functionColour = (index) => colourOf(page.functions[index]?.colour ?? index);
const functionPattern = (index) => patternOf(page.functions[index]?.colour ?? index);

// Black or white, whichever is easier to read on a colour.
function inkOn(colour) {
  const [red, green, blue] = [1, 3, 5].map((place) => (parseInt(colour.slice(place, place + 2), 16) / 255) ** 2.2);
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 ? "#000000" : "#ffffff";
}

function theme() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    paper: read("paper"), panel: read("panel"), ink: read("ink"), faint: read("faint"), line: read("line"),
    refused: read("refused"), stall: read("stall"), queue: read("queue"), accept: read("accept"),
  };
}

function mixed(colour, over, share) {
  const part = (text, index) => parseInt(text.slice(1 + 2 * index, 3 + 2 * index), 16);
  const mix = [0, 1, 2].map((index) => Math.round(part(colour, index) * share + part(over, index) * (1 - share)));
  return `rgb(${mix.join(",")})`;
}

function readData(columns) {
  const get = (name) => columns.get(name);
  const group = (name, fields) => Object.fromEntries(fields.map((field) => [field, get(`${name}.${field}`)]));
  data = {
    columns,
    calls: group("calls", ["start_ns", "duration_ns", "inside_ns", "thread", "function", "depth", "caller", "unfinished"]),
    density: group("density", ["group", "bin", "calls", "busy_ns", "longest_ns"]),
    heat: group("heat", ["cell", "calls"]),
    refusals: group("refusals", ["after_ns", "seen_ns", "count", "path", "listener", "cause", "address", "port"]),
    queues: page.queues.map((_, index) => group(`queue.${index}`, ["time_ns", "length", "limit"])),
    rates: page.rates.map((_, index) => group(`rate.${index}`, ["bin", "count"])),
    stalls: group("stalls", ["start_ns", "duration_ns", "pid", "tid", "unfinished", "listener", "queue_start", "queue_max",
      "queue_limit", "drain_ns", "drained", "accepted", "accepted_drain", "overflows", "overflows_drain",
      "connections", "explained_ns", "tree"]),
    packets: page.imported.packets.map((_, index) => group(`packets.${index}`, ["bin", "count"])),
    spans: page.imported.spans.map((_, index) => group(`spans.${index}`, ["start_ns", "duration_ns", "uncertain_ns", "text"])),
    sampled: group("sampled", ["stall", "function", "samples", "weight_ns", "self_ns", "off_ns", "caller"]),
    trees: group("trees", ["stall", "path", "calls", "total_ns", "self_ns", "longest_ns"]),
  };
  linkCalls();
  layOutRows();
}

// The caller of each call (-1: none), and which of its function's calls it is (its arguments are there).
function linkCalls() {
  const { caller, function: functions } = data.calls;
  data.parent = caller.map((back, index) => (back ? index - back : -1));
  data.place = new Int32Array(caller.length);
  const seen = new Int32Array(page.functions.length);
  for (let index = 0; index < caller.length; index++) data.place[index] = seen[functions[index]]++;
}

// The row of the flame lane each thread begins in; with several threads, a row above it for its name.
function layOutRows() {
  const heading = page.threads.length > 1 ? 1 : 0;
  data.firstRow = [];
  let row = 0;
  for (const thread of page.threads) {
    row += heading;
    data.firstRow.push(row);
    row += thread.depth + 1;
  }
  data.rows = Math.max(row, 1);
}

const serverName = (pid) => page.servers.find((server) => server.pid === pid)?.name ?? `process ${pid}`;
const serverRow = (pid) => Math.max(page.servers.findIndex((server) => server.pid === pid), 0);

function stallAt(index) {
  const stall = Object.fromEntries(Object.entries(data.stalls).map(([name, values]) => [name, values[index]]));
  return { ...stall, index, end_ns: stall.start_ns + stall.duration_ns, refused: stall.overflows + stall.overflows_drain };
}

function stallText(stall) {
  const refused = stall.refused ? `, ${number(stall.refused)} refused` : "";
  return `${stall.unfinished ? "at least " : ""}${duration(stall.duration_ns)}${refused}`;
}

const listenerName = (index) => page.listeners.find((listener) => listener.index === index)?.address ?? "no watched listener";
