// What /v1/stats said in the last minutes, as lines of a chart: counters become rates, silences become gaps.

/** Seconds that are kept. */
export const SPAN = 300;
// A longer silence (a hidden tab, a server that was away) breaks the lines.
const LONGEST_STEP = 5;

function percent(part, whole) {
  return whole > 0 ? (100 * part) / whole : null;
}

/** Return the value at percentile `name` ("p50"), or null where nothing was measured. */
function percentile(values, name) {
  const value = values?.[name];
  return Number.isFinite(value) ? value : null;
}

/** Return how many requests wait: in the engine, and before it. */
export function numWaiting(stats) {
  return stats.num_waiting + (stats.num_queued ?? 0);
}

export class History {
  #samples = [];

  /** Add what the server said at a time in seconds, asked at another; drop what is older than SPAN. */
  add(time, stats, asked = time) {
    // A step may take longer than a silence, and the server answers between two of them.
    const isAfterSilence = asked - (this.#samples.at(-1)?.time ?? asked) > LONGEST_STEP;
    this.#samples.push({ time, stats, isAfterSilence });
    while (this.#samples[0].time < time - SPAN - LONGEST_STEP) this.#samples.shift();
  }

  get latest() {
    return this.#samples.at(-1)?.stats ?? null;
  }

  /** Return {time, values} of each sample; values(stats) gives one number or null per line. Gaps are null values. */
  gauges(values) {
    return this.#withGaps(this.#samples.map(({ stats, ...sample }) => ({ ...sample, values: values(stats) })));
  }

  /** The same of counters, as growth per second; a server that began again makes a gap. */
  rates(values) {
    const points = [];
    for (let index = 1; index < this.#samples.length; index++) {
      const [before, now] = [this.#samples[index - 1], this.#samples[index]];
      const [old, current] = [values(before.stats), values(now.stats)];
      const seconds = now.time - before.time;
      const rate = current.map((value, line) => {
        const growth = value - old[line];
        return growth >= 0 && seconds > 0 && !now.isAfterSilence ? growth / seconds : null;
      });
      points.push({ time: now.time, values: rate, isAfterSilence: now.isAfterSilence });
    }
    return this.#withGaps(points);
  }

  #withGaps(points) {
    return points.flatMap((point, index) => {
      const before = points[index - 1];
      if (!before || !point.isAfterSilence) return [point];
      return [{ time: (before.time + point.time) / 2, values: point.values.map(() => null) }, point];
    });
  }
}

/** The charts of the load page. points(history) gives their lines; `most` is a fixed upper end. */
export const CHARTS = [
  {
    id: "generated",
    title: "Generated",
    unit: "tokens/s",
    lines: ["generated"],
    points: (history) => history.rates((stats) => [stats.num_generated_tokens]),
  },
  {
    id: "prompt",
    title: "Prompts read",
    unit: "tokens/s",
    lines: ["computed", "cached"],
    points: (history) =>
      history.rates((stats) => [stats.num_prompt_tokens - stats.num_cached_tokens, stats.num_cached_tokens]),
  },
  {
    id: "ttft",
    title: "Time to first token",
    unit: "s",
    lines: ["p50", "p90", "p99"],
    empty: "No request yet",
    points: (history) =>
      history.gauges((stats) => ["p50", "p90", "p99"].map((name) => percentile(stats.ttft_seconds, name))),
  },
  {
    id: "tpot",
    title: "Time per token",
    unit: "s",
    lines: ["p50", "p90", "p99"],
    empty: "No request yet",
    points: (history) =>
      history.gauges((stats) =>
        ["p50", "p90", "p99"].map((name) => percentile(stats.time_per_output_token_seconds, name)),
      ),
  },
  {
    id: "requests",
    title: "Texts",
    unit: "",
    lines: ["running", "waiting"],
    points: (history) => history.gauges((stats) => [stats.num_running, numWaiting(stats)]),
  },
  {
    id: "kv",
    title: "Key-value cache",
    unit: "%",
    lines: ["used", "kept for reuse"],
    most: 100,
    points: (history) =>
      history.gauges((stats) => [
        percent(stats.kv_blocks_used, stats.kv_blocks_total),
        percent(stats.kv_blocks_cached, stats.kv_blocks_total),
      ]),
  },
  {
    id: "distinct",
    title: "Distinct experts per step",
    unit: "",
    lines: ["mean of the layers"],
    forExperts: true,
    points: (history) => history.gauges((stats) => [stats.distinct_experts_per_step]),
  },
];
