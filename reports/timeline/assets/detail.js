// What filled the chosen stall: its flame graph, its calls and its refused connections.

const SHOWN_ROWS = 200;
const dock = document.getElementById("dock");

function chooseStall(index) {
  const stall = stallAt(index);
  state.stall = index;
  const until = stall.end_ns + Math.min(stall.drain_ns, stall.duration_ns);
  const edge = 0.06 * (until - stall.start_ns);
  dock.hidden = false;
  document.body.classList.add("docked");
  showStall(stall);
  return setWindow(stall.start_ns - edge, until + edge).then(showStallLanes);
}

// Scrolls until the stall and its calls are between the toolbar and the dock.
function showStallLanes() {
  const box = (lane) => {
    const axis = chart.data.find((trace) => trace.meta === lane)?.yaxis ?? "y";
    const { _offset: offset, _length: length } = chart._fullLayout[axis.replace("y", "yaxis")];
    const top = chart.getBoundingClientRect().top + offset;
    return { top, bottom: top + length };
  };
  const [above, below] = [document.getElementById("toolbar").offsetHeight + 26, innerHeight - dock.offsetHeight - 12];
  const [stalls, calls] = [box("stalls"), box("flame")];
  if (stalls.top >= above && calls.bottom <= below) return;
  scrollBy(0, Math.min(calls.bottom - below, stalls.top - above));
}

function closeStall() {
  state.stall = -1;
  dock.hidden = true;
  document.body.classList.remove("docked");
  return draw();
}

function nextStall(step) {
  const count = data.stalls.start_ns.length;
  if (!count) return;
  if (state.stall >= 0) {
    chooseStall((state.stall + step + count) % count);
    return;
  }
  const inView = data.stalls.start_ns.findIndex((start) => start >= state.from);
  chooseStall(step > 0 ? Math.max(inView, 0) : (inView < 0 ? count - 1 : Math.max(inView - 1, 0)));
}

// The stall with the most refused connections, of these the longest: the one the verdict is about.
function worstStall() {
  const indexes = [...data.stalls.start_ns.keys()];
  if (!indexes.length) return;
  const badness = (index) => [stallAt(index).refused, data.stalls.duration_ns[index]];
  chooseStall(indexes.reduce((worst, index) => {
    const [refused, length] = badness(index);
    const [most, longest] = badness(worst);
    return refused > most || (refused === most && length > longest) ? index : worst;
  }));
}

function showStall(stall) {
  const facts = [stallText(stall), `at ${at(stall.start_ns, 4)}`];
  if (page.servers.length > 1) facts.push(serverName(stall.pid));
  if (stall.queue_max >= 0) facts.push(`queue at most ${number(stall.queue_max)} of ${number(stall.queue_limit)}`);
  if (stall.drain_ns > 0) facts.push(`${stall.drained ? "" : "more than "}${duration(stall.drain_ns)} until it was normal`);
  if (stall.accepted >= 0) facts.push(`${number(stall.accepted + Math.max(stall.accepted_drain, 0))} accepted after it`);
  document.getElementById("dock-title").textContent = `Stall ${stall.index + 1} of ${number(page.stalls.total)}: ${facts.join(" · ")}`;
  drawIcicle(stall);
  fillCalls(stall);
  fillRefusals(stall);
}

function treeOf(stall) {
  const rows = [];
  const { stall: owner, path, calls, total_ns, self_ns, longest_ns } = data.trees;
  for (let index = 0; index < owner.length; index++) {
    if (owner[index] !== stall.index) continue;
    const [caller, called] = page.paths[path[index]];
    rows.push({ path: path[index], caller, called, calls: calls[index], total: total_ns[index], own: self_ns[index], longest: longest_ns[index] });
  }
  return rows;
}

function callNodes(stall, colours) {
  const rows = treeOf(stall);
  const here = new Set(rows.map((row) => row.path));
  const whole = `stall ${duration(stall.duration_ns)}`;
  const rest = Math.max(stall.duration_ns - stall.explained_ns, 0);
  const nodes = [
    { id: "stall", label: whole, parent: "", value: 0, colour: mixed(colours.stall, colours.panel, 0.35), ink: colours.ink, hover: `<b>${whole}</b>` },
    { id: "rest", label: `unexplained ${duration(rest)}`, parent: "stall", value: rest, colour: mixed(colours.faint, colours.panel, 0.25), ink: colours.ink, hover: `<b>unexplained</b><br>${duration(rest)}` },
  ];
  for (const row of rows) {
    const name = plain(page.functions[row.called].name);
    const share = (100 * row.total / Math.max(stall.duration_ns, 1)).toFixed(1);
    nodes.push({
      id: `p${row.path}`, label: `${name} ${duration(row.total)}`, parent: here.has(row.caller) ? `p${row.caller}` : "stall", value: row.own, colour: functionColour(row.called),
      ink: inkOn(functionColour(row.called)),
      hover: `<b>${name}</b><br>${plural(row.calls, "call")}, ${duration(row.total)} (${share}% of the stall)<br>self ${duration(row.own)}, longest ${duration(row.longest)}`,
    });
  }
  return nodes;
}

