// Charts take the page's text colour, also when the reader switches between light and dark.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const paint = () => {
    const page = getComputedStyle(document.documentElement);
    const ink = page.getPropertyValue("--ink").trim();
    const font = getComputedStyle(document.body).fontFamily;
    for (const chart of document.querySelectorAll(".plotly-graph-div")) {
      Plotly.relayout(chart, {
        "font.color": ink, "font.family": font,
        "hoverlabel.bgcolor": page.getPropertyValue("--card").trim(), "hoverlabel.font.color": ink,
      });
    }
  };
  paint();
  dark.addEventListener("change", paint);
})();
