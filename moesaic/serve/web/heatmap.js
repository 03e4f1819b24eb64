// A layer-by-expert map on a canvas: one row of cells per layer, as many cells as the layer has experts.
//
// What the values mean is the caller's business; here is how they look and which cell is pointed at.

import { luminanceOf, scaleOf } from "./colors.js";

// CSS pixels.
const LABEL_WIDTH = 32;
const RIGHT_WIDTH = 44;
const AXIS_HEIGHT = 18;
const MIN_CELL = 6;
const MAX_CELL = 36;
const MIN_LINE = 7;
const MAX_LINE = 22;
// Of all lines together: no more than this, and less where the map is narrow.
const TARGET_HEIGHT = 340;
const TARGET_PER_WIDTH = 0.75;
// The least height of a row whose neighbours have labels too.
const LABEL_STEP = 13;

/**
 * Return where the cells of layers with these numbers of experts stand in a map of this width, in CSS pixels.
 *
 * Cells narrower than MIN_CELL could neither be seen nor be pointed at: a layer's row is then folded into several lines
 * of `columns` experts, a power of two where there are enough.
 * lines: {row, first, last, y}, experts first to last - 1; rows: {y, height}.
 */
export function layoutOf(counts, width) {
  const most = Math.max(...counts);
  const room = Math.max(width - LABEL_WIDTH - RIGHT_WIDTH, MIN_CELL);
  let columns = most;
  if (room / most < MIN_CELL) columns = Math.min(most, 2 ** Math.floor(Math.log2(Math.max(room / MIN_CELL, 1))));
  const cell = Math.min(room / columns, MAX_CELL);
  const numLines = counts.reduce((sum, count) => sum + Math.ceil(count / columns), 0);
  const isFolded = numLines > counts.length;
  const target = Math.min(TARGET_HEIGHT, TARGET_PER_WIDTH * width);
  const lineHeight = Math.round(Math.min(MAX_LINE, Math.max(MIN_LINE, target / numLines)));
  const lines = [];
  const rows = [];
  let y = AXIS_HEIGHT;
  for (const [row, count] of counts.entries()) {
    const top = y;
    for (let first = 0; first < count; first += columns) {
      lines.push({ row, first, last: Math.min(first + columns, count), y });
      y += lineHeight;
    }
    rows.push({ y: top, height: y - top });
    if (isFolded) y += 3;
  }
  return { columns, cell, lineHeight, lines, rows, isFolded, left: LABEL_WIDTH, height: y + 2 };
}

/**
 * The map on a canvas, for the pointer and the keyboard. `pointed` is called with {row, expert} or null (nothing is
 * pointed at) and with whether that is news, or only the values are.
 */
export class HeatMap {
  #canvas;
  // The cells and labels without rings: a large map takes long to draw, and rings move with the pointer.
  #base = document.createElement("canvas");
  #pointed;
  #rows = [];
  #rings = [];
  #layout = null;
  #hovered = null;
  #cursor = null;
  #scales = { light: scaleOf("light"), dark: scaleOf("dark") };
  #scheme;

