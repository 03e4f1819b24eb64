// The load page: figures of now, and charts of the last minutes.

import { formatValue, LineChart } from "./chart.js";
import { byId, element, plural } from "./dom.js";
import { CHARTS, History, SPAN } from "./history.js";

function duration(seconds) {
  const minutes = Math.floor(seconds / 60);
  if (minutes < 1) return `${Math.floor(seconds)} s`;
  if (minutes < 60) return `${minutes} min`;
  if (minutes < 48 * 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return `${Math.floor(minutes / 60 / 24)} days`;
}

/** Return [name, value] of what has happened since the server began. */
function totalsOf(stats) {
  const count = (value) => (value ?? 0).toLocaleString("en");
  const totals = [
    ["Up for", duration(stats.uptime_seconds ?? 0)],
    ["Texts finished", count(stats.num_finished)],
    ["Tokens generated", count(stats.num_generated_tokens)],
    ["Prompt tokens", count(stats.num_prompt_tokens)],
    ["Last step", `${formatValue(stats.step_seconds, "s")}, ${plural(stats.step_tokens, "token")}`],
    ["Preemptions", count(stats.num_preemptions)],
  ];
  if (stats.num_drafted_tokens) {
    const share = (100 * stats.num_accepted_tokens) / stats.num_drafted_tokens;
    totals.push(["Draft tokens accepted", `${share.toFixed(0)} %`]);
  }
  return totals;
}

export class LoadPage {
  #history = new History();
  #charts;

  constructor() {
    const pointed = (secondsAgo) => {
      for (const { chart } of this.#charts) chart.setCrosshair(secondsAgo);
    };
    this.#charts = CHARTS.map((spec) => ({ spec, chart: new LineChart(spec, { span: SPAN, pointed }) }));
    byId("charts").append(...this.#charts.map(({ chart }) => chart.node));
  }

  /** Take what /v1/stats said now, asked at a time in seconds; hasExperts: the model is a mixture of experts. */
  add(stats, hasExperts, asked) {
    const now = performance.now() / 1000;
    this.#history.add(now, stats, asked);
    for (const { spec, chart } of this.#charts) {
      chart.node.hidden = spec.forExperts === true && !hasExperts;
      if (!byId("load-page").hidden) chart.setPoints(spec.points(this.#history), now);
    }
    byId("totals").replaceChildren(
      ...totalsOf(stats).map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
    );
  }

  /** Draw what came while another page was shown. */
  refresh() {
    if (!this.#history.latest) return;
    const now = performance.now() / 1000;
    for (const { spec, chart } of this.#charts) chart.setPoints(spec.points(this.#history), now);
  }
}
