// The model's first layer on typed text.
//
// What to dispatch for a text of n tokens was recorded by the library when it exported: all tokens but the last prefilled,
// then that one decoded, by either path. The page tokenises, writes the ids to the places that the export names, runs, and
// compares every element behind the layer with its own f64 reference.

import { compare, show } from "./compare.js";
import { load, loadPair } from "./host.js";
import { Reference, tensors } from "./reference.js";
import { Tokenizer } from "./tokenizer.js";

/** Runs of a prepared text, of which the median time is shown. */
const RUNS = 7;

export class Demo {
  /** Loads the export and the model, and holds tokenizer and reference to the library's; throws where they disagree. */
  static async open(host, base, model) {
    const [[data, blobs], config, tokenizer, weights] = await Promise.all([
      loadPair(base, "layer"),
      load(`${model}/config.json`, "json"),
      load(`${model}/tokenizer.json`, "json"),
      load(`${model}/model.safetensors`, "arrayBuffer"),
    ]);
    const programs = await Promise.all(data.variants.map(({ file }) => load(`${base}/layer/${file}.json`, "json")));
    return new Demo(host, data, blobs, programs, new Tokenizer(tokenizer), new Reference(config, tensors(weights)));
  }

  constructor(host, data, blobs, programs, tokenizer, reference) {
    Object.assign(this, { host, data, blobs, programs, tokenizer, reference });
    for (const { text, ids } of data.tokenizer) {
      const own = tokenizer.encode(text);
      if (own.join() !== ids.join()) throw new Error(`the page's tokens of ${JSON.stringify(text)} are not the library's`);
    }
    const { ids, logits } = data.reference;
    const exact = blobs.doubles(logits);
    const own = reference.logits(ids);
    const size = Math.sqrt(exact.reduce((sum, value) => sum + value * value, 0));
    const off = Math.sqrt(exact.reduce((sum, value, i) => sum + (own[i] - value) ** 2, 0)) / size;
    if (!(own.length === exact.length && off < 1e-12)) {
      throw new Error(`the page's f64 reference is off the library's by ${off}`);
    }
    /** By how much the two references differ. */
    this.agreement = off;
  }

  /** Token ids of a text: the first ones that the recordings hold, and how many there are. */
  encode(text) {
    const ids = this.tokenizer.encode(text);
    return { ids: ids.slice(0, this.data.most_tokens), all: ids.length };
  }

  /** Runs the layer on token ids with one of `data.variants`; returns errors, times and the verdict. */
  async run(ids, number) {
    const { host, data, blobs } = this;
    const variant = data.variants[number];
    const program = this.programs[number][ids.length - 1];
    const places = program.ids.map(([buffer, word, token]) => [buffer, word, ids[token]]);
    const expected = this.expected(ids);
    return host.scoped(async () => {
      const start = performance.now();
      const prepared = await host.prepare({ buffers: data.buffers, actions: program.actions }, blobs, { ids: places, keep: true });
      try {
        let { readings } = await host.run(prepared, 0);
        const first = performance.now() - start;
        // Judged as it was first run: what follows runs on what these wrote.
        const got = Float32Array.from(readings.flatMap((words) => [...show(words, whole(words), 0)]));
        const { error, problem } = compare(got, expected, variant.tolerance);
        const last = expected.length - data.hidden_size;
        const decoded = compare(got.subarray(last), expected.subarray(last), variant.tolerance);
        const times = [];
        for (let run = 0; run < RUNS; run++) times.push((await host.run(prepared, 0)).milliseconds);
        times.sort((a, b) => a - b);
        const dispatches = program.actions.filter((action) => action.do === "dispatch").length;
        const problems = [problem, decoded.problem].filter(Boolean);
        return { variant, error, decoded: decoded.error, problem: problems[0] ?? null, first, median: times[RUNS >> 1], dispatches };
      } finally {
        host.release(prepared);
      }
    });
  }

  /** What the reference gives for ids, kept while they stay the same. */
  expected(ids) {
    const key = ids.join();
    if (this.known?.key !== key) this.known = { key, stream: this.reference.stream(ids) };
    return this.known.stream;
  }
}

/** All words of a reading, as f32. */
const whole = (words) => ({ reading: "f32", first: 0, counts: [1, words.length], strides: [words.length, 1] });
