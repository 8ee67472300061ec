// Unpacks plotly and the columns, then draws.

async function start() {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old for the chart; use one of 2023 or later");
  const [plotly, octets] = await Promise.all(["plotly", "columns"].map((id) => inflate(byId(id).textContent)));
  const script = document.createElement("script");
  script.textContent = new TextDecoder().decode(plotly);
  document.head.append(script);
  readData(new Columns(page.columns, octets));
  page.functions.forEach((called, index) => called.calls && byId("heat-function").add(new Option(called.name, index)));
  [state.from, state.to] = wholeRange();
  await draw();
  byId("loading").remove();
  if (location.hash === "#svg") await showSvg();
  else listen();
  document.documentElement.dataset.ready = "true";
}

// The figure as SVG, for the command that makes pictures.
async function showSvg() {
  const url = await Plotly.toImage(chart, { format: "svg", width: chartWidth(), height: chart._fullLayout.height });
  const text = document.createElement("pre");
  text.id = "svg";
  text.textContent = decodeURIComponent(url.slice(url.indexOf(",") + 1));
  document.body.append(text);
}

if (pictures) document.body.classList.add("picture");
start().catch((error) => {
  byId("loading").textContent = `The chart cannot be drawn: ${error.message}`;
  document.documentElement.dataset.ready = "failed";
  throw error;
});
