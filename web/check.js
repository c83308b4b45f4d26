// Runs the exported cases on the browser's device and compares every result with the library's f64 reference.

import { agree, compare, show } from "./compare.js";
import { load, loadPair } from "./host.js";

/** Layers that a quick check runs; of the kernels it runs every case. */
const QUICK_LAYERS = ["mla_low_rank_bias_yarn/", "latent_sigmoid_rmsnorm/", "up_projected_tanh_layernorm/"];

/** One case: its rows, one a variant. */
async function runCase(host, base, { id, kernel, file }, poison) {
  const [data, blobs] = await loadPair(`${base}/cases`, file);
  const ran = data.variants.some(({ skipped }) => skipped === null);
  let readings = [];
  let failure = ran && !data.actions.some((action) => action.do === "read") ? "nothing is read back" : null;
  const needs = data.actions.some((action) => action.subgroups) && !host.withSubgroups;
  const reason = "not run: the export's plans count on subgroups that this adapter does not offer";
  if (ran && !needs && failure === null) {
    try {
      readings = await host.scoped(async () => {
        const prepared = await host.prepare(data, blobs);
        try {
          return (await host.run(prepared, poison)).readings;
        } finally {
          host.release(prepared);
        }
      });
    } catch (error) {
      failure = error.message;
    }
  }
  return data.variants.map(({ tuning, skipped, comparisons }) => {
    const row = { id, kernel, tuning, error: 0, tolerance: 0, skipped: null, problem: null };
    if (skipped !== null || needs) return { ...row, skipped: skipped?.replace("skipped", "not run") ?? reason };
    if (failure !== null) return { ...row, error: Infinity, problem: failure };
    if (!comparisons.length) return { ...row, error: Infinity, problem: "nothing was compared" };
    for (const { parts, expected, tolerance } of comparisons) {
      const shown = parts.map(([reading, view]) => show(readings[reading], view, poison));
      const got = shown.length === 1 ? shown[0] : Float32Array.from(shown.flatMap((part) => [...part]));
      const verdict = compare(got, blobs.doubles(expected), tolerance);
      if (verdict.error >= row.error) [row.error, row.tolerance] = [verdict.error, tolerance.relative];
      row.problem ??= verdict.problem;
    }
    return row;
  });
}

/**
 * Runs every case whose id contains `filter`, after the comparator was held to the library's; `quick` leaves most of the
 * layers out, which are counted as `leftOut`. Returns figures and rows.
 * `progress` is called with the number done, the number of all and the rows so far; `stop` with nothing, after each case.
 */
export async function check(host, base, { filter = "", quick = false, progress = () => {}, stop = () => false } = {}) {
  const start = performance.now();
  const index = await load(`${base}/index.json`, "json");
  const comparator = agree(...(await loadPair(base, "verdicts")));
  const wanted = index.cases.filter(({ id }) => id.includes(filter));
  const isQuick = ({ id, kernel }) => kernel !== "layer" || QUICK_LAYERS.some((name) => id.includes(name));
  const cases = quick ? wanted.filter(isQuick) : wanted;
  const rows = [];
  let done = 0;
  for (const entry of cases) {
    const before = performance.now();
    const own = await runCase(host, base, entry, index.poison);
    rows.push(...own.map((row, i) => ({ ...row, seconds: i ? 0 : (performance.now() - before) / 1000 })));
    done += 1;
    progress(done, cases.length, rows);
    if (stop() || host.lost !== null) break;
  }
  const ran = rows.filter(({ skipped }) => skipped === null);
  const failed = ran.filter(({ problem }) => problem !== null);
  const worst = ran.reduce((worst, row) => (worst && worst.error >= row.error ? worst : row), null);
  return {
    cases: new Set(ran.map(({ id }) => id)).size,
    leftOut: wanted.length - cases.length,
    complete: done === cases.length,
    comparator,
    passed: ran.length - failed.length,
    failed: failed.length,
    skipped: rows.length - ran.length,
    worst,
    seconds: (performance.now() - start) / 1000,
    compiling: host.compiling / 1000,
    kernels: new Set(rows.filter(({ skipped }) => skipped === null).map(({ kernel }) => kernel)).size,
    pipelines: host.pipelines.size,
    rows,
  };
}
