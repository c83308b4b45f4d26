// The page: what a visitor sees of check.js and demo.js. `?check` starts the check at once, `?filter=S` narrows it,
// `?quick` leaves most layers out, and `window.egmla` holds what it came to, for a script that drives the page.

import { check } from "./check.js";
import { Demo } from "./demo.js";
import { Host, load } from "./host.js";

const base = new URL("data", import.meta.url).href;
const model = new URL("../models/shakespeare", import.meta.url).href;
const asked = new URLSearchParams(location.search);
const outcome = (window.egmla = { ready: false, problem: null, adapter: null, subgroups: null, demo: null, check: null });

const $ = (id) => document.getElementById(id);

/** An element with children and attributes. */
function element(name, children = [], attributes = {}) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...[children].flat());
  return made;
}

const scientific = (value) => (value === 0 ? "0" : Number.isFinite(value) ? value.toExponential(1) : "–");
const bytes = (value) => `${value.toLocaleString("en")} B`;

/** Says on the page what keeps it from working. */
function fail(problem) {
  outcome.problem = problem;
  $("notice").textContent = problem;
  $("notice").hidden = false;
  $("status").textContent = "";
  for (const control of document.querySelectorAll("textarea, select, button, input")) control.disabled = true;
}

/** Tokens of the text, and what was left off. */
function showTokens(demo, { ids, all }) {
  $("tokens").replaceChildren(...ids.map((id) => element("li", demo.tokenizer.label(id), { title: `token ${id}` })));
  const distinct = new Set(ids).size;
  const beyond = all > ids.length ? `; the ${all - ids.length} after them are left off` : "";
  $("count").textContent = `${ids.length} ${ids.length === 1 ? "token" : "tokens"}, ${distinct} distinct${beyond}`;
}

/** The results of all decode paths of a cache storage. */
function showResults(results) {
  const rows = results.map(({ variant, error, decoded, problem, first, median, dispatches }) => {
    const isGood = problem === null;
    const verdict = element("td", isGood ? "within" : `beyond: ${problem}`, { class: isGood ? "good" : "bad" });
    const number = (text) => element("td", text, { class: "number" });
    return element("tr", [
      element("th", variant.path, { scope: "row" }),
      verdict,
      number(scientific(error)),
      number(scientific(decoded)),
      number(scientific(variant.tolerance.relative)),
      number(`${median.toFixed(1)} ms`),
      number(`${first.toFixed(0)} ms`),
      number(String(dispatches)),
    ]);
  });
  $("results").replaceChildren(...rows);
}

/** The cache of the text in this layer, beside what others would take. */
function showCache({ cache, memory }, tokens) {
  const entries = [
    ["MHA of the same heads", cache.mha],
    [`MLA, latent ${cache.mla_kv_lora_rank}`, cache.mla],
    ["EG-MLA, this model", cache.this],
  ];
  const rows = entries.map(([name, perToken]) => {
    const bar = element("div", [], { class: "bar", style: `--share: ${perToken / cache.mha}` });
    const figures = `${bytes(perToken * tokens)} (${perToken} a token)`;
    return [element("dt", name), element("dd", [bar, element("span", figures)])];
  });
  $("cache").replaceChildren(...rows.flat());
  const bookkeeping = memory.filter(([name]) => /ids|statistics/.test(name)).map(([name, size]) => `${name} ${bytes(size)}`);
  $("memory").textContent = `Beside it, for the whole capacity: ${bookkeeping.join(", ")}.`;
}

/** Runs the demo on what the visitor typed; a later text drops an earlier one's results. */
function drive(demo) {
  let latest = 0;
  let busy = Promise.resolve();
  const compute = async (own) => {
    if (own !== latest) return;
    const encoded = demo.encode($("text").value);
    showTokens(demo, encoded);
    const { ids } = encoded;
    outcome.demo = null;
    if (!ids.length) {
      $("results").replaceChildren();
      $("results").removeAttribute("aria-busy");
      $("status").textContent = "Type something.";
      return;
    }
    $("status").textContent = "Running …";
    $("results").setAttribute("aria-busy", "true");
    const isChosen = ({ storage }) => storage === $("storage").value;
    const numbers = demo.data.variants.flatMap((variant, number) => (isChosen(variant) ? [number] : []));
    try {
      const results = [];
      for (const number of numbers) results.push(await demo.run(ids, number));
      if (own !== latest) return;
      showResults(results);
      $("results").removeAttribute("aria-busy");
      showCache(results[0].variant, ids.length);
      const wrong = results.filter(({ problem }) => problem !== null).length;
      $("status").textContent = wrong ? `${wrong} of ${results.length} results are wrong.` : "Every result is within its tolerance.";
      const plain = results.map(({ variant: { path, storage, tolerance }, ...rest }) => {
        return { ...rest, path, storage, tolerance: tolerance.relative };
      });
      outcome.demo = { text: $("text").value, tokens: ids.length, results: plain };
    } catch (error) {
      $("results").replaceChildren();
      $("results").removeAttribute("aria-busy");
      $("status").textContent = `It failed: ${error.message}`;
      outcome.demo = { text: $("text").value, tokens: ids.length, results: [], problem: error.message };
    }
  };
  let timer;
  const later = (milliseconds) => {
    latest += 1;
    const own = latest;
    clearTimeout(timer);
    timer = setTimeout(() => (busy = busy.then(() => compute(own))), milliseconds);
  };
  $("text").addEventListener("input", () => later(300));
  $("storage").addEventListener("change", () => later(0));
  if (asked.has("check")) $("status").textContent = "Type something.";
  else later(0);
}

