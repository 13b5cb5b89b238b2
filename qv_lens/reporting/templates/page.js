(() => {
  const all = (query, root = document) => [...root.querySelectorAll(query)];
  const byId = (id) => document.getElementById(id);
  document.documentElement.classList.add("js");

  // ---- downloads
  const layouts = new Map(); // each picture's layout as it was made
  const onPaper = (plot) => { // as it is zoomed now, in the colours and margins in which it was made
    const layout = structuredClone(plot.layout), before = layouts.get(plot) ?? layout;
    Object.assign(layout, { font: before.font, title: before.title, margin: before.margin });
    for (const axis of axes(layout))
      Object.assign(layout[axis], { gridcolor: before[axis]?.gridcolor, zerolinecolor: before[axis]?.zerolinecolor });
    return layout;
  };
  const axes = (layout) => Object.keys(layout).filter((name) => /^[xy]axis\d*$/.test(name));
  const save = (name, type, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  };
  const button = (words, told, act) => {
    const made = document.createElement("button");
    made.type = "button";
    made.className = "save";
    made.textContent = words;
    made.setAttribute("aria-label", told);
    made.addEventListener("click", act);
    return made;
  };
  const quoted = (text) => `"${String(text).replaceAll('"', '""')}"`;
  const csv = (table) => {
    const heads = all("thead th", table).map((head) => quoted(head.textContent));
    const rows = all("tbody tr", table).map((row) => all("th, td", row).map((at) => quoted(at.dataset.value ?? at.textContent)).join(","));
    return [...(heads.length ? [heads.join(",")] : []), ...rows].join("\n") + "\n";
  };
  for (const table of all("table[data-name]"))
    (table.caption || table.createCaption()).append(button("CSV", `Download the table ${table.dataset.name}`, () =>
      save(`${table.dataset.name}.csv`, "text/csv", csv(table))));
  for (const figure of all(".figure")) {
    const plot = figure.querySelector(".plotly-graph-div");
    figure.prepend(button("SVG", `Download the picture ${figure.dataset.name}`, () =>
      Plotly.downloadImage({ data: plot.data, layout: onPaper(plot) },
        { format: "svg", filename: figure.dataset.name, width: 900, height: plot.clientHeight })));
  }

  // ---- pictures: light or dark, and room for the legend where it takes several lines
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coloured = () => {
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink").trim(), grid = style.getPropertyValue("--grid").trim();
    for (const plot of all(".plotly-graph-div")) {
      if (!layouts.has(plot)) layouts.set(plot, structuredClone(plot.layout));
      Plotly.Plots.resize(plot); // drawn before its place had its width
      const change = { "font.color": ink, "title.font.color": ink };
      for (const axis of axes(plot.layout)) {
        change[`${axis}.gridcolor`] = grid;
        change[`${axis}.zerolinecolor`] = grid;
      }
      const names = plot.data.filter((trace) => trace.name && trace.showlegend !== false).length;
      if (plot.clientWidth < 600 && names > 1) change["margin.b"] = 60 + 22 * names;
      Plotly.relayout(plot, change);
    }
  };
  if (all(".plotly-graph-div").length) addEventListener("load", coloured);
  dark.addEventListener("change", coloured);

  // ---- attention, on demand
  const data = byId("attention-data");
  if (data) {
    const { weights, tokens } = JSON.parse(data.textContent);
    const layer = byId("attention-layer"), head = byId("attention-head"), strip = byId("attention-strip");
    const fill = (select, count) => { for (let i = 0; i < count; i++) select.add(new Option(i, i)); };
    fill(layer, weights.length);
    fill(head, weights[0].length);
    const draw = () => {
      strip.replaceChildren(...tokens.map((token, i) => {
        const share = weights[layer.value][head.value][i];
        const span = document.createElement("span"), small = document.createElement("small");
        span.style.background = `rgba(42,111,219,${(0.7 * share).toFixed(2)})`;
        span.textContent = token;
        small.textContent = `${(100 * share).toFixed(1)}%`;
        span.append(small);
        return span;
      }));
    };
    layer.addEventListener("change", draw);
    head.addEventListener("change", draw);
    layer.value = weights.length - 1;
    draw();
  }

  // ---- the pathway
  const svg = byId("pathway-drawing");
  if (!svg) return;
  const nodes = all(".node", svg), edges = all(".edge", svg), pinned = new Map();
  const nodeOf = (id) => nodes.find((node) => node.dataset.node === id);
  svg.parentElement.prepend(button("SVG", "Download the pathway", () =>
    save("pathway.svg", "image/svg+xml", new XMLSerializer().serializeToString(svg))));

  let marked = null; // the node whose card is shown
  const tellEdges = () => {
    const hidden = edges.filter((edge) => edge.classList.contains("lit") && edge.classList.contains("gone")).length;
    byId("least-told").textContent = `${Math.round(100 * byId("least").value)}% of the heaviest: ${edges.filter((edge) => !edge.classList.contains("gone")).length} shown`
      + (marked && hidden ? `, ${hidden} of the marked neuron's hidden` : "");
  };
  const select = (id) => {
    svg.classList.toggle("asked", Boolean(id));
    for (const edge of edges)
      edge.classList.toggle("lit", edge.dataset.source === id || edge.dataset.target === id);
    const near = new Set(edges.filter((edge) => edge.classList.contains("lit")).flatMap((edge) => [edge.dataset.source, edge.dataset.target]));
    for (const node of nodes) {
      node.classList.toggle("selected", node.dataset.node === id);
      node.classList.toggle("near", node.dataset.node === id || near.has(node.dataset.node));
    }
    for (const card of all(".neuron")) card.classList.toggle("shown", card.id === `neuron-${id}`);
    all(".cards")[0].scrollTop = 0;
    marked = id;
    tellEdges();
    history.replaceState(null, "", id ? `#neuron-${id}` : location.pathname);
  };
  document.addEventListener("click", (event) => {
    const link = event.target.closest("[data-node]");
    if (!link) return;
    event.preventDefault();
    const id = link.dataset.node;
    select(id);
    if (!link.closest("#graph")) byId("graph").scrollIntoView({ block: "start" });
    nodeOf(id)?.focus({ preventScroll: true });
  });
  // the next node in the direction of an arrow: the nearest, distance across the arrow counting double
  const directions = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && marked) select(null); });
  svg.addEventListener("keydown", (event) => {
    const node = event.target.closest(".node");
    if (!node) return;
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); return select(node.dataset.node); }
    const way = directions[event.key];
    if (!way) return;
    event.preventDefault();
    let best = null, least = Infinity;
    for (const other of nodes) {
      const x = other.dataset.x - node.dataset.x, y = other.dataset.y - node.dataset.y;
      const along = x * way[0] + y * way[1], across = Math.abs(x * way[1]) + Math.abs(y * way[0]);
      if (along > 1 && !other.classList.contains("gone") && along + 2 * across < least) { least = along + 2 * across; best = other; }
    }
    if (!best) return;
    best.focus({ preventScroll: true });
    select(best.dataset.node);
    // on a narrow screen the card lies over the lower part of the window
    const hidden = best.getBoundingClientRect().bottom - innerHeight * (innerWidth > 900 ? 1 : 0.66);
    if (hidden > 0) scrollBy(0, hidden);
  });

  // filters
  const least = byId("least"), lowest = byId("lowest"), highest = byId("highest");
  const layers = nodes.map((node) => Number(node.dataset.layer));
  lowest.value = lowest.min = highest.min = Math.min(...layers);
  highest.value = highest.max = lowest.max = Math.max(...layers);
  const filter = () => {
    const roles = all(".role:checked").map((box) => box.value);
    const low = lowest.value === "" ? -Infinity : Math.min(lowest.value, Math.max(...layers));
    const high = highest.value === "" ? Infinity : Math.max(highest.value, Math.min(...layers));
    const there = new Set();
    for (const node of nodes) {
      const layer = Number(node.dataset.layer);
      const stays = layer >= low && layer <= high && roles.includes(node.dataset.role);
      node.classList.toggle("gone", !stays);
      if (stays) there.add(node.dataset.node);
    }
    for (const edge of edges) {
      const stays = Number(edge.dataset.share) >= Number(least.value) && there.has(edge.dataset.source) && there.has(edge.dataset.target);
      edge.classList.toggle("gone", !stays);
    }
    tellEdges();
  };
  for (const input of all(".filters input")) input.addEventListener("input", filter);
  filter();
  if (location.hash.startsWith("#neuron-")) select(decodeURIComponent(location.hash.slice(8)));

  // pins
  const python = () => `qv.NeuronSet.of([${[...new Set(pinned.values())].join(", ")}])`;
  const tell = () => {
    all(".pins")[0].hidden = pinned.size === 0;
    byId("pinned").textContent = [...pinned.keys()].join(", ");
    byId("pinned-code").textContent = python();
    byId("copied").textContent = "";
  };
  for (const card of all(".neuron")) {
    const id = card.id.slice("neuron-".length), pin = card.querySelector(".pin");
    pin.addEventListener("click", () => {
      if (!pinned.delete(id)) pinned.set(id, card.dataset.unit);
      pin.textContent = pinned.has(id) ? "Unpin" : "Pin";
      nodeOf(id).classList.toggle("pinned", pinned.has(id));
      card.classList.toggle("kept", pinned.has(id)); // its card stays, to be compared with others
      for (const edge of edges)
        edge.classList.toggle("kept", pinned.has(edge.dataset.source) || pinned.has(edge.dataset.target));
      tell();
    });
    card.querySelector(".close").addEventListener("click", () => {
      if (pinned.has(id)) pin.click();
      select(null);
    });
    const rows = card.querySelector(".rows");
    const found = all(`[id$="-${rows.dataset.neuron}"]`).filter((row) => row.closest("table[data-name]"));
    if (found.length) rows.append("In the tables: ", ...found.flatMap((row) => {
      const link = document.createElement("a");
      link.href = `#${row.id}`;
      link.textContent = row.closest("table").dataset.name.replaceAll("-", " ");
      return [link, " "];
    }));
  }
  byId("copy").addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(python()); byId("copied").textContent = "copied"; }
    catch { byId("copied").textContent = "select the line below and copy it"; }
  });
})();
