"use strict";
(() => {
  const { charts, styles, pairs, same } = JSON.parse(document.getElementById("data").textContent);
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const option = (value) => Object.assign(document.createElement("option"), { value, textContent: value });

  // Tables: a click on a head sorts by its column; missing values are always last

  const value = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value === undefined) return cell.textContent.trim();
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };

  const sort = (table, column, descending) => {
    const body = table.tBodies[0];
    const rows = [...body.rows].sort((one, other) => {
      const [a, b] = [value(one, column), value(other, column)];
      if (a === null || b === null) return (a === null) - (b === null);
      const order = typeof a === "number" ? a - b : a.localeCompare(b);
      return descending ? -order : order;
    });
    body.append(...rows);
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const descending = head.getAttribute("aria-sort") !== "descending" && column > 0;
        const again = head.getAttribute("aria-sort") === "ascending" && column === 0;
        for (const other of heads) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", descending || again ? "descending" : "ascending");
        sort(table, column, descending || again);
      });
    });
  }

  // Tests: any two methods

  const signed = (points) => `${points < 0 ? "−" : "+"}${Math.abs(points).toFixed(1)}`;

  const interval = ([low, high], turned) =>
    (turned ? [-high, -low] : [low, high]).map((end) => (100 * end).toFixed(1).replace("-", "−")).join(" to ");

  const tell = (first, second) => {
    const turned = pairs[`${first}|${second}`] === undefined;
    const pair = pairs[turned ? `${second}|${first}` : `${first}|${second}`];
    if (first === second) return "Choose two methods.";
    if (!pair) return `These two methods have no runs with the same ${same}.`;
    const difference = 100 * (turned ? -pair.difference : pair.difference);
    const within = pair.interval ? ` (${interval(pair.interval, turned)})` : "";
    const overPairs = `p = ${pair.p_pairs} over ${pair.pairs} pairs (at least ${pair.smallest_pairs})`;
    const overDatasets = pair.p_datasets
      ? `p = ${pair.p_datasets} over ${pair.datasets} datasets (at least ${pair.smallest_datasets})`
      : "one dataset allows no conclusion about others";
    return `${first} − ${second}: ${signed(difference)} points${within}. ${overPairs}; ${overDatasets}.`.replaceAll("= <", "<");
  };

  const startPairs = () => {
    const form = document.getElementById("pair");
    if (!form) return;
    const keys = Object.keys(pairs);
    const methods = Object.keys(styles).filter((name) =>
      keys.some((key) => key.startsWith(`${name}|`) || key.endsWith(`|${name}`)));
    const result = document.getElementById("pair-result");
    for (const select of form.querySelectorAll("select")) select.append(...methods.map(option));
    form.elements.first.selectedIndex = Math.min(1, methods.length - 1);
    form.elements.second.selectedIndex = 0;
    const show = () => { result.textContent = tell(form.elements.first.value, form.elements.second.value); };
    form.addEventListener("change", show);
    form.hidden = result.hidden = false;
    show();
  };

  // Charts: the choices in the selects above a chart form the key of its figure

  const themed = (figure) => {
    const layout = structuredClone(figure.layout);
    layout.font = { ...layout.font, color: color("--ink"), family: "system-ui, sans-serif", size: 12 };
    layout.hoverlabel = { bgcolor: color("--raised"), bordercolor: color("--line"), font: { color: color("--ink") } };
    for (const key of Object.keys(layout).filter((name) => /^[xy]axis/.test(name))) {
      const lines = { gridcolor: color("--grid"), linecolor: color("--line"), zerolinecolor: color("--grid") };
      layout[key] = { automargin: true, tickcolor: color("--line"), ...layout[key], ...lines };
    }
    return layout;
  };

  const startChart = (section) => {
    const figures = charts[section.dataset.chart];
    // A method's name may contain a bar; the part after the last bar never does
    const keys = Object.keys(figures).map((key) => [key.slice(0, key.lastIndexOf("|")), key.split("|").at(-1)]);
    if (!keys.length) return;
    section.hidden = false;
    const plot = section.querySelector(".plot");
    const legend = section.querySelector(".legend");
    const hiddenMethods = new Set();
    const selects = section.dataset.labels.split("|").map((name) => {
      const label = document.createElement("label");
      const select = document.createElement("select");
      label.append(`${name} `, select);
      section.querySelector(".selects").append(label);
      return select;
    });
    const fill = (select, values) => {
      const before = select.value;
      select.replaceChildren(...values.map(option));
      if (values.includes(before)) select.value = before;
    };
    const draw = () => {
      fill(selects[1], keys.filter(([first]) => first === selects[0].value).map(([, second]) => second));
      const figure = figures[`${selects[0].value}|${selects[1].value}`];
      const data = figure.data.map((trace) => ({ ...trace, visible: !hiddenMethods.has(trace.meta) }));
      const wide = data.length * 110; // heat maps side by side
      plot.style.minWidth = data[0]?.type === "heatmap" ? `${wide + 180}px` : "";
      Plotly.react(plot, data, themed(figure), { responsive: true, displayModeBar: false });
      const methods = [...new Set(data.map((trace) => trace.meta).filter(Boolean))];
      legend.replaceChildren(...methods.map((method) => {
        const button = Object.assign(document.createElement("button"), { type: "button" });
        const swatch = Object.assign(document.createElement("span"), { className: "swatch" });
        swatch.style.background = styles[method].color;
        button.append(swatch, method);
        button.setAttribute("aria-pressed", String(!hiddenMethods.has(method)));
        button.addEventListener("click", () => {
          if (!hiddenMethods.delete(method)) hiddenMethods.add(method);
          button.setAttribute("aria-pressed", String(!hiddenMethods.has(method)));
          Plotly.restyle(plot, { visible: data.map((trace) => !hiddenMethods.has(trace.meta)) });
        });
        return button;
      }));
    };
    fill(selects[0], [...new Set(keys.map(([first]) => first))]);
    for (const select of selects) select.addEventListener("change", draw);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    draw();
  };

  // plotly's script is compressed to a third of its size

  const startCharts = async () => {
    const packed = Uint8Array.from(atob(document.getElementById("library").textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    document.querySelectorAll("section.chart").forEach(startChart);
    document.documentElement.dataset.ready = "true";
  };

  startPairs();
  startCharts();
})();
