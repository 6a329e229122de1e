"use strict";
// Sorts and filters the table of layers. Rows that show details follow the row that they belong to.
const table = document.getElementById("table");
const body = table.tBodies[0];
const rows = [...body.rows];

function valueOf(row, column) {
  const text = row.cells[column].dataset.value;
  const isText = row.cells[column].tagName === "TH" || row.cells[column].classList.contains("text");
  return text === "" ? null : isText ? text : Number(text);
}

function compare(one, other) {
  return typeof one === "number" ? one - other : one.localeCompare(other, "en", {numeric: true});
}

function sort(column, direction) {
  const keyed = rows.map((row, place) => ({row, place, value: valueOf(row, column)}));
  keyed.sort((a, b) => {
    if (a.value === null || b.value === null) return (a.value === null) - (b.value === null) || a.place - b.place; // unknown last
    return direction * compare(a.value, b.value) || a.place - b.place;
  });
  for (const {row} of keyed) {
    body.append(row);
    if (row.details) body.append(row.details);
  }
}

[...table.tHead.rows[0].cells].forEach((head, column) => {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "sort";
  button.textContent = head.textContent;
  head.textContent = "";
  head.setAttribute("aria-sort", column ? "none" : "ascending");
  head.append(button);
  button.addEventListener("click", () => {
    const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", direction);
    sort(column, direction === "ascending" ? 1 : -1);
  });
});

const find = document.getElementById("find");
const choices = [...document.querySelectorAll("#controls select")];

function filter() {
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of rows) {
    const text = (row.textContent + " " + (row.searchText || "")).toLowerCase();
    const isShown = words.every((word) => text.includes(word)) && choices.every((choice) => !choice.value || row.dataset[choice.id] === choice.value);
    row.hidden = !isShown;
    if (row.details) row.details.hidden = !isShown;
  }
  showCount();
}

function showCount() {
  const count = rows.filter((row) => !row.hidden).length;
  document.getElementById("shown").textContent = `${count} of ${rows.length} layers`;
}

for (const control of [find, ...choices]) control.addEventListener("input", filter);
document.getElementById("controls").hidden = false;
