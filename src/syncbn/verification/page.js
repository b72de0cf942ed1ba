"use strict";
// The page says everything without this; it makes the picture and the tables quicker to read.
const readout = document.getElementById("readout");
const picture = document.querySelector("figure .scroll svg");
const row = (cell) => document.getElementById(`layer-${cell.dataset.layer}`);
if (picture) {
  const said = readout.textContent;
  picture.addEventListener("pointerover", (event) => {
    const cell = event.target.closest(".cell");
    readout.textContent = cell ? cell.querySelector("title").textContent : said;
  });
  picture.addEventListener("click", (event) => {
    const cell = event.target.closest(".cell");
    if (!cell) return;
    document.querySelectorAll(".sought").forEach((old) => old.classList.remove("sought"));
    const filter = document.getElementById("departing");
    if (filter && !row(cell).classList.contains("departing")) filter.checked = false;
    row(cell).classList.add("sought");
    row(cell).scrollIntoView({ block: "center" });
  });
}

// A figure's own order: what is no number departs furthest, what is not there comes last.
const value = (line, at) => {
  const cell = line.children[at];
  return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
};
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const at = [...heading.parentNode.children].indexOf(heading);
    const first = heading.dataset.first || "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = heading.getAttribute("aria-sort") === first ? other : first;
    const sign = order === "ascending" ? 1 : -1;
    const body = heading.closest("table").tBodies[0];
    const sorted = [...body.rows].sort((one, two) => {
      const [a, b] = [value(one, at), value(two, at)];
      return sign * (typeof a === "number" ? a - b : a.localeCompare(b));
    });
    for (const th of heading.parentNode.children) th.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", order);
    body.append(...sorted);
  });
}
