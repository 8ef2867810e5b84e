// Draws the plots, and draws them again when the colours change. A colour in a figure is `$name`: the variable `--name`.
(() => {
  "use strict";
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const THEMES = ["auto", "light", "dark"];
  const PRINT_WIDTH_PX = 1000; // A4 on its side
  const PRINT_HEIGHT_PX = 520;
  const CONFIG = { displayModeBar: false, responsive: true };
  const TEXTS = new Set(["text", "name", "legendgroup", "hovertemplate", "x", "y", "meta"]); // may come from outside, and start with a dollar
  const hidden = new Map(); // section or details element -> names of its keys that are off

  const stored = () => {
    const asked = new URLSearchParams(location.search).get("theme");
    if (THEMES.includes(asked)) return asked;
    try {
      return localStorage.getItem("penstock-theme") || "auto";
    } catch {
      return "auto"; // no storage for local files in some browsers
    }
  };
  let theme = stored();

  const paint = (value, style) => {
    if (typeof value === "string") return value.startsWith("$") ? style.getPropertyValue("--" + value.slice(1)).trim() : value;
    if (Array.isArray(value)) return value.some((item) => typeof item === "object" || typeof item === "string") ? value.map((item) => paint(item, style)) : value;
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, TEXTS.has(name) ? item : paint(item, style)]));
    return value;
  };

  const off = (plot) => hidden.get(plot.closest(".part")) || new Set();
  const draw = (plot, width) => {
    const style = getComputedStyle(root);
    const figure = figures[plot.dataset.figure];
    const data = paint(figure.data, style).map((trace, i) => {
      const keys = [figure.data[i].legendgroup, figure.data[i].meta];
      return { ...trace, visible: !keys.some((name) => name && off(plot).has(name)) };
    });
    const layout = { ...paint(figure.layout, style), height: width ? Math.min(plot.clientHeight, PRINT_HEIGHT_PX) : plot.clientHeight, autosize: !width, uirevision: "zoom" };
    if (width) layout.width = width;
    return Plotly.react(plot, data, layout, CONFIG);
  };
  const plots = () => [...document.querySelectorAll(".plot")];
  const drawn = () => plots().filter((plot) => plot.dataset.drawn);
  const drawInside = (element) =>
    element.querySelectorAll(".plot").forEach((plot) => {
      if (plot.dataset.drawn || (plot.closest("details") && !plot.closest("details").open)) return;
      plot.dataset.drawn = "yes";
      draw(plot);
    });

  const button = document.getElementById("theme");
  const show = () => {
    root.dataset.theme = theme === "auto" ? (dark.matches ? "dark" : "light") : theme;
    button.textContent = "Theme: " + theme;
    drawn().forEach((plot) => draw(plot));
  };
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    try {
      localStorage.setItem("penstock-theme", theme);
    } catch {
      // it lasts as long as the page, then
    }
    show();
  });
  dark.addEventListener("change", show);

  document.querySelectorAll(".keys button").forEach((key) =>
    key.addEventListener("click", () => {
      const part = key.closest(".part");
      const names = hidden.get(part) || new Set();
      const on = key.getAttribute("aria-pressed") === "false";
      key.setAttribute("aria-pressed", String(on));
      if (on) names.delete(key.dataset.key);
      else names.add(key.dataset.key);
      hidden.set(part, names);
      part.querySelectorAll(".plot").forEach((plot) => plot.dataset.drawn && draw(plot));
    }),
  );
  document.querySelectorAll("details").forEach((one) => one.addEventListener("toggle", () => one.open && drawInside(one)));

  window.addEventListener("beforeprint", () => {
    root.dataset.theme = "light";
    drawn().forEach((plot) => draw(plot, plot.closest(".columns-2") ? (PRINT_WIDTH_PX - 32) / 2 : PRINT_WIDTH_PX));
  });
  window.addEventListener("afterprint", show);

  show();
  drawInside(document);
})();
