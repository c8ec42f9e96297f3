"use strict";
// Tables sort, filter, fold and download; plots show values and hide lines. Nothing here computes a number.

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// ---- downloads

function save(name, type, text) {
  const link = element("a", {href: URL.createObjectURL(new Blob([text], {type})), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function csvField(value) {
  // spreadsheets execute text that begins with one of these signs
  const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value ?? "");
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function downloads(name, content) {
  const file = name.replace(/[^\w]+/g, "_").replace(/^_|_$/g, "").slice(0, 60) || "table";
  const csv = element("button", {type: "button", textContent: "CSV", title: "download as CSV"});
  const json = element("button", {type: "button", textContent: "JSON", title: "download as JSON"});
  csv.addEventListener("click", () => {
    const {columns, rows} = content();
    const lines = [columns, ...rows.map(row => columns.map(column => row[column]))];
    save(`${file}.csv`, "text/csv", lines.map(line => line.map(csvField).join(",") + "\r\n").join(""));
  });
  json.addEventListener("click", () => save(`${file}.json`, "application/json", JSON.stringify(content().rows, null, 1)));
  return [csv, json];
}

// ---- tables

function headingOf(node) {
  const details = node.closest("details"), section = node.closest("section"), heading = section?.querySelector("h2, h3");
  return details?.firstElementChild.textContent || heading?.textContent || document.title;
}

function makeTable(block) {
  const table = block.querySelector("table"), heads = [...table.tHead.rows[0].cells];
  const names = heads.map(head => head.textContent.trim());
  const groups = [];  // a row and the rows folded under it
  for (const row of table.tBodies[0].rows) {
    if (row.classList.contains("child") && groups.length) groups.at(-1).children.push(row);
    else groups.push({row, children: [], open: false});
  }
  const folding = groups.filter(group => group.children.length);
  const words = element("input", {type: "search", placeholder: "filter rows", ariaLabel: "filter rows"});
  const count = element("output", {ariaLive: "polite"});

  function update() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = row => wanted.every(word => row.textContent.toLowerCase().includes(word));
    let shown = 0;
    for (const group of groups) {
      const matching = group.children.filter(fits), visible = fits(group.row) || matching.length > 0;
      shown += visible;
      group.row.hidden = !visible;
      for (const child of group.children) child.hidden = !(visible && group.open);
      group.button?.setAttribute("aria-expanded", group.open);
      if (group.button) group.button.textContent = group.open ? "▾" : "▸";
    }
    count.value = wanted.length ? `${shown} of ${groups.length} rows` : "";
  }

  for (const group of folding) {
    group.button = element("button", {type: "button", className: "fold", ariaLabel: `show the ${group.children.length} rows of this one`});
    group.button.addEventListener("click", () => { group.open = !group.open; update(); });
    group.row.cells[0].prepend(group.button);
  }
  words.addEventListener("input", update);

  function key(row, column) {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : cell.dataset.value === "" ? null : Number(cell.dataset.value);
  }
  function compare(a, b) {
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", {numeric: true});
  }
  heads.forEach((head, column) => {
    const button = element("button", {type: "button"}, ...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const order = (a, b) => a === null || b === null ? (a === null) - (b === null)  // no number: last
        : down ? compare(b, a) : compare(a, b);
      const sorted = groups.map(group => [key(group.row, column), group]).sort(([a], [b]) => order(a, b));
      for (const [, group] of sorted) {
        group.children.sort((a, b) => order(key(a, column), key(b, column)));
        table.tBodies[0].append(group.row, ...group.children);
      }
    });
  });

  function content() {
    const spread = names.map((_, column) => groups.some(group => [group.row, ...group.children].some(row => row.cells[column].dataset.std)));
    const columns = names.flatMap((name, column) => spread[column] ? [name, `${name}, std`] : [name]);
    const rows = groups.flatMap(group => [group.row, ...group.children]).map(row => {
      const entry = {};
      names.forEach((name, column) => {
        const cell = row.cells[column].cloneNode(true), {value, std} = cell.dataset;
        cell.querySelector(".fold")?.remove();
        entry[name] = value ? Number(value) : cell.textContent.trim();
        if (spread[column]) entry[`${name}, std`] = std ? Number(std) : null;
      });
      return entry;
    });
    return {columns, rows};
  }
  const tools = element("div", {className: "tools"});
  if (groups.length > 3) tools.append(words, count);
  if (folding.length) {
    const all = element("button", {type: "button", textContent: "unfold all"});
    all.addEventListener("click", () => {
      const open = folding.some(group => !group.open);
      for (const group of folding) group.open = open;
      all.textContent = open ? "fold all" : "unfold all";
      update();
    });
    tools.append(all);
  }
  tools.append(...downloads(`${block.querySelector(".caption")?.textContent ?? headingOf(block)}`, content));
  block.querySelector(".scroll").before(tools);
  update();
}

// ---- plots

function makePlot(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const axes = figure.querySelector(".axes"), lines = [...figure.querySelectorAll(".line")];
  const [left, , width] = figure.querySelector("svg").getAttribute("viewBox").split(" ").map(Number);
  const positions = [...new Set(data.lines.flatMap(line => line.points.map(([x]) => x)))].sort((a, b) => a - b);
  const cursor = element("div", {className: "cursor", hidden: true});
  const values = element("div", {className: "values", hidden: true, role: "status"});
  axes.append(cursor, values);
  let at = -1;

  function show(index) {
    at = Math.max(0, Math.min(positions.length - 1, index));
    const x = positions[at], share = (x - left) / width;
    const rows = data.lines.map((line, i) => ({line, i, point: line.points.find(point => point[0] === x)}))
      .filter(({i, point}) => point && !lines[i].classList.contains("off")).sort((a, b) => b.point[1] - a.point[1]);
    values.replaceChildren(element("b", {textContent: `${data.x}: ${Number(x.toPrecision(5))}`}));
    for (const {line, i, point} of rows.slice(0, 16)) {
      const spread = point[2] ? ` ± ${Number(point[2].toPrecision(3))}` : "";
      const mark = element("i", {className: lines[i].getAttribute("class"), textContent: "■ "});
      values.append(element("br"), mark, `${line.name}: ${Number(point[1].toPrecision(5))}${spread}`);
    }
    if (rows.length > 16) values.append(element("br"), `and ${rows.length - 16} more`);
    cursor.style.left = `${100 * share}%`;
    values.style.left = share < 0.5 ? `calc(${100 * share}% + 8px)` : "auto";
    values.style.right = share < 0.5 ? "auto" : `calc(${100 * (1 - share)}% + 8px)`;
    cursor.hidden = values.hidden = false;
  }
  function hide() { cursor.hidden = values.hidden = true; }
  axes.addEventListener("pointermove", event => {
    const box = axes.getBoundingClientRect(), x = left + width * (event.clientX - box.left) / box.width;
    const distances = positions.map(position => Math.abs(position - x));
    show(distances.indexOf(Math.min(...distances)));
  });
  axes.addEventListener("pointerleave", hide);
  axes.addEventListener("blur", hide);
  axes.addEventListener("keydown", event => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (event.key === "Escape") hide();
    if (step) { event.preventDefault(); show(at < 0 ? 0 : at + step); }
  });
  figure.querySelectorAll(".legend li").forEach((item, i) => {
    const button = element("button", {type: "button", ariaPressed: "true", title: "show or hide this line"}, ...item.childNodes);
    item.append(button);
    button.addEventListener("click", () => {
      const off = lines[i].classList.toggle("off");
      button.ariaPressed = String(!off);
    });
  });
  const content = () => ({
    columns: ["line", data.x, "value", "spread"],
    rows: data.lines.flatMap(line => line.points.map(([x, y, spread]) => ({line: line.name, [data.x]: x, value: y, spread}))),
  });
  figure.append(element("div", {className: "tools"}, ...downloads(data.title, content)));
}

document.querySelectorAll(".table").forEach(makeTable);
document.querySelectorAll(".plot").forEach(makePlot);
