// What it means that a result is right: the rules of src/check/compare.rs and src/check/view.rs, which `agree` holds them to.

const LOWEST = -3.4028234663852886e38;

const word = new DataView(new ArrayBuffer(4));

/** f32 of a word's bits. */
function float(bits) {
  word.setUint32(0, bits);
  return word.getFloat32(0);
}

/** The number that 16 bits stand for. */
export function half(bits) {
  const [sign, exponent, fraction] = [bits & 0x8000 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * (1 + fraction / 1024) * 2 ** (exponent - 15) : sign * (fraction / 1024) * 2 ** -14;
}

/** The elements of `words` that a view shows, as f32; NaN where the region ends before them. */
export function show(words, { reading, first, counts, strides }, poison) {
  if (reading === "written") return Float32Array.of(words.reduce((count, word) => count + (word !== poison), 0));
  const at = (index) => (index < words.length ? float(words[index]) : NaN);
  const read = {
    f32: at,
    f16: (index) => (index >> 1 < words.length ? half((words[index >> 1] >>> (16 * (index & 1))) & 0xffff) : NaN),
    u32: (index) => (index < words.length ? words[index] : NaN),
    marked: (index) => (at(index) === LOWEST ? -Infinity : at(index)),
    log_sum_exp: (index) => at(index) + Math.fround(Math.log(at(index + 1))),
  }[reading];
  if (!read) throw new Error(`an unknown reading: ${reading}`);
  const shown = new Float32Array(counts[0] * counts[1]);
  for (let row = 0; row < counts[0]; row++) {
    for (let j = 0; j < counts[1]; j++) shown[row * counts[1] + j] = read(first + row * strides[0] + j * strides[1]);
  }
  return shown;
}

const kind = (x) => (Number.isNaN(x) ? "nan" : Number.isFinite(x) ? "finite" : x > 0 ? "+inf" : "-inf");

const SMALLEST_NORMAL = 2 ** -126;
const flushed = (got, expected) => (got === 0 && Math.abs(expected) < SMALLEST_NORMAL ? 0 : expected);

/**
 * Compares f32 with f64: lengths, then positions of non-finite values, then every element by absolute or relative error,
 * then the whole tensor's relative norm. 0 is as right as a number below the smallest normal one, which WGSL lets an
 * implementation flush. `tolerance` is `{relative, element}`. Returns `{error, problem}`; no problem, right.
 */
export function compare(got, expected, tolerance) {
  if (got.length !== expected.length) {
    return { error: Infinity, problem: `${got.length} elements, expected ${expected.length}` };
  }
  let [norm, square, different, count] = [0, 0, -1, 0];
  for (let i = 0; i < got.length; i++) {
    if (kind(got[i]) !== kind(expected[i])) {
      if (different < 0) different = i;
      count += 1;
    } else if (Number.isFinite(expected[i])) {
      const right = flushed(got[i], expected[i]);
      norm += right * right;
      square += (got[i] - right) ** 2;
    }
  }
  if (different >= 0) {
    const problem = `element ${different} is ${got[different]}, expected ${expected[different]} (${count} such)`;
    return { error: Infinity, problem };
  }
  norm = Math.sqrt(norm);
  let error = square === 0 ? 0 : Math.sqrt(square) / norm;
  if (Number.isNaN(error)) error = Infinity;
  // By how much each element exceeds what it may be off; the worst one is named.
  const rms = norm / Math.sqrt(Math.max(expected.length, 1));
  let [worst, excess] = [-1, -1];
  for (let i = 0; i < got.length; i++) {
    if (!Number.isFinite(expected[i])) continue;
    const off = Math.abs(got[i] - flushed(got[i], expected[i]));
    const own = off / Math.max(Math.abs(expected[i]), rms, 2.2250738585072014e-308);
    if (own >= excess) [worst, excess] = [i, own];
  }
  if (worst >= 0 && (excess > tolerance.element || error > tolerance.relative)) {
    const limits = `relative error ${error.toExponential(2)} of at most ${tolerance.relative.toExponential(2)}`;
    return { error, problem: `${limits}; worst element ${worst} is ${got[worst]}, expected ${expected[worst]}` };
  }
  return { error, problem: null };
}

/**
 * Holds this file to the verdicts of the library's own comparator on truths and lies, and to its readings of words. Throws
 * where they disagree, and where nothing was compared.
 */
export function agree({ poison, views, results }, blobs) {
  for (const { words, view, shows } of views) {
    const own = show(blobs.words(words), view, poison);
    const theirs = blobs.floats(shows);
    const same = own.length === theirs.length && own.every((value, i) => Object.is(value, theirs[i]));
    if (!same) throw new Error(`the comparator reads ${view.reading} otherwise than the library: ${own}, not ${theirs}`);
  }
  for (const { what, got, expected, tolerance, error, right } of results) {
    const own = compare(blobs.floats(got), blobs.doubles(expected), tolerance);
    const close = error === null ? own.error === Infinity : Math.abs(own.error - error) <= 1e-12 * error;
    if (!close || (own.problem === null) !== right) {
      const verdict = own.problem ?? `right, error ${own.error}`;
      throw new Error(`the comparator disagrees with the library on ${what}: ${verdict}`);
    }
  }
  const lies = results.filter(({ right }) => !right).length;
  if (!views.length || !lies || lies === results.length) throw new Error("the comparator was held to nothing");
  return { views: views.length, results: results.length, lies };
}
