// The lab's picture, drawn from the numbers that the kernel sends at each flip.
//
// Two timelines with what is alive at each event, what is alive at the peak, times, and
// every plan tried. Its colours are those of plots/_axes.py, in light and dark themes.

const NS = "http://www.w3.org/2000/svg";
const LEFT = 46, TOP = 26, LETTER = 6.1, TITLE_LETTER = 7.6; // margins, widths of letters
const BUTTON = 140; // a button's width, beside a title
const DIGIT = 6.4, BETWEEN = 2.4; // in the strip: a digit's width, and what parts numbers
const LISTED = 7; // tensors that a hover names

function draw(tag, attributes = {}, ...children) {
  const made = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const text = (x, y, words, kind = "", anchor = "start") =>
  draw("text", { x, y, class: kind, "text-anchor": anchor }, words);

const cut = (words, most) => (words.length > most ? `${words.slice(0, most - 1)}…` : words);

function unitOf(top) {
  const units = [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]];
  return units.find(([size]) => top >= size - size / 20000) ?? [1, "B"];
}

function bytes(count) {
  const [size, unit] = unitOf(count);
  const digits = size === 1 ? 0 : unit === "GiB" ? 2 : 1;
  const look = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return `${(count / size).toLocaleString("en", look)} ${unit}`;
}

function ticks(top, most) {
  const rough = top / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((one) => one * power >= rough * 0.999);
  const count = Math.floor(top / step + 1e-9) + 1;
  return Array.from({ length: count }, (_, i) => +(i * step).toPrecision(12));
}

// An empty plot of a panel's size, with a memory or time axis to the left.
function axes(panel, title, top, unit, bottom, taken = 0) {
  const { width, height } = panel.room, low = height - bottom;
  const y = (value) => low - (value / top) * (low - TOP);
  const most = Math.floor((width - LEFT + 28 - taken) / TITLE_LETTER);
  const parts = [text(LEFT - 34, 14, cut(title, most), "title")];
  for (const tick of top ? ticks(top, low - TOP < 160 ? 4 : 6) : []) {
    const at = { x1: LEFT, x2: width - 6, y1: y(tick), y2: y(tick) };
    parts.push(draw("line", { class: tick ? "grid" : "axis", ...at }));
    parts.push(text(LEFT - 5, y(tick) + 4, tick.toLocaleString("en"), "quiet", "end"));
  }
  parts.push(draw("line", { class: "axis", x1: LEFT, x2: LEFT, y1: TOP, y2: low }));
  const middle = (TOP + low) / 2;
  const label = text(12, middle, unit, "quiet", "middle");
  label.setAttribute("transform", `rotate(-90 12 ${middle})`);
  return { parts: [...parts, label], y, width, low };
}

// What is large comes packed.
async function unpack(sent) {
  if (!(sent instanceof DataView)) return sent;
  const stream = new Blob([sent]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).json();
}

const summed = (gaps, at = 0) => gaps.map((gap) => (at += gap));

// From when to when each tensor of a timeline is alive, and what made it.
function laid(line) {
  if (!line.gaps) return line;
  const from = summed(line.gaps), to = line.lasts.map((places, i) => from[i] + places);
  return Object.assign(line, { from, to, maker: summed(line.makers) });
}

// Bytes alive in each category at each place of a timeline, from its tensors.
function levelsOf(line, categories) {
  const rows = categories.map(() => new Float64Array(line.length));
  line.bytes.forEach((count, i) => {
    rows[line.category[i]][line.from[i]] += count;
    if (line.to[i] < line.length) rows[line.category[i]][line.to[i]] -= count;
  });
  for (const row of rows) for (let i = 1; i < row.length; i++) row[i] += row[i - 1];
  return rows;
}

// The places to draw: all, or of as many buckets the highest.
function placesOf(rows, length, most) {
  const total = (place) => rows.reduce((sum, row) => sum + row[place], 0);
  const size = Math.ceil(length / most), places = [];
  for (let start = 0; start < length; start += size) {
    let best = start;
    for (let i = start + 1; i < Math.min(length, start + size); i++)
      if (total(i) > total(best)) best = i;
    places.push([start, best]);
  }
  return places;
}

