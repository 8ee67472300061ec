// Numbers and times as people read them; the same rules as tracer/units.py.

function threeDigits(value) {
  const size = Math.abs(value);
  if (size >= 999.5) return Math.round(value).toLocaleString("en-US");
  return value.toFixed(size < 9.995 ? 2 : size < 99.95 ? 1 : 0);
}

function duration(ns) {
  for (const [unit, size] of [["s", 1e9], ["ms", 1e6], ["us", 1e3]]) {
    if (Math.abs(ns) >= size * 0.9995) return `${threeDigits(ns / size)} ${unit}`;
  }
  return `${Math.round(ns)} ns`;
}

function bytes(count) {
  for (const [unit, size] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (Math.abs(count) >= size * 0.9995) return `${threeDigits(count / size)} ${unit}`;
  }
  return `${Math.round(count)} B`;
}

function number(value) {
  return value.toLocaleString("en-US");
}

function plural(count, noun) {
  return `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
}

function argumentText(argument, value) {
  if (argument.name.endsWith("_bytes")) return `${argument.name} ${bytes(Number(value))}`;
  return argument.unit === "s" ? `${argument.name} ${number(value)} s` : `${argument.name} ${value}`;
}

// plotly reads a little HTML in its texts: names from a recording must not be any
function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

// How many decimals of a second tell two places of a window apart.
function decimals(spanNs) {
  return Math.min(Math.max(Math.ceil(-Math.log10(spanNs / 1e9 / 500)), 0), 9);
}

// A time of the recording, by the clock that was chosen.
function at(ns, digits = 3) {
  if (state.clock === "start") return `${((page.offset_ns + ns) / 1e9).toFixed(digits)} s`;
  const rest = page.wall_rest_ns + ns;
  let second = page.wall_s + Math.floor(rest / 1e9);
  let part = ((rest / 1e9) - Math.floor(rest / 1e9)).toFixed(digits);
  if (part.startsWith("1")) [second, part] = [second + 1, (0).toFixed(digits)];
  const moment = new Date(second * 1000);
  const two = (value) => String(value).padStart(2, "0");
  const utc = state.clock === "utc";
  const hour = utc ? moment.getUTCHours() : moment.getHours();
  const minute = utc ? moment.getUTCMinutes() : moment.getMinutes();
  const seconds = utc ? moment.getUTCSeconds() : moment.getSeconds();
  return `${two(hour)}:${two(minute)}:${two(seconds)}${digits ? part.slice(1) : ""}`;
}

const STEPS_S = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400];

// The first step of 1, 2 or 5 (or of the clock) that is at least this long, in ns.
function niceStep(leastNs) {
  if (leastNs >= 1e9) return (STEPS_S.find((step) => step * 1e9 >= leastNs) ?? Math.ceil(leastNs / 8.64e13) * 86400) * 1e9;
  const power = 10 ** Math.floor(Math.log10(Math.max(leastNs, 1)));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= leastNs * 0.999999);
}

// Where ticks are, in ns of the timeline, and their labels: at round times of the chosen clock.
function ticks(fromNs, toNs, widthPx) {
  const room = state.clock === "start" ? 90 : 120;
  const step = niceStep((toNs - fromNs) / Math.max(Math.floor(widthPx / room), 2));
  const shift = state.clock === "start" ? page.offset_ns % step : (page.wall_rest_ns + (page.wall_s % 86400) * 1e9) % step;
  const digits = Math.max(0, Math.ceil(-Math.log10(step / 1e9) - 1e-9));
  const places = [];
  for (let tick = Math.ceil((fromNs + shift) / step) * step - shift; tick <= toNs; tick += step) places.push(tick);
  return { places, labels: places.map((place) => at(place, digits)) };
}
