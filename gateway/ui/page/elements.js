// Elements of the page. Whatever comes from the gateway becomes text, never markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function element(name, text = "", className = "") {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  if (className) made.className = className;
  return made;
}

export function svg(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  return made;
}

// A horizontal bar of a share from 0 to 1. What it says is in the text beside it.
export function meter(share) {
  const bar = svg("svg", { class: "meter", viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" });
  bar.append(svg("rect", { class: "track", width: 100, height: 6, rx: 1 }));
  bar.append(svg("rect", { class: "fill", width: Math.min(1, Math.max(0, share)) * 100, height: 6, rx: 1 }));
  return bar;
}

// Columns are [title, kind]; kind is a class of the cells, and "head" makes a row's heading. A row is a list of cells: a text,
// or { text, kind, share } with a class of its own, and a bar. What did not change stays, so that text can be selected.
export function fillTable(table, columns, rows, whenEmpty) {
  if (!table.tHead) {
    const row = table.createTHead().insertRow();
    for (const [title, kind] of columns) {
      const cell = row.appendChild(element("th", title, kind === "number" ? kind : ""));
      cell.scope = "col";
    }
    table.createTBody();
  }
  const body = table.tBodies[0];
  if (!rows.length) {
    const cell = element("td", whenEmpty, "empty");
    cell.colSpan = columns.length;
    const row = element("tr");
    row.append(cell);
    if (body.textContent !== whenEmpty) body.replaceChildren(row);
    return;
  }
  if (body.querySelector("td.empty")) body.replaceChildren();
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((cells, place) => {
    const row = body.rows[place] ?? body.insertRow();
    cells.forEach((given, column) => fillCell(row, column, columns[column][1], given));
  });
}

function fillCell(row, column, kind, given) {
  const { text, kind: own, share } = typeof given === "object" ? given : { text: given };
  const isHead = kind === "head";
  const cell = row.cells[column] ?? row.appendChild(element(isHead ? "th" : "td"));
  if (isHead) cell.scope = "row";
  cell.className = isHead ? "" : [kind, own].filter(Boolean).join(" ");
  if (share === undefined) {
    setText(cell, String(text));
  } else if (cell.textContent !== String(text) || !cell.querySelector("svg")) {
    cell.replaceChildren(meter(share), String(text));
  }
}