function areas(rows, colors, length, x, y, size) {
  const places = placesOf(rows, length, 2 * (x(length) - x(0)));
  const base = new Float64Array(places.length), end = x(length).toFixed(1);
  return rows.filter((row) => row.some(Boolean)).map((row) => {
    const color = colors[rows.indexOf(row)];
    const low = base.slice();
    places.forEach(([, place], i) => (base[i] += row[place] / size));
    const up = places.map(([start], i) => `H${x(start).toFixed(1)}V${y(base[i]).toFixed(1)}`);
    const back = places.map(([start], i) => `V${y(low[i]).toFixed(1)}H${x(start).toFixed(1)}`);
    const d = `M${x(0)} ${y(base[0])}${up.join("")}H${end}${back.reverse().join("")}Z`;
    return draw("path", { d, fill: color, class: "area" });
  });
}

// What runs at each place, under zero: a box for each layer in its phase's colour.
function strip(line, x, low) {
  const parts = [], first = {};
  let place = 0;
  for (const [phase, layer, length] of line.running) {
    const label = layer.replace(/\D/g, "") || layer;
    const at = { x: x(place), y: low + 3, height: 14, width: x(length) - x(0) };
    const thin = at.width < 3 ? "thin" : ""; // an edge would hide it
    parts.push(draw("rect", { class: `phase ${phase} ${thin}`, ...at }));
    if (label && at.width > DIGIT * label.length + BETWEEN)
      parts.push(text(at.x + at.width / 2, low + 14, label, "tiny", "middle"));
    first[phase] ??= at.x;
    place += length;
  }
  const end = x(place), latest = end - 9 * LETTER - 66;
  parts.push(text(x(0), low + 31, "forward", "quiet"));
  if ("backward" in first) parts.push(text(end, low + 31, "backward", "quiet", "end"));
  if ("recompute" in first) {
    const at = Math.max(x(0) + 56, Math.min(first.recompute, latest));
    parts.push(text(at, low + 31, "recompute", "recomputed"));
  }
  return parts;
}

// A line where the memory ends, and whether what is shown stays below it: in words on
// the other side of the line than the peak's, or beside the button if it is far above.
function limitLine(limit, scale, axis, peak) {
  if (!limit) return [];
  const kind = limit.over ? "limit over" : "limit";
  if (limit.bytes > scale.bytes)
    return `↑ ${limit.label}`.split(/(?<=:) /).map((words, i) =>
      text(axis.width - BUTTON - 4, 10 + 12 * i, words, kind, "end"));
  const at = axis.y(limit.bytes / scale.size), near = at >= peak && at - peak < 30;
  const ends = { x1: LEFT, x2: axis.width - 6, y1: at, y2: at };
  const words = text(axis.width - 8, near ? at + 13 : at - 5, limit.label, `${kind} halo`, "end");
  return [draw("line", { class: kind, ...ends }), words];
}

function drawTimeline(panel, line, shown, scale, colors) {
  const axis = axes(panel, line.title, scale.top, scale.unit, 38, BUTTON), { y, low, width } = axis;
  const x = (place) => LEFT + (place / scale.length) * (width - 6 - LEFT);
  const rows = levelsOf(line, shown.categories);
  const at = { cx: x(line.peak.place + 0.5), cy: y(line.peak.bytes / scale.size) };
  const right = at.cx < LEFT + 0.55 * (width - LEFT), anchor = right ? "start" : "end";
  const beside = at.cx + (right ? 9 : -9), kind = line.measured ? "measured" : "hollow";
  const limit = shown.limit ? y(shown.limit.bytes / scale.size) : -99;
  const lift = limit < at.cy ? Math.max(0, limit + 20 - at.cy) : Math.min(0, limit - 11 - at.cy);
  const room = Math.floor((right ? width - beside : beside - LEFT) / LETTER);
  panel.replaceChildren(
    ...axis.parts,
    ...areas(rows, colors, line.length, x, y, scale.size),
    ...strip(line, x, low),
    ...limitLine(shown.limit, scale, axis, at.cy),
    draw("circle", { class: kind, r: 3.6, ...at }),
    text(beside, at.cy - 7 + lift, `peak ${bytes(line.peak.bytes)}`, "strong halo", anchor),
    text(beside, at.cy + 6 + lift, cut(line.peak.cause, room), "quiet halo", anchor),
    draw("line", { class: "cursor", y1: TOP - 4, y2: low, visibility: "hidden" }),
  );
  const place = (pixel) => Math.floor(((pixel - LEFT) / (width - 6 - LEFT)) * scale.length);
  panel.view = { line, x, place };
  const peak = `peak ${bytes(line.peak.bytes)} in ${line.peak.cause}`;
  panel.setAttribute("aria-label", `${line.title}: ${peak}; arrow keys walk through the step`);
}