  constructor(canvas, { scheme, pointed }) {
    this.#canvas = canvas;
    this.#scheme = scheme;
    this.#pointed = pointed;
    new ResizeObserver(() => this.#fit()).observe(canvas.parentElement);
    canvas.addEventListener("pointermove", (event) => this.#hover(this.cellAt(event.offsetX, event.offsetY)));
    canvas.addEventListener("pointerdown", (event) => this.#hover(this.cellAt(event.offsetX, event.offsetY)));
    // A finger's cell stays when it is lifted, until it touches something else.
    document.addEventListener("pointerdown", (event) => event.target !== canvas && this.#hover(null));
    canvas.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.#hover(null));
    canvas.addEventListener("keydown", (event) => this.#move(event));
    canvas.addEventListener("focus", () => {
      if (!canvas.matches(":focus-visible") || !this.#rows.length) return;
      this.#cursor ??= { row: 0, expert: 0 };
      this.#show();
    });
    canvas.addEventListener("blur", () => this.#show());
  }

  /** Return {row, expert} at CSS pixels within the canvas, or null. */
  cellAt(x, y) {
    if (!this.#layout) return null;
    const { lines, lineHeight, cell, left } = this.#layout;
    const line = lines.find((one) => y >= one.y && y < one.y + lineHeight);
    if (!line || x < left) return null;
    const expert = line.first + Math.floor((x - left) / cell);
    return expert < line.last ? { row: line.row, expert } : null;
  }

  /** Return the centre of a cell in CSS pixels within the canvas. */
  centreOf({ row, expert }) {
    const { lines, lineHeight, cell, left } = this.#layout;
    const line = lines.find((one) => one.row === row && expert < one.last);
    return { x: left + (expert - line.first + 0.5) * cell, y: line.y + lineHeight / 2 };
  }

  get isPointed() {
    return this.#current !== null;
  }

  /**
   * Show these rows, from the top: {label, values (0 to 1, one per expert), hot, dead (sets of experts), measure (0 to
   * 1, written at the right, or null)}.
   */
  setRows(rows) {
    const isSame =
      rows.length === this.#rows.length && rows.every((row, i) => row.values.length === this.#rows[i].values.length);
    this.#rows = rows;
    if (isSame) this.redraw();
    else {
      this.#hovered = this.#cursor = null;
      this.#fit();
    }
    if (this.#current) this.#pointed(this.#current, false);
  }

  /** Ring these cells, {row, expert} each. */
  setRings(cells) {
    this.#rings = cells;
    this.#drawRings();
  }

  get #current() {
    return this.#hovered ?? (document.activeElement === this.#canvas ? this.#cursor : null);
  }

  #hover(cell) {
    if (cell?.row === this.#hovered?.row && cell?.expert === this.#hovered?.expert) return;
    this.#hovered = cell;
    if (cell) this.#cursor = cell;
    this.#show();
  }

  #show() {
    this.#pointed(this.#current, true);
    this.#drawRings();
  }

  #move(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const isEnd = event.key === "Home" || event.key === "End";
    if (!this.#rows.length || event.ctrlKey || event.metaKey || event.altKey || !(isEnd || event.key in steps)) return;
    event.preventDefault();
    const [down, right] = steps[event.key] ?? [0, 0];
    const from = this.#cursor ?? { row: 0, expert: 0 };
    const row = Math.min(Math.max(from.row + down, 0), this.#rows.length - 1);
    const last = this.#rows[row].values.length - 1;
    const expert = event.key === "Home" ? 0 : event.key === "End" ? last : from.expert + right;
    this.#hovered = null;
    this.#cursor = { row, expert: Math.min(Math.max(expert, 0), last) };
    this.#show();
  }

  #fit() {
    const width = this.#canvas.parentElement.clientWidth;
    if (!this.#rows.length || !width) return;
    this.#layout = layoutOf(
      this.#rows.map((row) => row.values.length),
      width,
    );
    const scale = window.devicePixelRatio || 1;
    this.#canvas.width = Math.round(width * scale);
    this.#canvas.height = Math.round(this.#layout.height * scale);
    this.#canvas.style.width = `${width}px`;
    this.#canvas.style.height = `${this.#layout.height}px`;
    this.redraw();
  }

  /** Draw everything again, after a change of scheme for example. */
  redraw() {
    if (!this.#layout || !this.#rows.length) return;
    this.#base.width = this.#canvas.width;
    this.#base.height = this.#canvas.height;
    const context = this.#base.getContext("2d");
    const scale = window.devicePixelRatio || 1;
    context.scale(scale, scale);
    const style = getComputedStyle(this.#canvas);
    context.font = `11px ${style.fontFamily}`;
    context.fillStyle = style.color;
    this.#drawLabels(context);
    this.#drawCells(context, style.color, scale);
    this.#drawRings();
  }

  #drawRings() {
    if (!this.#layout || !this.#rows.length) return;
    const context = this.#canvas.getContext("2d");
    const scale = window.devicePixelRatio || 1;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.#canvas.width, this.#canvas.height);
    context.drawImage(this.#base, 0, 0);
    context.scale(scale, scale);
    const { color: ink, backgroundColor: ground, textDecorationColor: ring } = getComputedStyle(this.#canvas);
    // Every halo before every ring: neighbours' halos would hide it.
    for (const cell of this.#rings) this.#outline(context, cell, 4, ground);
    for (const cell of this.#rings) this.#outline(context, cell, 2, ring);
    if (this.#current) {
      this.#outline(context, this.#current, 4, ground);
      this.#outline(context, this.#current, 2, ink);
    }
  }

  #drawLabels(context) {
    const { rows, cell, columns, left, lineHeight, isFolded } = this.#layout;
    const every = Math.ceil(LABEL_STEP / (rows[0].height + (isFolded ? 3 : 0)));
    context.textBaseline = "middle";
    for (const [index, { y, height }] of rows.entries()) {
      if (index % every) continue;
      const middle = isFolded ? y + lineHeight / 2 : y + height / 2;
      const { label, measure } = this.#rows[index];
      context.textAlign = "right";
      context.fillText(label, left - 6, middle);
      context.textAlign = "left";
      if (measure !== null) context.fillText(measure.toFixed(2), left + columns * cell + 8, middle);
    }
    // The axes' names stand where the numbers leave room, in the corner and upright beside the rows.
    context.textAlign = "right";
    context.fillText("expert", left - 2, AXIS_HEIGHT / 2 - 1, left - 2);
    context.save();
    context.translate(6, (rows[0].y + rows.at(-1).y + rows.at(-1).height) / 2);
    context.rotate(-Math.PI / 2);
    context.textAlign = "center";
    context.fillText("layer", 0, 0);
    context.restore();
    context.textAlign = "center";
    const step = columns > 8 ? Math.ceil(columns / 8 / 4) * 4 : 1;
    const isCrowded = step * cell < 20;
    for (let expert = 0; expert < columns; expert += isCrowded ? 2 * step : step) {
      context.fillText(String(expert), left + (expert + 0.5) * cell, AXIS_HEIGHT / 2 - 1);
    }
    if (this.#rows.some(({ measure }) => measure !== null)) {
      context.textAlign = "right";
      context.fillText("entropy", left + columns * cell + RIGHT_WIDTH - 2, AXIS_HEIGHT / 2 - 1);
    }
  }

  #drawCells(context, ink, scale) {
    const { lines, lineHeight, cell, left } = this.#layout;
    const colors = this.#scales[this.#scheme()];
    const snap = (value) => Math.round(value * scale) / scale;
    for (const { row, first, last, y } of lines) {
      const { values, hot, dead } = this.#rows[row];
      for (let expert = first; expert < last; expert++) {
        const from = snap(left + (expert - first) * cell);
        const width = snap(left + (expert - first + 1) * cell) - from - 1;
        const height = lineHeight - 1;
        if (dead.has(expert)) {
          // Hollow and struck through: known without its colour.
          context.strokeStyle = ink;
          context.lineWidth = 1;
          context.globalAlpha = 0.75;
          context.strokeRect(from + 0.5, y + 0.5, width - 1, height - 1);
          context.beginPath();
          context.moveTo(from + 0.5, y + height - 0.5);
          context.lineTo(from + width - 0.5, y + 0.5);
          context.stroke();
          context.globalAlpha = 1;
          continue;
        }
        const color = colors[Math.round(Math.min(1, Math.max(0, values[expert])) * (colors.length - 1))];
        context.fillStyle = `rgb(${color})`;
        context.fillRect(from, y, width, height);
        if (hot.has(expert)) {
          const size = Math.max(2, Math.min(width, height) / 3);
          context.fillStyle = luminanceOf(color) > 0.18 ? "#000" : "#fff";
          context.beginPath();
          context.arc(from + width / 2, y + height / 2, size / 2, 0, 2 * Math.PI);
          context.fill();
        }
      }
    }
  }

  #outline(context, cell, width, color) {
    const { lines, lineHeight, cell: size, left } = this.#layout;
    const line = lines.find(({ row, first, last }) => row === cell.row && cell.expert >= first && cell.expert < last);
    if (!line) return;
    context.lineWidth = width;
    context.strokeStyle = color;
    context.strokeRect(left + (cell.expert - line.first) * size - 1, line.y - 1, size + 1, lineHeight + 1);
  }
}