/** A line for each kernel: how many comparisons, and the worst. */
function showKernels(rows) {
  const kernels = new Map();
  for (const row of rows) {
    const own = kernels.get(row.kernel) ?? { passed: 0, failed: 0, skipped: null, worst: row };
    if (row.skipped !== null) own.skipped = row.skipped;
    else if (row.problem === null) own.passed += 1;
    else own.failed += 1;
    if (row.skipped === null && row.error >= own.worst.error) own.worst = row;
    kernels.set(row.kernel, own);
  }
  const lines = [...kernels].map(([kernel, { passed, failed, skipped, worst }]) => {
    const ran = passed + failed > 0;
    const verdict = failed ? `${failed} wrong` : ran ? "right" : skipped;
    return element("tr", [
      element("th", kernel, { scope: "row" }),
      element("td", verdict, { class: failed ? "bad" : ran ? "good" : "quiet" }),
      element("td", ran ? String(passed + failed) : "–", { class: "number" }),
      element("td", ran ? scientific(worst.error) : "–", { class: "number" }),
      element("td", ran ? scientific(worst.tolerance) : "–", { class: "number" }),
    ]);
  });
  $("kernels").replaceChildren(...lines);
  const problems = rows.filter(({ problem }) => problem !== null).slice(0, 20);
  $("problems").replaceChildren(...problems.map(({ id, tuning, problem }) => element("li", `${id} (${tuning}): ${problem}`)));
}

/** The check, by its button or at once. */
function offerCheck(host) {
  let running = false;
  let stopped = false;
  const start = async () => {
    if (running) {
      stopped = true;
      return;
    }
    [running, stopped, outcome.check] = [true, false, null];
    $("start").textContent = "Stop";
    $("bar").hidden = false;
    let shown = 0;
    const progress = (done, all, rows) => {
      [$("bar").max, $("bar").value] = [all, done];
      if (performance.now() - shown < 500 && done < all) return;
      shown = performance.now();
      $("verdict").textContent = `${done} of ${all} cases …`;
      showKernels(rows);
    };
    try {
      const result = await check(host, base, { filter: $("filter").value, quick: asked.has("quick"), progress, stop: () => stopped });
      const { passed, failed, skipped, cases, worst, seconds, comparator, complete } = result;
      const judged = `The comparator agreed with the library's on ${comparator.results} results, ${comparator.lies} of them lies.`;
      const stop = complete ? "" : "Stopped before the end: ";
      const figures = `${stop}${passed} right, ${failed} wrong, ${skipped} not run, in ${cases} cases and ${seconds.toFixed(1)} s.`;
      const largest = worst ? ` Largest relative error ${scientific(worst.error)} (${worst.id}).` : " Nothing was compared.";
      $("verdict").textContent = figures + largest + " " + judged;
      showKernels(result.rows);
      outcome.check = result;
    } catch (error) {
      $("verdict").textContent = `It failed: ${error.message}`;
      outcome.check = { problem: error.message };
    }
    running = false;
    $("start").textContent = "Check this browser";
    $("bar").hidden = true;
  };
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    start();
  });
  if (asked.has("filter")) $("filter").value = asked.get("filter");
  if (asked.has("check")) start();
}

async function main() {
  let index;
  try {
    index = await load(`${base}/index.json`, "json");
  } catch (error) {
    const how = "Run `sh scripts/browser.sh --serve` in the repository, and open the address that it prints.";
    const why = location.protocol === "file:" ? "This page needs a web server." : `The exported cases are missing (${error.message}).`;
    fail(`${why} ${how}`);
    return;
  }
  let host;
  try {
    host = await Host.open(index.subgroups);
  } catch (error) {
    fail(error.message);
    return;
  }
  $("adapter").textContent = host.describe();
  [outcome.adapter, outcome.subgroups] = [host.describe(), host.offered];
  host.device.lost.then(({ message }) => fail(`The device was lost: ${message || "no reason given"}. Load the page again.`));
  if (index.layer) {
    try {
      const demo = await Demo.open(host, base, model);
      const agreement = `The page's f64 reference is off the library's by ${scientific(demo.agreement)}.`;
      $("agreement").textContent = agreement;
      drive(demo);
    } catch (error) {
      fail(`The demo does not start: ${error.message}`);
      return;
    }
  }
  offerCheck(host);
  outcome.ready = true;
}

main();