// The flame graph of a stall: of its traced calls, or of its sampled stacks where those tell more.
function drawIcicle(stall) {
  const colours = theme();
  const sampled = samplesOf(stall);
  const explained = 2 * stall.explained_ns >= stall.duration_ns;
  const kind = sampled.length ? state.icicle || (explained ? "calls" : "samples") : "calls";
  showKinds(kind, sampled.length > 0);
  const nodes = kind === "samples" ? sampledNodes(stall, sampled, colours) : callNodes(stall, colours);
  const shown = nodes.filter((node) => node.value > 0 || node.id !== "rest");
  const box = document.getElementById("icicle");
  Plotly.react(box, [{
    type: "icicle", ids: shown.map((node) => node.id), labels: shown.map((node) => node.label), parents: shown.map((node) => node.parent),
    values: shown.map((node) => node.value), branchvalues: "remainder", textinfo: "label", hovertext: shown.map((node) => node.hover), hoverinfo: "text", sort: false,
    tiling: { orientation: "v", pad: 1 }, pathbar: { visible: false }, marker: { colors: shown.map((node) => node.colour), line: { width: 1, color: colours.panel } },
    textfont: { size: 12, color: shown.map((node) => node.ink) }, hoverlabel: { align: "left", bgcolor: colours.panel, bordercolor: colours.faint, font: { color: colours.ink, family: FONT } },
  }], {
    width: box.clientWidth, height: box.clientHeight, margin: { l: 0, r: 0, t: 0, b: 0 }, paper_bgcolor: colours.panel,
    font: { family: FONT, color: colours.ink }, uniformtext: { minsize: 11, mode: "hide" }, uirevision: `${stall.index} ${kind}`,
  }, CONFIG);
}

function fillCalls(stall) {
  const { start_ns, duration_ns, inside_ns, thread, function: functions } = data.calls;
  const mine = [];
  for (let index = 0; index < start_ns.length; index++) {
    const inside = start_ns[index] >= stall.start_ns && start_ns[index] < stall.end_ns;
    if (inside && page.threads[thread[index]].tid === stall.tid) mine.push(index);
  }
  mine.sort((one, other) => duration_ns[other] - duration_ns[one]);
  const all = treeOf(stall).reduce((sum, row) => sum + row.calls, 0) || mine.length;
  const rows = mine.slice(0, SHOWN_ROWS).map((index) => {
    const called = page.functions[functions[index]];
    const words = called.arguments.map((argument) => argumentText(argument, argumentOf(index, argument))).join(", ");
    return {
      call: index,
      cells: [[`+${duration(start_ns[index] - stall.start_ns)}`, start_ns[index]], [called.name, called.name], [duration(duration_ns[index]), duration_ns[index]],
        [duration(duration_ns[index] - inside_ns[index]), duration_ns[index] - inside_ns[index]], [words, words]],
    };
  });
  const left = all - rows.length;
  fillTable("stall-calls", rows, left > 0 ? `${plural(left, "shorter call")} not listed; the flame graph counts them` : rows.length ? "" : "no traced function was called in it");
  document.getElementById("stall-calls-title").textContent = plural(all, "call");
}

function fillRefusals(stall) {
  const { after_ns, seen_ns, count, path, listener, cause, address, port } = data.refusals;
  const rows = [];
  let total = 0;
  for (let index = 0; index < count.length; index++) {
    if (seen_ns[index] < stall.start_ns || after_ns[index] >= stall.end_ns + stall.drain_ns) continue;
    const owner = page.listeners.find((item) => item.index === listener[index]);
    if (owner && owner.pid !== stall.pid) continue;
    total += count[index];
    if (rows.length >= SHOWN_ROWS) continue;
    const sampled = seen_ns[index] - after_ns[index] > 1;
    const client = address[index] >= 0 ? page.refusals.addresses[address[index]] : "";
    const who = client ? `${client.includes(":") ? `[${client}]` : client}:${port[index]}` : "";
    const way = page.refusals.paths[path[index]].name;
    rows.push({
      cells: [[`${sampled ? "by " : ""}+${duration(seen_ns[index] - stall.start_ns)}`, seen_ns[index]], [number(count[index]), count[index]],
        [who, who], [shortened(way), way], [causeName(cause[index]), causeName(cause[index])]],
    });
  }
  const shown = rows.reduce((sum, row) => sum + row.cells[1][1], 0);
  fillTable("stall-refusals", rows, total > shown ? `${number(total - shown)} more are not listed` : rows.length ? "" : "none in this stall and while its queue drained");
  document.getElementById("stall-refusals-title").textContent = `${number(total)} refused`;
}

const causeName = (cause) => page.refusals.causes[cause] ?? "";

function fillTable(id, rows, note) {
  const table = document.getElementById(id);
  const body = table.tBodies[0];
  body.replaceChildren(...rows.map((row) => {
    const line = document.createElement("tr");
    if (row.call !== undefined) {
      line.dataset.call = row.call;
      line.tabIndex = 0;
    }
    for (const [text, key] of row.cells) {
      const cell = line.insertCell();
      cell.textContent = text;
      cell.dataset.key = key;
      if (typeof key === "number") cell.className = "number";
    }
    return line;
  }));
  table.querySelectorAll("th[aria-sort]").forEach((head) => head.removeAttribute("aria-sort"));
  document.getElementById(`${id}-note`).textContent = note;
}
