// Mouse, keyboard, tables, clock and theme.

const byId = (id) => document.getElementById(id);

function showWindow() {
  const span = state.to - state.from;
  const digits = decimals(span);
  const whole = wholeRange();
  const all = state.from <= whole[0] && state.to >= whole[1];
  byId("window").textContent = `${at(state.from, digits)} to ${at(state.to, digits)} (${duration(span)})${all ? "" : ", zoomed in"}`;
  byId("reset").disabled = all;
}

function zoom(factor) {
  const middle = (state.from + state.to) / 2;
  const half = ((state.to - state.from) * factor) / 2;
  return setWindow(middle - half, middle + half);
}

function pan(share) {
  const by = (state.to - state.from) * share;
  return setWindow(state.from + by, state.to + by);
}

const reset = () => setWindow(...wholeRange());

function chooseCall(index) {
  const start = data.calls.start_ns[index];
  const length = Math.max(data.calls.duration_ns[index], LEAST_WINDOW_NS);
  return setWindow(start - 0.15 * length, start + 1.15 * length);
}

function setClock(clock) {
  state.clock = clock;
  document.querySelectorAll("[data-clock]").forEach((button) => button.setAttribute("aria-pressed", button.dataset.clock === clock));
  document.querySelectorAll("[data-time]").forEach((cell) => {
    cell.textContent = at(Number(cell.dataset.time), 4);
  });
  if (state.stall >= 0) showStall(stallAt(state.stall));
  return draw();
}

function nextClock() {
  const clocks = ["start", "utc", "local"];
  return setClock(clocks[(clocks.indexOf(state.clock) + 1) % clocks.length]);
}

const darkness = matchMedia("(prefers-color-scheme: dark)");
const printing = matchMedia("print");

function applyTheme(chosen) {
  if (chosen) document.documentElement.dataset.theme = chosen;
  if (state.stall >= 0) drawIcicle(stallAt(state.stall));
  return draw();
}

function switchTheme() {
  const now = document.documentElement.dataset.theme || (darkness.matches ? "dark" : "light");
  return applyTheme(now === "dark" ? "light" : "dark");
}

function sortBy(head) {
  const table = head.closest("table");
  const column = head.cellIndex;
  const rising = head.getAttribute("aria-sort") === "descending" || (head.getAttribute("aria-sort") === null && !head.classList.contains("number"));
  table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const numeric = head.classList.contains("number");
  const key = (row) => (numeric ? Number(row.cells[column].dataset.key) : row.cells[column].dataset.key);
  const compare = (one, other) => (numeric ? key(one) - key(other) : key(one).localeCompare(key(other)));
  const rows = [...table.tBodies[0].rows].sort((one, other) => (rising ? compare(one, other) : compare(other, one)));
  table.tBodies[0].append(...rows);
}

// A line through all lanes under the mouse, with its time.
function followMouse({ clientX, clientY }) {
  const box = chart.getBoundingClientRect();
  const x = clientX - box.left;
  const right = box.width - MARGIN.right;
  const inside = x >= MARGIN.left && x <= right && clientY >= box.top + MARGIN.top && clientY <= box.bottom - MARGIN.bottom;
  const line = byId("cursor");
  line.hidden = !inside;
  if (!inside) return;
  const span = state.to - state.from;
  line.style.left = `${x}px`;
  line.firstElementChild.textContent = at(state.from + (span * (x - MARGIN.left)) / (right - MARGIN.left), decimals(span));
}

function listen() {
  chart.parentElement.addEventListener("mousemove", followMouse);
  chart.parentElement.addEventListener("mouseleave", () => (byId("cursor").hidden = true));
  chart.on("plotly_relayout", (change) => {
    const keys = Object.keys(change);
    const axis = keys.map((key) => /^(xaxis\d*)\.range/.exec(key)?.[1]).find(Boolean);
    if (!axis) return;
    const range = change[`${axis}.range`] ?? [change[`${axis}.range[0]`], change[`${axis}.range[1]`]];
    setWindow(...range.map(fromAxis));
  });
  chart.on("plotly_doubleclick", reset);
  chart.on("plotly_click", ({ points }) => {
    const chosen = points[0].customdata;
    if (chosen?.stall !== undefined) chooseStall(chosen.stall);
    else if (chosen?.call !== undefined) chooseCall(chosen.call);
  });
  document.addEventListener("click", ({ target }) => {
    const sorter = target.closest("th button");
    if (sorter) sortBy(sorter.closest("th"));
    else chooseRow(target.closest("[data-stall], [data-call], [data-window]"));
  });
  document.addEventListener("keydown", keyPressed);
  const actions = {
    "zoom-in": () => zoom(0.5), "zoom-out": () => zoom(2), reset, previous: () => nextStall(-1), next: () => nextStall(1), worst: worstStall,
    "dock-previous": () => nextStall(-1), "dock-next": () => nextStall(1), "dock-close": closeStall, theme: switchTheme,
    help: () => byId("keys").showModal(), "keys-close": () => byId("keys").close(),
  };
  for (const [id, act] of Object.entries(actions)) byId(id).addEventListener("click", act);
  document.querySelectorAll("[data-clock]").forEach((button) => button.addEventListener("click", () => setClock(button.dataset.clock)));
  byId("icicle-kind").addEventListener("click", chooseIcicle);
  byId("heat-function").addEventListener("change", ({ target }) => {
    state.heatFunction = Number(target.value);
    draw();
  });
  byId("sample").addEventListener("change", ({ target }) => {
    state.sample = Number(target.value);
    draw();
  });
  darkness.addEventListener("change", () => applyTheme());
  printing.addEventListener("change", () => applyTheme());
  let resized;
  addEventListener("resize", () => {
    cancelAnimationFrame(resized);
    resized = requestAnimationFrame(() => applyTheme());
  });
}

function chooseRow(element) {
  if (!element || element.closest("#chart")) return;
  if (element.dataset.stall !== undefined) chooseStall(Number(element.dataset.stall));
  else if (element.dataset.call !== undefined) chooseCall(Number(element.dataset.call));
  else if (element.dataset.window !== undefined) {
    const [start, length] = element.dataset.window.split(" ").map(Number);
    const edge = Math.max(0.1 * length, 1e6);
    setWindow(start - edge, start + length + edge);
    chart.scrollIntoView({ block: "start" });
  }
}

function keyPressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  const keys = {
    n: () => nextStall(1), p: () => nextStall(-1), w: worstStall, "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), 0: reset,
    ArrowLeft: () => pan(-0.25), ArrowRight: () => pan(0.25), t: nextClock, d: switchTheme, "?": () => byId("keys").showModal(),
    Escape: () => !dock.hidden && closeStall(),
  };
  if (event.key === "Enter" || event.key === " ") {
    const element = event.target.closest("[data-stall], [data-call], [data-window]");
    if (!element || event.target.tagName === "BUTTON") return;
    event.preventDefault();
    if (element.dataset.stall !== undefined) chooseStall(Number(element.dataset.stall));
    else chooseRow(element);
    return;
  }
  if (!keys[event.key] || byId("keys").open) return;
  event.preventDefault();
  keys[event.key]();
}