function drawPeaks(panel, lines, shown, scale, colors) {
  const axis = axes(panel, "alive at the peak", scale.top, scale.unit, 24);
  const named = shown.categories.map((_, kind) =>
    lines.some((line) => line.categories[kind] > 0.01 * line.peak.bytes));
  const names = shown.categories.map((name) => name.replace("_", " "));
  const longest = Math.max(...names.map(({ length }, kind) => named[kind] && length));
  const beside = 20 + LETTER * longest; // for swatches and names
  const { parts, y, low, width } = axis, room = width - LEFT - beside;
  lines.forEach((line, i) => {
    const wide = 0.37 * room, x = LEFT + (0.08 + 0.48 * i) * room;
    let level = 0;
    line.categories.forEach((count, kind) => {
      const at = { x, width: wide, y: y((level + count) / scale.size) };
      const height = y(level / scale.size) - at.y;
      if (count) parts.push(draw("rect", { class: "area", fill: colors[kind], height, ...at }));
      level += count;
    });
    const [amount] = bytes(level).split(" ");
    parts.push(text(x + wide / 2, y(level / scale.size) - 4, amount, "strong", "middle"));
    parts.push(text(x + wide / 2, low + 16, shown.pair[i], "quiet", "middle"));
    for (const grey of shown.recordedPeaks[i]) {
      const tip = y(grey / scale.size), d = `M${x - 8} ${tip - 4}L${x - 1} ${tip}L${x - 8} ${tip + 4}Z`;
      parts.push(draw("path", { class: "recorded", d }));
    }
  });
  let level = 0, floor = low - 4;
  lines.at(-1).categories.forEach((count, kind) => {
    const middle = y((level + count / 2) / scale.size) + 4;
    level += count;
    if (!named[kind]) return;
    floor = Math.min(middle, floor);
    const x = width - beside, at = { x, y: floor - 9, width: 9, height: 9, fill: colors[kind] };
    parts.push(draw("rect", { class: "swatch", ...at }));
    parts.push(text(x + 13, floor, names[kind], "label halo"));
    floor -= 15;
  });
  panel.replaceChildren(...parts);
}

// Medians with their quartiles; of two at a place the lower one is named below.
function drawTimes(panel, shown) {
  const all = shown.times.flat(), highest = Math.max(0, ...all.map((one) => one.high));
  const seconds = highest >= 1000 ? 1000 : 1, top = (highest * 1.5) / seconds;
  const { parts, y, low, width } = axes(panel, "iteration time", top, seconds > 1 ? "s" : "ms", 24);
  shown.times.forEach((series, place) => {
    const middle = LEFT + (0.27 + 0.48 * place) * (width - 6 - LEFT);
    const order = [...series].sort((a, b) => a.ms - b.ms);
    const close = order.length > 1 && order[1].ms - order[0].ms < 0.35 * highest;
    for (const one of series) {
      const x = middle + (series.length > 1 ? (one.recorded ? 13 : -13) : 0);
      const kind = one.recorded ? "recorded" : "measured", at = (ms) => y(ms / seconds);
      const bar = { x: x - 3, width: 6, y: at(one.high), height: at(one.low) - at(one.high) };
      parts.push(draw("rect", { class: `spread ${kind}`, ...bar }));
      parts.push(draw("circle", { class: kind, cx: x, cy: at(one.ms), r: 3.6 }));
      const below = close && one === order[0];
      one.words.forEach((words, i, { length }) => {
        const up = at(one.high) - 5 - 13 * (length - 1 - i);
        parts.push(text(x, below ? at(one.low) + 13 * (i + 1) : up, words, "label halo", "middle"));
      });
    }
    parts.push(text(middle, low + 16, shown.pair[place], "quiet", "middle"));
  });
  if (!all.length) {
    const at = [LEFT + (width - LEFT) / 2, (TOP + low) / 2];
    parts.push(text(at[0], at[1] - 7, "not yet", "quiet", "middle"));
    parts.push(text(at[0], at[1] + 7, "measured", "quiet", "middle"));
  }
  panel.replaceChildren(...parts);
  const said = shown.pair.map((name, i) =>
    shown.times[i].map((one) => `${name} ${one.words.join(" ")}`).join(", recorded "));
  panel.setAttribute("aria-label", `iteration time: ${said.filter(Boolean).join("; ") || "not yet measured"}`);
}

