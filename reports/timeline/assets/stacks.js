// The sampled stacks of a stall as a flame graph: where it was, also in functions that nobody traced.

const KERNEL_FILE = "[kernel]";

function samplesOf(stall) {
  const { stall: owner, function: functions, samples, weight_ns, self_ns, off_ns, caller } = data.sampled;
  const rows = [];
  for (let index = 0; index < owner.length; index++) {
    if (owner[index] !== stall.index) continue;
    rows.push({
      id: index, parent: caller[index] ? index - caller[index] : -1, called: page.sampled[functions[index]],
      samples: samples[index], total: weight_ns[index], own: self_ns[index], off: off_ns[index],
    });
  }
  return rows;
}

// Traced functions have their colour; others one by where they are: the server, a library, the kernel.
function sampledColour(called, colours) {
  const traced = page.functions.findIndex((item) => item.name === called.name);
  if (traced >= 0) return { colour: functionColour(traced), ink: inkOn(functionColour(traced)) };
  let shade = 0;
  for (const letter of called.name) shade = (shade * 31 + letter.charCodeAt(0)) % 97;
  const server = page.servers.length && !/\.so\b|^\[|^$/.test(called.file);
  const base = called.file === KERNEL_FILE ? "#56b4e9" : server ? "#e69f00" : "#999999";
  return { colour: mixed(base, colours.panel, 0.35 + 0.3 * (shade / 97)), ink: colours.ink };
}

function sampledNodes(stall, rows, colours) {
  const roots = rows.filter((row) => row.parent < 0);
  const whole = roots.reduce((sum, row) => sum + row.total, 0);
  const count = roots.reduce((sum, row) => sum + row.samples, 0);
  const label = `stall ${duration(stall.duration_ns)}, ${plural(count, "sample")}`;
  const nodes = [{ id: "stall", label, parent: "", value: 0, colour: mixed(colours.stall, colours.panel, 0.35), ink: colours.ink, hover: `<b>${label}</b>` }];
  for (const row of rows) {
    const name = plain(row.called.name);
    const share = (100 * row.total / Math.max(whole, 1)).toFixed(1);
    const lines = [`<b>${name}</b>${row.called.file ? ` ${plain(row.called.file)}` : ""}`, `${share}% of the samples' time: ${duration(row.total)}, self ${duration(row.own)}`,
      plural(row.samples, "sample")];
    if (row.off) lines.push(`off the CPU ${duration(row.off)}`);
    nodes.push({
      id: `s${row.id}`, label: `${name} ${share}%`, parent: row.parent < 0 ? "stall" : `s${row.parent}`, value: row.own,
      hover: lines.join("<br>"), ...sampledColour(row.called, colours),
    });
  }
  return nodes;
}

// The choice between traced calls and sampled stacks, where there are any.
function showKinds(kind, any) {
  const group = document.getElementById("icicle-kind");
  group.hidden = !any;
  for (const button of group.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button.dataset.kind === kind));
  document.querySelector(".dock-body").classList.toggle("sampled", kind === "samples");
}

function chooseIcicle(event) {
  const button = event.target.closest("button");
  if (!button || state.stall < 0) return;
  state.icicle = button.dataset.kind;
  drawIcicle(stallAt(state.stall));
}
