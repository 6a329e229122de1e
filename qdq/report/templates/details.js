// Details of a layer, made when they are asked for. Everything from the data becomes text, never markup.
const {layers, unit} = JSON.parse(document.getElementById("data").textContent);
const METHODS = ["max", "percentile", "entropy", "mse", "average_max", "mean_std", "laplace", "gauss", "moving_average"];
const SVG = "http://www.w3.org/2000/svg";

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function drawing(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

const share = (value, digits = 2) => (value > 0 && 100 * value < 0.5 * 10 ** -digits ? `< ${10 ** -digits} %` : `${(100 * value).toFixed(digits)} %`);
const known = (value, text, why) => (value === null || value === undefined ? `not known: ${why || "nothing was measured"}` : text(value));
const list = (names, none) => (names.length ? names.join(", ") : none);

function describeGain(layer) {
  const found = layer.sensitivity;
  if (!found) return `not known: ${layer.unknown.sensitivity}`;
  const rank = `rank ${found.rank} of ${found.units}`;
  const group = found.layers.length > 1 ? `; measured as the group ${found.unit} of ${found.layers.length} layers` : "";
  const interval = found.low === null ? "" : ` (95 % of samples drawn: ${found.low} to ${found.high})`;
  if (found.gain === null) return `${rank}, estimated${group}`;
  return `${found.gain} ${unit}${interval}; ${rank}, ${found.is_exact ? "measured" : "estimated"}${group}`;
}

function describe(layer) {
  const missing = layer.unknown;
  const ends = [layer.reads_input ? ["the input of the network"] : [], layer.writes_output ? ["an output of the network"] : []];
  return [
    ["Runs in", layer.precision],
    ["Why", layer.reason],
    ["Gain in float", describeGain(layer)],
    ["Outputs in that state", known(layer.sensitivity && layer.sensitivity.sqnr_db, (db) => `SQNR ${db} dB`, missing.sensitivity || "no error")],
    ["Own output in int8", known(layer.output_sqnr_db, (db) => `SQNR ${db} dB`, missing.output_sqnr_db)],
    ["Multiplications", known(layer.macs, (macs) => `${macs.toLocaleString("en")} a sample, ${share(layer.macs_share)} of all`, missing.macs)],
    ["Weights", layer.weights ? `${layer.weights.toLocaleString("en")}, ${layer.weight_bytes.toLocaleString("en")} bytes in the file` : "none of its own"],
    ["Engine", known(layer.engine, (engine) => (layer.engine_note ? `${engine}: ${layer.engine_note}` : engine), missing.engine)],
    ["Kernel", list(layer.kernels, `not known: ${missing.engine || "the engine names none"}`)],
    ["Reads", list([...ends[0], ...layer.reads], `nothing that is known: ${missing.neighbours || "constants only"}`)],
    ["Feeds", list([...layer.feeds, ...ends[1]], `nothing that is known: ${missing.neighbours || "no layer reads it"}`)],
  ];
}

function histogram(tensor) {
  const counts = tensor.histogram;
  const top = Math.log10(Math.max(...counts) + 1) || 1;
  const path = counts.map((count, at) => `V${(100 - (100 * Math.log10(count + 1)) / top).toFixed(1)}H${at + 1}`).join("");
  const svg = drawing("svg", {viewBox: `0 0 ${counts.length} 100`, preserveAspectRatio: "none", role: "img", "aria-label": "Histogram of the absolute values, logarithmic counts"});
  svg.append(drawing("path", {class: "h", d: `M0 100${path}V100Z`}));
  for (const [method, found] of Object.entries(tensor.methods)) {
    const x = (found.amax / tensor.histogram_end) * counts.length;
    const width = method === tensor.method ? 3 : 1.2;
    svg.append(drawing("path", {class: `c${METHODS.indexOf(method)}`, d: `M${x} 0V100`, "stroke-width": width, "vector-effect": "non-scaling-stroke"}));
  }
  return svg;
}

function methodTable(tensor) {
  const made = element("table");
  const head = made.createTHead().insertRow();
  for (const label of ["method", "range", "clipped"]) head.append(element("th", label, {scope: "col"}));
  const rows = made.createTBody();
  for (const [method, found] of Object.entries(tensor.methods)) {
    const row = rows.insertRow();
    if (method === tensor.method) row.className = "chosen";
    const name = element("th", undefined, {scope: "row"});
    name.append(element("i", undefined, {class: `swatch c${METHODS.indexOf(method)}`}), method === tensor.method ? `${method} (used)` : method);
    row.append(name, element("td", found.amax), element("td", share(found.clipped, 3)));
  }
  return made;
}

function describeTensor(tensor) {
  const missing = tensor.unknown;
  const ranges = tensor.ranges > 1 ? ` (${tensor.ranges} channels: ${tensor.least_amax} to ${tensor.amax})` : "";
  return [
    ["Range", known(tensor.amax, (amax) => `${amax}${ranges}${tensor.method ? `, by ${tensor.method}` : ""}`, missing.amax)],
    ["Quantizes", tensor.is_on ? "yes" : "no, it is switched off"],
    ["Error", known(tensor.sqnr_db, (db) => `SQNR ${db} dB`, missing.sqnr_db)],
    ["Clipped", known(tensor.clipped, (part) => share(part, 3), missing.clipped)],
    ["Same range as", list(tensor.shares, "no other")],
  ];
}

function definitions(pairs) {
  const made = element("dl");
  for (const [term, text] of pairs) made.append(element("dt", term), element("dd", text));
  return made;
}

function showTensor(tensor) {
  const made = element("section", undefined, {class: "tensor"});
  made.append(element("h3", `${tensor.role[0].toUpperCase()}${tensor.role.slice(1)}`), definitions(describeTensor(tensor)));
  if (tensor.histogram.length) {
    made.append(element("p", `Histogram of |x| without zeros, 0 to ${tensor.histogram_end}, counts on a logarithmic scale; a line is a range.`, {class: "soft"}), histogram(tensor), methodTable(tensor));
  } else if (missingHistogram(tensor)) {
    made.append(element("p", `No histogram: ${missingHistogram(tensor)}.`, {class: "soft"}));
  }
  return made;
}

const missingHistogram = (tensor) => tensor.unknown.histogram;

function showDetails(row, number) {
  const layer = layers[number];
  const made = element("tr", undefined, {class: "details"});
  const cell = element("td", undefined, {colspan: row.cells.length});
  const wrap = element("div", undefined, {class: "wrap"});
  wrap.append(definitions(describe(layer)), ...layer.tensors.map(showTensor));
  if (layer.unknown.tensors) wrap.append(element("p", `No ranges: ${layer.unknown.tensors}.`, {class: "soft"}));
  cell.append(wrap);
  made.append(cell);
  row.after(made);
  row.details = made;
}

function toggle(row, number, isOpen) {
  if (isOpen && !row.details) showDetails(row, number);
  if (!isOpen && row.details) {
    row.details.remove();
    row.details = undefined;
  }
  row.querySelector(".more").setAttribute("aria-expanded", String(isOpen));
}

rows.forEach((row, number) => {
  const head = row.cells[1];
  const button = element("button", head.textContent, {type: "button", class: "more", "aria-expanded": "false"});
  head.textContent = "";
  head.append(button);
  row.searchText = layers[number].reason;
  button.addEventListener("click", () => toggle(row, number, !row.details));
});

function openTarget() {
  const found = /^#layer-(\d+)$/.exec(location.hash);
  const row = found && document.getElementById(`layer-${found[1]}`);
  if (row) {
    row.hidden = false;
    toggle(row, Number(found[1]), true);
    row.scrollIntoView({block: "nearest"});
  }
}

addEventListener("hashchange", openTarget);
openTarget();
filter();