// Memory against extra work: a ring for each plan, which brings it back on a click, and
// with Shift takes it as the one to compare with.
function drawTried(panel, shown, scale, choose, compare, tell) {
  const { parts, y, low, width } = axes(panel, "every plan tried", scale.top, scale.unit, 38);
  const dots = [...shown.recorded, ...shown.dots];
  const xs = [...shown.tried.map((one) => one.work), ...dots.map(([work]) => work)];
  const right = Math.max(40, ...xs), left = Math.min(0, ...xs) - 0.03 * right;
  const x = (work) => LEFT + ((work - left) / (right * 1.1 - left)) * (width - 6 - LEFT);
  for (const tick of ticks(right * 1.1, width < 300 ? 4 : 6))
    parts.push(text(x(tick), low + 15, `${tick}`, "quiet", "middle"));
  const grey = shown.recorded.length ? "  grey: recorded" : "";
  const label = `extra work, %: ○ FLOPs  ● time${grey}`;
  parts.push(text((LEFT + width) / 2, low + 31, label, "quiet", "middle"));
  const dot = (kind) => ([work, peak]) =>
    draw("circle", { class: kind, cx: x(work), cy: y(peak / scale.size), r: 3.6 });
  parts.push(...shown.recorded.map(dot("recorded")), ...shown.dots.map(dot("measured")));
  const rings = shown.tried.map((one, i) => {
    const at = { cx: x(one.work), cy: y(one.peak / scale.size) };
    const ring = draw("g", { class: "ring", role: "button", tabindex: -1 });
    ring.append(draw("circle", { r: 8, class: "target", ...at }), draw("circle", { r: 4.6, ...at }));
    ring.setAttribute("aria-label", `bring back ${one.about}`);
    ring.setAttribute("aria-description", "C compares with it");
    ring.setAttribute("aria-keyshortcuts", "C");
    ring.classList.toggle("named", i in shown.names);
    ring.onclick = (event) => (event.shiftKey ? compare : choose)(i);
    const foot = "a click brings it back, Shift and a click or C compare with it";
    ring.onpointerenter = ring.onfocus = () => tell(panel, at, [one.about], foot);
    ring.onpointerleave = ring.onblur = () => tell(null);
    return Object.assign(ring, { at });
  });
  const now = rings[shown.now];
  now.setAttribute("tabindex", 0);
  now.setAttribute("aria-current", "true");
  panel.onkeydown = (event) => {
    const place = rings.indexOf(event.target), last = rings.length - 1;
    const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: last }[event.key];
    if (next !== undefined) rings[Math.max(0, Math.min(last, next))].focus();
    else if (event.key === "Enter" || event.key === " ") choose(place);
    else if (event.key.toLowerCase() === "c" && !event.ctrlKey && !event.metaKey) compare(place);
    else return;
    event.preventDefault();
  };
  const placed = [];
  for (const [i, name] of Object.entries(shown.names)) {
    const { cx, cy } = rings[i].at, wide = LETTER * name.length + 8;
    const corners = [[9, -6], [9, 14], [-4 - wide, -6], [-4 - wide, 14], [9, -19], [9, 27]];
    const free = ([left, top]) => left > LEFT - 12 && left + wide < width && top < low &&
      placed.every(([x, y, w]) => left > x + w || x > left + wide || Math.abs(top - y) > 14);
    const places = corners.map(([right, down]) => [cx + right, cy + down, wide]);
    placed.push(places.find(free) ?? places[0]);
    parts.push(text(placed.at(-1)[0], placed.at(-1)[1], name, "label halo"));
  }
  const focused = panel.contains(document.activeElement);
  panel.replaceChildren(...parts, ...rings.filter((one) => one !== now), now);
  if (focused) now.focus();
}

