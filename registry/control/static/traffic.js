// Draws the charts, and requests newer figures every two seconds. Without JavaScript the page shows
// only the table, with the figures of the moment at which the server made the page.
"use strict";

const POLL_MS = 2000;
const MAX_POLL_MS = 60000;
const CHART_HEIGHT_PX = 150;
const charts = document.getElementById("charts");
const traffic = document.getElementById("traffic");
let plots = []; // one for each chart
let drawn = ""; // the versions, colours and width that `plots` were made for
let failures = 0;

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rounded = (value) => (value == null ? "–" : String(Number(value.toPrecision(3))));
const ago = (second) => (second === 0 ? "now" : `${second} s`);

function makeFigure(chart) {
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  caption.textContent = `${chart.title}, ${chart.unit}`;
  figure.append(caption);
  return figure;
}

function makePlot(chart, data, figure) {
  const axis = { stroke: css("--quiet"), grid: { stroke: css("--line"), width: 1 }, ticks: { show: false } };
  const colours = { champion: css("--accent"), challenger: css("--second") };
  const styles = getComputedStyle(figure);
  const width = figure.clientWidth - parseFloat(styles.paddingLeft) - parseFloat(styles.paddingRight);
  return new uPlot({
    width,
    height: CHART_HEIGHT_PX,
    scales: {
      x: { time: false },
      y: { range: (_, __, top) => [0, top > 0 ? 1.1 * top : 1] },
    },
    axes: [
      { ...axis, size: 24, values: (_, seconds) => seconds.map(ago) },
      { ...axis, size: 46, values: (_, values) => values.map(rounded) },
    ],
    series: [
      { label: "time", value: (_, second) => (second == null ? "–" : ago(second)) },
      ...chart.series.map(({ role, version }) => ({
        label: `${role} ${version}`,
        stroke: colours[role],
        width: 2,
        spanGaps: true,
        value: (_, value) => `${rounded(value)} ${chart.unit}`,
      })),
    ],
    cursor: { sync: { key: "traffic" }, drag: { setScale: false, x: false, y: false } },
  }, data, figure);
}

// Shows the newest values in the legend while the pointer is elsewhere.
function showNewest(plot) {
  if (plot.cursor.idx == null) plot.setLegend({ idx: plot.data[0].length - 1 });
}

function draw() {
  const series = document.getElementById("series");
  if (series === null) { // a service did not answer, so the table is missing, too
    charts.replaceChildren();
    plots = [];
    drawn = "";
    return;
  }
  const figures = JSON.parse(series.textContent);
  const data = figures.charts.map((chart) => [figures.seconds, ...chart.series.map((each) => each.values)]);
  const versions = figures.charts[0].series.map(({ role, version }) => `${role} ${version}`);
  const wanted = [charts.clientWidth, css("--paper"), ...versions].join();
  if (wanted === drawn) {
    plots.forEach((plot, index) => plot.setData(data[index]));
    plots.forEach(showNewest);
    return;
  }
  plots.forEach((plot) => plot.destroy());
  const places = figures.charts.map(makeFigure);
  charts.replaceChildren(...places); // add all before measuring one, because they share the width
  plots = figures.charts.map((chart, index) => makePlot(chart, data[index], places[index]));
  plots.forEach(showNewest);
  drawn = wanted;
}

async function refresh() {
  if (!document.hidden) {
    try {
      const answer = await fetch(traffic.dataset.from, { credentials: "same-origin", redirect: "error" });
      if (answer.ok) {
        traffic.innerHTML = await answer.text();
        draw();
        failures = 0;
      }
    } catch {
      failures += 1;
    }
  }
  setTimeout(refresh, Math.min(POLL_MS * 2 ** failures, MAX_POLL_MS));
}

draw();
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
setTimeout(refresh, POLL_MS);
