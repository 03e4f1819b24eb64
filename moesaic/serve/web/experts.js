// The experts at work: what they do for all requests (polled), and what they did for one token of an answer.

import { scaleOf } from "./colors.js";
import { byId, element } from "./dom.js";
import { HeatMap } from "./heatmap.js";
import { visible } from "./tokens.js";

// The map's colours end at so many times a layer's mean; the server says which are hot.
const LOAD_LIMIT = 3;
// With fewer routes per expert than this an idle expert is likely chance: e^-8 is one in three thousand.
const ROUTES_TO_JUDGE = 8;
// A chosen expert stands out from those not chosen, however small its weight.
const LEAST_WEIGHT_COLOR = 0.3;
const FOLLOW_MILLISECONDS = 120;
const NONE = new Set();

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

function distinct(values) {
  return [...new Set(values)].sort((one, other) => one - other);
}

/** Return "8", "8 and 16", "8, 16 and 32". */
function listed(values) {
  const words = values.map(String);
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
}

function idsText(ids) {
  return ids.length ? ids.join(", ") : "none";
}

export class ExpertsPanel {
  #layers = [];
  #steps = 0;
  #detail = null;
  #isFollowing = false;
  #frame = null;
  #timer = null;
  #scheme;
  #map;
  #switch = document.getElementsByName("map-mode");

