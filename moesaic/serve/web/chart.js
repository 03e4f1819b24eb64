// A line chart over the last minutes, in SVG.

import { drawing, element } from "./dom.js";

const HEIGHT = 150;
const LEFT = 46;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 20;

/** Return a round number at least as large: 1, 2, 2.5 or 5 times a power of ten. */
export function roundUp(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((round) => round >= value * (1 - 1e-9));
}

/** Return a value as a reader wants it: three digits, seconds below one as milliseconds. */
export function formatValue(value, unit) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return unit === "s" || unit === "" ? "0" : `0 ${unit}`;
  if (unit === "s" && value < 1) return `${digits(1000 * value)} ms`;
  return `${digits(value)}${unit === "" ? "" : ` ${unit}`}`;
}

/** Return a value as an axis has room for it: from a hundred thousand on as "250K". */
function formatTick(value, unit, most) {
  if (unit === "s" || most < 1e5) return formatValue(value, unit);
  return value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 3 });
}

function digits(value) {
  const places = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))));
  return value.toLocaleString("en", { maximumFractionDigits: Math.min(places, 3) });
}

/**
 * One chart with its title, its legend (which also tells the values at the crosshair) and `span` seconds of lines.
 * pointed(secondsAgo or null) is called when the reader points into it.
 */
export class LineChart {
  #spec;
  #span;
  #points = [];
  #now = 0;
  #crosshair = null;
  #width = 0;
  #values;
  #frame;
  #svg;

  constructor(spec, { span, pointed }) {
    this.#spec = spec;
    this.#span = span;
    this.#svg = drawing("svg", { role: "img", tabindex: 0, "aria-labelledby": `chart-${spec.id}` });
    this.#frame = element("div", { class: "plot" }, this.#svg);
    this.#values = spec.lines.map(() => element("b"));
    const legend = spec.lines.map((line, index) =>
      element(
        "span",
        { class: "key" },
        drawing(
          "svg",
          { width: 22, height: 8, "aria-hidden": "true" },
          drawing("path", { class: `line line-${index}`, d: "M1 4H21" }),
        ),
        spec.lines.length > 1 ? `${line} ` : "",
        this.#values[index],
      ),
    );
    this.node = element(
      "figure",
      { class: "chart", id: `figure-${spec.id}` },
      element(
        "figcaption",
        {},
        element("h3", { id: `chart-${spec.id}` }, spec.title),
        element("p", { class: "keys" }, ...legend),
      ),
      this.#frame,
    );
    this.#svg.addEventListener("pointermove", (event) => pointed(this.#agoAt(event.offsetX)));
    this.#svg.addEventListener("pointerleave", () => pointed(null));
    this.#svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: 1, ArrowRight: -1, PageUp: 30, PageDown: -30 }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      pointed(Math.min(Math.max((this.#crosshair ?? 0) + step, 0), span));
    });
    this.#svg.addEventListener("blur", () => pointed(null));
    new ResizeObserver(() => {
      if (this.#frame.clientWidth === this.#width) return;
      this.#width = this.#frame.clientWidth;
      this.#draw();
    }).observe(this.#frame);
  }

  /** Show these points, {time, values}, as of `now`, in seconds. */
  setPoints(points, now) {
    this.#points = points;
    this.#now = now;
    this.#draw();
  }

  /** Put the crosshair so many seconds before now; null takes it away. */
  setCrosshair(secondsAgo) {
    this.#crosshair = secondsAgo;
    this.#draw();
  }

  #agoAt(x) {
    const inside = (x - LEFT) / (this.#width - LEFT - RIGHT);
    return inside < 0 || inside > 1 ? null : (1 - inside) * this.#span;
  }

  #x(time) {
    return LEFT + (1 - (this.#now - time) / this.#span) * (this.#width - LEFT - RIGHT);
  }

  #draw() {
    const spec = this.#spec;
    const shown = this.#points.filter(({ time }) => time >= this.#now - this.#span);
    const at = this.#crosshair === null ? shown.at(-1) : nearest(shown, this.#now - this.#crosshair);
    for (const [index, value] of this.#values.entries())
      value.textContent = formatValue(at?.values[index] ?? null, spec.unit);
    if (!this.#width) return;
    const values = shown.flatMap((point) => point.values).filter((value) => value !== null);
    const most = spec.most ?? roundUp(Math.max(0, ...values));
    const y = (value) => TOP + (1 - value / most) * (HEIGHT - TOP - BOTTOM);
    const parts = [...this.#axes(most, y)];
    for (const index of spec.lines.keys()) {
      const line = pathOf(
        shown,
        index,
        (time) => this.#x(time).toFixed(1),
        (value) => y(value).toFixed(1),
      );
      if (line) parts.push(drawing("path", { class: `line line-${index}`, d: line }));
    }
    if (!values.length) {
      const middle = (this.#width + LEFT - RIGHT) / 2;
      const text = spec.empty && shown.length ? spec.empty : "Waiting for figures…";
      parts.push(drawing("text", { class: "nothing", x: middle, y: HEIGHT / 2 - 4 }, text));
    } else if (this.#crosshair !== null && at) {
      parts.push(
        drawing("path", { class: "crosshair", d: `M${this.#x(at.time).toFixed(1)} ${TOP}V${HEIGHT - BOTTOM}` }),
      );
      for (const [index, value] of at.values.entries()) {
        if (value !== null)
          parts.push(drawing("circle", { class: `dot dot-${index}`, cx: this.#x(at.time), cy: y(value), r: 3 }));
      }
    }
    this.#svg.setAttribute("viewBox", `0 0 ${this.#width} ${HEIGHT}`);
    this.#svg.setAttribute("width", this.#width);
    this.#svg.setAttribute("height", HEIGHT);
    this.#svg.replaceChildren(...parts);
  }

  *#axes(most, y) {
    for (const value of [0, most / 2, most]) {
      yield drawing("path", { class: "grid", d: `M${LEFT} ${Math.round(y(value)) + 0.5}H${this.#width - RIGHT}` });
      yield drawing(
        "text",
        { class: "tick at-left", x: LEFT - 6, y: y(value) },
        formatTick(value, this.#spec.unit === "tokens/s" ? "" : this.#spec.unit, most),
      );
    }
    const minutes = this.#span / 60;
    for (let minute = minutes; minute >= 0; minute--) {
      const x = this.#x(this.#now - 60 * minute);
      const text = minute === 0 ? "now" : `−${minute} min`;
      const side = minute === 0 ? "at-end" : minute === minutes ? "at-start" : "";
      // On a phone every second label would touch its neighbours.
      if (this.#width < 420 && minute % 2 !== minutes % 2 && minute !== 0) continue;
      if (this.#width < 420 && minute === 1) continue;
      yield drawing("text", { class: `tick below ${side}`, x, y: HEIGHT - 5 }, text);
    }
  }
}

function nearest(points, time) {
  let best = null;
  for (const point of points) {
    if (point.values.every((value) => value === null)) continue;
    if (!best || Math.abs(point.time - time) < Math.abs(best.time - time)) best = point;
  }
  return best;
}

/** Return the path of one line; a null lifts the pen, a value between two nulls is a dot. */
function pathOf(points, index, x, y) {
  let path = "";
  let isDown = false;
  for (const [place, { time, values }] of points.entries()) {
    const value = values[index];
    if (value === null) {
      isDown = false;
      continue;
    }
    path += `${isDown ? "L" : "M"}${x(time)} ${y(value)}`;
    if (!isDown && (points[place + 1]?.values[index] ?? null) === null) path += "h0.1";
    isDown = true;
  }
  return path;
}