// The tensors that are alive at a place, the largest first, in words.
function aliveAt(line, place, { categories, texts }) {
  const found = [];
  for (let i = 0; i < line.bytes.length; i++)
    if (line.from[i] <= place && place < line.to[i]) found.push(i);
  found.sort((a, b) => line.bytes[b] - line.bytes[a]);
  const sum = (list) => bytes(list.reduce((all, i) => all + line.bytes[i], 0));
  const words = found.slice(0, LISTED).map((i) => {
    const kind = categories[line.category[i]].replace("_", " ");
    return `${bytes(line.bytes[i])}  ${kind} ${texts[line.shape[i]]} ${texts[line.maker[i]]}`;
  });
  const rest = found.slice(LISTED);
  if (rest.length) words.push(`${sum(rest)}  in ${rest.length} more`);
  let start = 0;
  const run = line.running.find(([, , length]) => (start += length) > place) ?? line.running.at(-1);
  const where = run ? `${run[0]}${run[1] ? ` of ${run[1]}` : ""}: ` : "";
  return [`${where}${sum(found)} alive`, ...words];
}

// Hovering and keys move a cursor along a timeline; a click or Enter pins it.
function inspectable(panel, tell, shown) {
  const show = (place) => {
    panel.at = Math.max(0, Math.min(panel.view.line.length - 1, place));
    const x = panel.view.x(panel.at + 0.5), cursor = panel.querySelector(".cursor");
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, x);
    cursor.setAttribute("visibility", "visible");
    const words = aliveAt(panel.view.line, panel.at, shown());
    tell(panel, { cx: x, cy: TOP }, words, panel.pinned ? "pinned: click again to let go" : "");
  };
  const hide = () => {
    panel.pinned = false;
    panel.querySelector(".cursor")?.setAttribute("visibility", "hidden");
    tell(null);
  };
  const pin = () => ((panel.pinned = !panel.pinned), show(panel.at));
  const under = (event) => panel.view.place(event.clientX - panel.getBoundingClientRect().left);
  panel.onpointermove = (event) => {
    const place = under(event), inside = place >= 0 && place < panel.view.line.length;
    if (!panel.pinned) inside ? show(place) : hide();
  };
  panel.onpointerleave = panel.onblur = () => panel.pinned || hide();
  panel.onfocus = () => panel.matches(":focus-visible") && show(panel.at ?? panel.view.line.peak.place);
  panel.onclick = (event) => (panel.pinned || show(under(event)), pin());
  panel.onkeydown = (event) => {
    const at = panel.at ?? 0, far = Math.ceil(panel.view.line.length / 20);
    const next = { ArrowLeft: at - 1, ArrowRight: at + 1, PageUp: at + far, PageDown: at - far,
      Home: 0, End: panel.view.line.length - 1 }[event.key];
    if (next !== undefined) show(next);
    else if (event.key === "Enter") pin();
    else if (event.key === "Escape") hide();
    else return;
    event.preventDefault();
  };
  panel.again = () => panel.pinned && show(panel.at);
}

