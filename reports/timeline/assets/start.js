// Unpacks plotly and the columns, then draws.

const pictureKind = { "#png": "png", "#svg": "svg" }[location.hash];

async function start() {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old for the chart; use one of 2023 or later");
  const [plotly, octets] = await Promise.all(["plotly", "columns"].map((id) => inflate(byId(id).textContent)));
  const script = document.createElement("script");
  script.textContent = new TextDecoder().decode(plotly);
  document.head.append(script);
  readData(new Columns(page.columns, octets));
  fitMargin();
  page.functions.forEach((called, index) => called.calls && byId("heat-function").add(new Option(called.name, index)));
  page.imported.samples.forEach((series, index) => byId("sample").add(new Option(series.name, index)));
  byId("sample-label").hidden = !page.imported.samples.length;
  [state.from, state.to] = wholeRange();
  if (pictureKind) await showPicture(pictureKind);
  else {
    await draw();
    performance.mark("drawn");
    listen();
  }
  byId("loading").remove();
  document.documentElement.dataset.ready = "true";
}

// The chart with the verdict over it, as data in the page, for the command that makes pictures.
async function showPicture(format) {
  document.documentElement.dataset.theme = "light";
  const { traces, layout } = figure(PICTURE_PX);
  addHeading(layout, theme());
  await Plotly.react(chart, traces, layout, CONFIG);
  const url = await Plotly.toImage(chart, { format, width: PICTURE_PX, height: layout.height, scale: format === "png" ? 1.5 : 1 });
  const text = document.createElement("pre");
  text.id = "picture";
  text.textContent = url;
  document.body.append(text);
}

start().catch((error) => {
  byId("loading").textContent = `The chart cannot be drawn: ${error.message}`;
  document.documentElement.dataset.ready = "failed";
  throw error;
});