  constructor({ scheme }) {
    this.#scheme = scheme;
    this.#map = new HeatMap(byId("map"), { scheme, pointed: (cell, isNew) => this.#describe(cell, isNew) });
    for (const radio of this.#switch) radio.addEventListener("change", () => this.#refresh());
    byId("layers").addEventListener("toggle", () => this.#refreshLayers());
    const fold = byId("experts-fold");
    fold.addEventListener("click", () => {
      const isOpen = byId("experts").toggleAttribute("data-folded") === false;
      fold.setAttribute("aria-expanded", String(isOpen));
      fold.textContent = isOpen ? "Hide" : "Show";
    });
    this.#refresh();
    this.#refreshToken();
  }

  /** Whether the model is known to have experts. */
  get hasExperts() {
    return this.#layers.length > 0;
  }

  /** Whether the model is known to have none; not so before the server has said so. */
  get isDense() {
    return byId("chat-page").hasAttribute("data-dense");
  }

  /** Show what /v1/experts said. */
  setLoad({ layers, num_steps: steps }) {
    this.#layers = layers;
    this.#steps = steps;
    byId("chat-page").toggleAttribute("data-dense", !layers.length);
    this.#refresh();
  }

  /** Show a token, {token, layers}, or none (null). isFollowing: it is the newest, not one that somebody chose. */
  setToken(detail, isFollowing = false) {
    this.#detail = detail;
    this.#isFollowing = isFollowing;
    // A chosen token shows with the next picture; the newest ones come faster than anybody reads.
    if (isFollowing) this.#timer ??= setTimeout(() => this.#refreshChoice(), FOLLOW_MILLISECONDS);
    else this.#frame ??= requestAnimationFrame(() => this.#refreshChoice());
  }

  #refreshChoice() {
    clearTimeout(this.#timer);
    cancelAnimationFrame(this.#frame);
    this.#timer = this.#frame = null;
    if (this.#isToken) this.#refresh();
    else {
      this.#map.setRings(this.#chosenCells());
      if (!this.#map.isPointed) this.#describe(null, false);
    }
    this.#refreshToken();
  }

  /** Draw again in the colours of now. */
  recolor() {
    this.#refresh();
  }

  get #isToken() {
    return [...this.#switch].find((radio) => radio.checked).value === "token";
  }

  /** What the token chose in a layer of the map; null also where another model made it, before a restart. */
  #routesOf(layer) {
    return (this.#isOfThisModel && this.#detail.layers.find((routes) => routes.layer === layer)) || null;
  }

  get #isOfThisModel() {
    if (this.#detail?.by) return false;
    const counts = new Map(this.#layers.map((layer) => [layer.layer, layer.num_experts]));
    const layers = this.#detail?.layers ?? [];
    return (
      layers.length === counts.size &&
      layers.every((routes) => routes.expert_ids.every((expert) => expert < (counts.get(routes.layer) ?? 0)))
    );
  }

  #refresh() {
    const isToken = this.#isToken;
    const rows = this.#layers.map((layer) => (isToken ? this.#tokenRow(layer) : this.#loadRow(layer)));
    this.#map.setRows(rows);
    this.#map.setRings(isToken ? [] : this.#chosenCells());
    if (!this.#map.isPointed) this.#describe(null, false);
    this.#refreshLegend();
    this.#refreshLayers();
  }

  /** What the line above the map says while no cell is pointed at. */
  #summary() {
    if (!this.#layers.length) return "Waiting for the server…";
    if (this.#detail && !this.#isFollowing) {
      const name = `“${visible(this.#detail.token)}”`;
      if (this.#detail.by) return `${name} was written by ${this.#detail.by}`;
      return this.#isOfThisModel ? `${name}: its experts in every layer` : `${name} is another model's`;
    }
    const experts = listed(distinct(this.#layers.map((layer) => layer.num_experts)));
    const chosen = listed(distinct(this.#layers.map((layer) => layer.top_k)));
    const count = this.#layers.length;
    return `${count} MoE layer${count === 1 ? "" : "s"} of ${experts} experts, ${chosen} for each token`;
  }

  #loadRow(layer) {
    const recent = layer.recent_tokens_per_expert;
    const mean = sum(recent) / layer.num_experts;
    const isJudged = sum(layer.tokens_per_expert) >= ROUTES_TO_JUDGE * layer.num_experts;
    return {
      label: String(layer.layer),
      values: recent.map((tokens) => (mean ? tokens / mean / LOAD_LIMIT : 0)),
      hot: isJudged ? new Set(layer.hot) : NONE,
      dead: isJudged ? new Set(layer.dead) : NONE,
      measure: mean && Number.isFinite(layer.entropy) ? layer.entropy : null,
    };
  }

  #tokenRow(layer) {
    const values = Array(layer.num_experts).fill(0);
    const routes = this.#routesOf(layer.layer);
    const most = this.#greatestWeight();
    for (const [place, expert] of (routes?.expert_ids ?? []).entries()) {
      values[expert] = LEAST_WEIGHT_COLOR + (1 - LEAST_WEIGHT_COLOR) * (routes.weights[place] / most);
    }
    return { label: String(layer.layer), values, hot: NONE, dead: NONE, measure: null };
  }

  #greatestWeight() {
    const weights = (this.#detail?.layers ?? []).flatMap((routes) => routes.weights);
    return Math.max(...weights, Number.EPSILON);
  }

  #chosenCells() {
    if (this.#isFollowing) return [];
    return this.#layers.flatMap((layer, row) =>
      (this.#routesOf(layer.layer)?.expert_ids ?? []).map((expert) => ({ row, expert })),
    );
  }

  #refreshLegend() {
    const isToken = this.#isToken;
    const colors = scaleOf(this.#scheme());
    const first = isToken ? Math.round(LEAST_WEIGHT_COLOR * (colors.length - 1)) : 0;
    const stops = Array.from({ length: 17 }, (_, i) => `rgb(${colors[Math.round(first + (i / 16) * (255 - first))]})`);
    byId("legend-bar").style.background = `linear-gradient(to right, ${stops.join(", ")})`;
    const most = this.#detail ? this.#greatestWeight().toFixed(2) : "1";
    const ticks = isToken ? ["0", `weight ${most}`] : ["0", "1 × mean", "2 ×", `≥ ${LOAD_LIMIT} ×`];
    const labels = ticks.map((text) => element("span", {}, text));
    for (const [place, label] of labels.entries()) label.style.left = `${(100 * place) / (labels.length - 1)}%`;
    byId("legend-ticks").replaceChildren(...labels);
    byId("legend-marks").hidden = isToken;
    const numRoutes = sum(this.#layers.map((layer) => sum(layer.tokens_per_expert)));
    const needed = ROUTES_TO_JUDGE * sum(this.#layers.map((layer) => layer.num_experts));
    let note = "";
    if (isToken && !this.#detail) note = "No token yet: send a message, or point at a token of an answer.";
    else if (!isToken && this.hasExperts && !numRoutes) note = "No tokens since the server began.";
    else if (!isToken && numRoutes < needed) note = "Too few tokens yet to call an expert hot or dead.";
    byId("legend-note").textContent = note;
  }

  #describe(cell, isNew) {
    let text = this.#summary();
    if (cell) {
      const layer = this.#layers[cell.row];
      const total = sum(layer.recent_tokens_per_expert);
      const share = total ? layer.recent_tokens_per_expert[cell.expert] / total : 0;
      const parts = [
        `${(100 * share).toFixed(1)} % of recent routes`,
        `${(share * layer.num_experts).toFixed(1)} × the mean`,
      ];
      const { hot, dead } = this.#loadRow(layer);
      if (hot.has(cell.expert)) parts.push("hot");
      if (dead.has(cell.expert)) parts.push("dead");
      const routes = this.#routesOf(layer.layer);
      const place = routes ? routes.expert_ids.indexOf(cell.expert) : -1;
      if (place >= 0) parts.push(`weight ${routes.weights[place].toFixed(2)} for the token`);
      text = `Layer ${layer.layer}, expert ${cell.expert}: ${parts.join(", ")}`;
    }
    byId("map-status").textContent = text;
    // Spoken when another cell is reached, not each second.
    if (isNew) byId("map-spoken").textContent = cell ? text : "";
  }

  #refreshToken() {
    const detail = this.#detail;
    byId("token-name").textContent = detail ? visible(detail.token) : "";
    byId("token-state").textContent = !detail
      ? "Point at a token of an answer, or tab to the answer and use the arrow keys."
      : this.#isFollowing
        ? "The newest token. Point at another, or tab to the answer and use the arrow keys."
        : "The experts that each layer chose when it predicted this token, with their weights.";
    const rows = (detail?.layers ?? []).map((routes) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, String(routes.layer)),
        element(
          "td",
          {},
          element(
            "div",
            { class: "routes" },
            ...routes.expert_ids.map((expert, place) =>
              element(
                "span",
                { class: "route" },
                element("b", {}, String(expert)),
                element("span", { class: "weight" }, ` (${routes.weights[place].toFixed(2)})`),
              ),
            ),
          ),
        ),
      ),
    );
    byId("token-routes").replaceChildren(...rows);
    byId("token-table").hidden = !rows.length;
  }

  #refreshLayers() {
    byId("experts-steps").textContent = `${this.#steps.toLocaleString("en")} steps since the server began`;
    if (!byId("layers").open) return;
    const rows = this.#layers.map((layer) => {
      const recent = layer.recent_tokens_per_expert;
      const mean = sum(recent) / layer.num_experts;
      const { hot, dead, measure } = this.#loadRow(layer);
      const busiest = recent.indexOf(Math.max(...recent));
      return element(
        "tr",
        {},
        element("th", { scope: "row" }, String(layer.layer)),
        element("td", {}, String(layer.num_experts)),
        element("td", {}, measure === null ? "–" : measure.toFixed(3)),
        element("td", {}, mean ? `${busiest} (${(recent[busiest] / mean).toFixed(1)} ×)` : "–"),
        element("td", {}, idsText([...hot])),
        element("td", {}, idsText([...dead])),
      );
    });
    byId("layer-rows").replaceChildren(...rows);
  }
}
