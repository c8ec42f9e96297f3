"use strict";
// Tables sort, filter, fold and download; plots show values and hide lines; maps of images are drawn from the page's data.

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

// ---- maps of example images

const INFERNO = [[0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51], [249, 140, 10], [249, 201, 50], [252, 255, 164]];

function colour(share) {
  const at = Math.max(0, Math.min(1, share)) * (INFERNO.length - 1), low = Math.min(Math.floor(at), INFERNO.length - 2);
  return INFERNO[low].map((value, i) => value + (at - low) * (INFERNO[low + 1][i] - value));
}

function bytes(text) {
  return Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
}

function decoded(image) {  // of one image of one encoder; its arrays are read once
  if (image.ready) return image;
  for (const name of ["attention", "weights"]) if (image[name]) image[name].bytes = bytes(image[name].data);
  for (const name of ["similarity", "colours"]) if (image[name]) image[name] = bytes(image[name]);
  return Object.assign(image, {ready: true});
}

function weightsOf(map, block, head) {  // multiples of uniform attention; head -1: the mean over heads
  const [, heads, patches] = map.shape, values = new Float64Array(patches);
  const chosen = head < 0 ? [...Array(heads).keys()] : [head];
  for (const h of chosen) {
    for (let i = 0; i < patches; i++) values[i] += map.top * (map.bytes[(block * heads + h) * patches + i] / 255) ** 2 / chosen.length;
  }
  return values;
}

function paint(canvas, picture, grid, colours, opacity, mark) {
  const [rows, columns] = grid, side = canvas.dataset.size ?? 272, context = canvas.getContext("2d");
  canvas.width = side;
  canvas.height = Math.round(side * picture.naturalHeight / picture.naturalWidth);
  const {width, height} = canvas;
  if (colours) context.filter = "grayscale(1)";
  context.drawImage(picture, 0, 0, width, height);
  context.filter = "none";
  for (let i = 0; colours && i < rows * columns; i++) {
    const x = Math.round((i % columns) * width / columns), y = Math.round(Math.floor(i / columns) * height / rows);
    context.fillStyle = `rgb(${colours(i).map(Math.round).join(" ")} / ${opacity(i)})`;
    context.fillRect(x, y, Math.round((i % columns + 1) * width / columns) - x, Math.round((Math.floor(i / columns) + 1) * height / rows) - y);
  }
  if (mark) {
    context.lineWidth = 3;
    context.strokeStyle = "#00e5ff";
    context.strokeRect(mark.column * width / columns, mark.row * height / rows, width / columns, height / rows);
  }
}

const shortName = path => path.split("/").slice(-2).join("/");

