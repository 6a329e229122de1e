// Details of a layer, made when they are asked for. Everything from the data becomes text, never markup.
const layers = JSON.parse(document.getElementById("data").textContent);
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

function definitions(facts) {
  const made = element("dl");
  for (const [term, text] of facts) made.append(element("dt", term), element("dd", text));
  return made;
}

function drawHistogram(tensor) {
  const counts = tensor.histogram;
  const top = Math.log10(Math.max(...counts) + 1) || 1;
  const path = counts.map((count, at) => `V${(100 - (100 * Math.log10(count + 1)) / top).toFixed(1)}H${at + 1}`).join("");
  const svg = drawing("svg", {viewBox: `0 0 ${counts.length} 100`, preserveAspectRatio: "none", role: "img", "aria-label": `Histogram: ${tensor.title}`});
  svg.append(drawing("path", {class: "h", d: `M0 100${path}V100Z`}));
  for (const method of tensor.methods) {
    const x = method.place * counts.length;
    svg.append(drawing("path", {class: `c${method.colour}`, d: `M${x} 0V100`, "stroke-width": method.isUsed ? 3 : 1.2, "vector-effect": "non-scaling-stroke"}));
  }
  return svg;
}

function tabulateMethods(tensor) {
  const made = element("table");
  const head = made.createTHead().insertRow();
  for (const label of ["method", "range", "clipped"]) head.append(element("th", label, {scope: "col"}));
  const body = made.createTBody();
  for (const method of tensor.methods) {
    const row = body.insertRow();
    if (method.isUsed) row.className = "chosen";
    const name = element("th", undefined, {scope: "row"});
    name.append(element("i", undefined, {class: `swatch c${method.colour}`}), method.name);
    row.append(name, element("td", method.range), element("td", method.clipped));
  }
  return made;
}

function showTensor(tensor) {
  const made = element("section", undefined, {class: "tensor"});
  made.append(element("h3", tensor.title), definitions(tensor.facts));
  if (tensor.histogram.length) {
    const text = `|x| from 0 to ${tensor.end} without zeros, counts on a logarithmic scale. Each line is the range by one method; values to the right of it are clipped.`;
    made.append(element("p", text, {class: "soft"}), drawHistogram(tensor), tabulateMethods(tensor));
  }
  if (tensor.note) made.append(element("p", tensor.note, {class: "soft"}));
  return made;
}

function showDetails(row, layer) {
  const wrap = element("div", undefined, {class: "wrap"});
  wrap.append(definitions(layer.facts), ...layer.tensors.map(showTensor));
  if (layer.note) wrap.append(element("p", layer.note, {class: "soft"}));
  const cell = element("td", undefined, {colspan: row.cells.length});
  cell.append(wrap);
  row.details = element("tr", undefined, {class: "details"});
  row.details.append(cell);
  row.after(row.details);
}

function toggle(row, layer, isOpen) {
  if (isOpen && !row.details) showDetails(row, layer);
  if (!isOpen && row.details) {
    row.details.remove();
    row.details = undefined;
  }
  row.querySelector(".more").setAttribute("aria-expanded", String(isOpen));
}

rows.forEach((row, number) => {
  const head = row.cells[1];
  const button = element("button", head.textContent, {type: "button", class: "more", "aria-expanded": "false"});
  head.replaceChildren(button);
  row.searchText = layers[number].why;
  button.addEventListener("click", () => toggle(row, layers[number], !row.details));
});

function openTarget() {
  const number = rows.findIndex((row) => `#${row.id}` === location.hash);
  if (number < 0) return;
  rows[number].hidden = false;
  showCount();
  toggle(rows[number], layers[number], true);
  rows[number].scrollIntoView({block: "nearest"});
}

addEventListener("hashchange", openTarget);
for (const link of document.querySelectorAll('a[href^="#layer-"]')) {
  link.addEventListener("click", () => link.getAttribute("href") === location.hash && openTarget()); // a link to the current location
}
filter();
openTarget();