// A page that is not secure, or not trusted, can still copy what is selected.
async function copy(words) {
  try {
    await navigator.clipboard.writeText(words);
    return true;
  } catch {
    const field = Object.assign(document.createElement("textarea"), { value: words });
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}

function save(name, data) {
  const href = URL.createObjectURL(new Blob([data], { type: "image/png" }));
  Object.assign(document.createElement("a"), { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10000);
}

function render({ model, el }) {
  const grid = document.createElement("div"), note = document.createElement("div");
  const timeline = { role: "group", "aria-roledescription": "timeline", tabindex: 0 };
  const group = { role: "group" }, figure = { role: "figure" }, image = { role: "img" };
  const looks = { before: timeline, after: timeline, peaks: image, times: figure, tried: group };
  const panels = Object.fromEntries(Object.entries(looks).map(([name, look]) =>
    [name, draw("svg", { class: name, ...look })]));
  panels.tried.setAttribute("aria-label", "every plan tried");
  grid.className = "grid";
  note.className = "note";
  note.setAttribute("aria-live", "polite"); // it is read aloud as the keys move
  note.hidden = true;
  const button = (kind, words, work) => {
    const look = { className: `choice ${kind}`, textContent: words, onclick: work, hidden: true };
    return Object.assign(document.createElement("button"), look);
  };
  const keep = button("after", "compare with this", () => compare(shown.now));
  const back = button("before", "compare with none", () => compare(shown.none));
  grid.append(...Object.values(panels), back, keep, note);
  grid.dataset.lmSuppressShortcuts = "true"; // JupyterLab leaves the keys to the picture
  el.replaceChildren(grid);
  let shown = {};

  const tell = (panel, at, lines, foot) => {
    note.hidden = !panel;
    if (!panel) return;
    const entry = (words, kind) =>
      Object.assign(document.createElement("div"), { textContent: words, className: kind });
    note.replaceChildren(...lines.map((words, i) => entry(words, i ? "" : "head")), entry(foot, "foot"));
    const box = panel.getBoundingClientRect(), around = grid.getBoundingClientRect();
    const x = box.left - around.left + at.cx, y = box.top - around.top + at.cy;
    const left = x > around.width / 2 ? x - 14 - note.offsetWidth : x + 14;
    const most = around.width - note.offsetWidth, lowest = around.height - note.offsetHeight;
    note.style.left = `${Math.max(0, Math.min(most, left))}px`;
    note.style.top = `${Math.max(0, Math.min(lowest, y))}px`;
  };
  const choose = (place) => model.send({ bring_back: place });
  const compare = (place) => model.send({ compare: place });
  for (const name of ["before", "after"]) inspectable(panels[name], tell, () => shown);

  let drawn = [], lines = [], latest = 0;
  const packed = {}, unpacked = {}; // by name; what has not changed is kept
  const take = async (name) => {
    const sent = model.get(name);
    if (packed[name] !== sent) [packed[name], unpacked[name]] = [sent, unpack(sent)];
    return unpacked[name];
  };
  const show = async () => {
    const mine = ++latest, parts = ["before", "after", "shown", "names"].map(take);
    const [before, after, now, names] = await Promise.all(parts);
    if (mine !== latest) return; // a later one is on its way
    [lines, shown] = [[before, after].map(laid), { ...now, texts: names.concat(after.names) }];
    paint();
  };
  const paint = () => {
    const now = shown;
    grid.hidden = !now.finding;
    panels.peaks.setAttribute("aria-label", now.finding); // also where it has no size yet
    if (!now.finding || !panels.after.room?.width) return;
    const most = Math.max(...lines.map((line) => line.peak.bytes), ...now.tried.map((one) => one.peak));
    const near = now.limit && now.limit.bytes < 2.5 * most ? now.limit.bytes : 0;
    const high = 1.16 * Math.max(most, near), [size, unit] = unitOf(Math.max(most, near));
    const length = Math.max(1.32 * lines[0].length, lines[1].length);
    const scale = { bytes: high, top: high / size, size, unit, length };
    const hues = now.categories.map((name) => model.get("colors")[name]);
    const look = [lines[0], high, length, panels.before.room];
    if (look.some((one, i) => one !== drawn[i])) // most flips leave it as it is
      drawTimeline(panels.before, lines[0], { ...now, limit: null }, scale, hues);
    drawn = look;
    drawTimeline(panels.after, lines[1], now, scale, hues);
    drawPeaks(panels.peaks, lines, now, scale, hues);
    drawTimes(panels.times, now);
    drawTried(panels.tried, now, scale, choose, compare, tell);
    for (const [one, other, needless] of [[back, keep, now.compared === now.none],
      [keep, back, now.compared === now.now]]) {
      const focused = one === document.activeElement;
      one.hidden = needless;
      if (focused && needless) other.focus();
    }
    for (const name of ["before", "after"]) panels[name].again();
  };
  const sizes = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) target.room = contentRect;
    paint();
  });
  for (const panel of Object.values(panels)) sizes.observe(panel);
  // Said for some seconds where the click was.
  const answer = (name, words) => {
    const all = [...(el.closest(".layer-lab")?.querySelectorAll("button") ?? [])];
    const button = all.find((one) => one.textContent === name);
    if (!button) return; // it is being said there
    button.textContent = words;
    button.setAttribute("aria-live", "polite");
    setTimeout(() => (button.textContent = name), 2500);
  };
  const hear = async (message, buffers) => {
    if ("copy" in message) answer(message.from, (await copy(message.copy)) ? "copied" : "not copied");
    if ("save" in message) save(message.save, buffers[0]);
  };
  model.on("change", show);
  model.on("msg:custom", hear);
  show();
  return () => (sizes.disconnect(), model.off("change", show), model.off("msg:custom", hear));
}

export default { render };