function makeMaps(block) {
  const sources = JSON.parse(block.querySelector("script").textContent);
  const names = [...new Set(sources.flatMap(source => source.images.map(image => image.name)))];
  const state = {image: names[0], view: "encoders", source: 0, block: -1, head: -1, x: 0.5, y: 0.5};
  const controls = element("div", {className: "controls"}), looks = element("div", {className: "row"});
  const similar = element("div", {className: "row"}), said = element("output", {ariaLive: "polite"});
  const dialog = element("dialog");
  block.append(controls, looks, element("p", {className: "soft", textContent: "Cosine similarity to the marked patch"}), said, similar, dialog);

  const withAttention = source => source.images.some(image => image.attention);
  const views = {encoders: "encoders and rules"};
  if (sources.some(withAttention)) Object.assign(views, {blocks: "blocks of an encoder", heads: "heads of a block"});

  function choice(label, name, options) {
    const select = element("select", {ariaLabel: label}, ...options.map(([value, text]) => element("option", {value, textContent: text})));
    select.value = String(state[name]);
    select.addEventListener("change", () => {
      state[name] = typeof state[name] === "number" ? Number(select.value) : select.value;
      if (name === "source") state.block = state.head = -1;
      draw();
    });
    controls.append(element("label", {}, `${label} `, select));
  }

  function tile(row, picture, source, caption, colours, opacity) {
    const canvas = element("canvas"), button = element("button", {type: "button", className: "tile", ariaLabel: `enlarge ${caption}`}, canvas);
    paint(canvas, picture, source.grid, colours, opacity);
    button.addEventListener("click", () => {
      const large = element("canvas");
      large.dataset.size = 800;
      paint(large, picture, source.grid, colours, opacity);
      const close = element("button", {type: "button", textContent: "close"});
      close.addEventListener("click", () => dialog.close());
      dialog.replaceChildren(large, element("p", {textContent: caption}), close);
      dialog.showModal();
    });
    row.append(element("figure", {}, button, element("figcaption", {textContent: caption})));
  }

  function weightTile(picture, source, caption, values) {
    const top = Math.max(2, ...values), most = Number(Math.max(...values).toPrecision(2));
    tile(looks, picture, source, `${caption}, at most ${most} × uniform`, i => colour(values[i] / top), i => Math.sqrt(Math.min(1, values[i] / top)));
  }

  function drawLooks(found) {
    looks.replaceChildren();
    for (const {source, image, picture} of found) {
      const last = (image.attention?.shape[0] ?? 0) - 1, at = state.block < 0 ? last : Math.min(state.block, last);
      if (state.view === "encoders") {
        tile(looks, picture, source, `${source.label}: ${shortName(image.name)}`, null);
        if (image.colours) tile(looks, picture, source, `${source.label}: principal components`, i => [...image.colours.subarray(3 * i, 3 * i + 3)], () => 1);
        if (image.attention) weightTile(picture, source, `${source.label}: [cls], block ${last}, mean of heads`, weightsOf(image.attention, last, -1));
        for (let i = 0; image.weights && i < source.rules.length; i++) weightTile(picture, source, `${source.label}: ${source.rules[i]}`, weightsOf(image.weights, 0, i));
      } else if (image.attention && source === sources[state.source]) {
        const count = image.attention.shape[state.view === "blocks" ? 0 : 1];
        for (let i = 0; i < count; i++) {
          const values = state.view === "blocks" ? weightsOf(image.attention, i, state.head) : weightsOf(image.attention, at, i);
          weightTile(picture, source, state.view === "blocks" ? `block ${i}` : `block ${at}, head ${i}`, values);
        }
      }
    }
  }

  function drawSimilar(found) {
    const focused = similar.contains(document.activeElement);
    similar.replaceChildren();
    for (const {source, image, picture} of found.filter(({image}) => image.similarity)) {
      const [rows, columns] = source.grid, patches = rows * columns;
      const mark = {row: Math.min(rows - 1, Math.floor(state.y * rows)), column: Math.min(columns - 1, Math.floor(state.x * columns))};
      const query = mark.row * columns + mark.column, cosine = i => image.similarity[query * patches + i] / 127.5 - 1;
      const canvas = element("canvas", {className: "pick", tabIndex: 0, role: "img", ariaLabel: `${source.label}: similarity to row ${mark.row}, column ${mark.column}; arrow keys move`});
      paint(canvas, picture, source.grid, i => colour((cosine(i) + 1) / 2), () => 0.8, mark);
      canvas.addEventListener("click", event => {
        const box = canvas.getBoundingClientRect();
        move((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
      });
      canvas.addEventListener("keydown", event => {
        const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
        if (!step) return;
        event.preventDefault();
        move((mark.column + step[0] + 0.5) / columns, (mark.row + step[1] + 0.5) / rows);
      });
      let total = 0;
      for (let i = 0; i < patches; i++) total += cosine(i) / patches;
      similar.append(element("figure", {}, canvas, element("figcaption", {textContent: `${source.label}: mean ${total.toFixed(2)}`})));
      said.value = `row ${mark.row}, column ${mark.column} (from 0)`;
    }
    if (focused) similar.querySelector("canvas")?.focus();
  }

  function move(x, y) {
    Object.assign(state, {x: Math.max(0, Math.min(0.999, x)), y: Math.max(0, Math.min(0.999, y))});
    if (state.found) drawSimilar(state.found);
  }

  async function draw() {
    controls.replaceChildren();
    choice("image", "image", names.map(name => [name, shortName(name)]));
    if (Object.keys(views).length > 1) choice("show", "view", Object.entries(views));
    const source = sources[state.source], map = source.images.find(image => image.attention)?.attention;
    if (state.view !== "encoders") {
      choice("encoder", "source", sources.flatMap((other, i) => withAttention(other) ? [[i, other.label]] : []));
      const [blocks, heads] = map?.shape ?? [0, 0], numbers = count => [...Array(count).keys()].map(i => [i, String(i)]);
      if (state.view === "heads") choice("block", "block", [[-1, "last"], ...numbers(blocks)]);
      else choice("head", "head", [[-1, "mean"], ...numbers(heads)]);
    }
    const found = await Promise.all(sources.flatMap(source => source.images.filter(image => image.name === state.image).map(async image => {
      const picture = new Image();
      picture.src = `data:image/jpeg;base64,${image.picture}`;
      await picture.decode();
      return {source, image: decoded(image), picture};
    })));
    state.found = found;
    drawLooks(found);
    drawSimilar(found);
  }
  draw();
}

document.querySelectorAll(".table").forEach(makeTable);
document.querySelectorAll(".plot").forEach(makePlot);
document.querySelectorAll(".maps").forEach(makeMaps);
