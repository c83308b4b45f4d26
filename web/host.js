// Runs what `egmla export` wrote: a WGSL file, override constants and bindings to a pipeline, dispatches, words read back.
//
// The shaders are the files of ../shaders as they lie there. Nothing here knows a kernel: grid, constants, bindings and first
// contents come from the library. Of the device only WebGPU's default limits are used, and no feature but `subgroups`, for
// exports that were planned for it.

const folder = new URL("../shaders/", import.meta.url);

/** Bytes that an export names as `{at, bytes}`, or as one word over and over. */
export class Blobs {
  constructor(buffer) {
    this.buffer = buffer;
  }

  words(blob) {
    return new Uint32Array(this.buffer, blob.at, blob.bytes / 4);
  }

  floats(blob) {
    return new Float32Array(this.buffer, blob.at, blob.bytes / 4);
  }

  doubles(blob) {
    return new Float64Array(this.buffer, blob.at, blob.bytes / 8);
  }

  bytes(blob) {
    return new Uint8Array(this.buffer, blob.at, blob.bytes);
  }
}

/** Fetches a file beside the page; the error names it. */
export async function load(url, as) {
  const response = await fetch(url, { cache: "no-cache" });
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  return response[as]();
}

/** An export's `<name>.json` with its `<name>.bin`. */
export async function loadPair(base, name) {
  const [data, bytes] = await Promise.all([load(`${base}/${name}.json`, "json"), load(`${base}/${name}.bin`, "arrayBuffer")]);
  return [data, new Blobs(bytes)];
}

/** A shader that the browser does not take. */
class ShaderError extends Error {}

export class Host {
  /**
   * Opens the browser's device. Throws an Error whose message is for the visitor where there is none.
   *
   * `subgroups` are the sizes that the export was planned for, or null.
   */
  static async open(subgroups) {
    if (!navigator.gpu) {
      const which = "Recent versions of Chrome, Edge, Safari and Firefox have it on most systems.";
      throw new Error(`This browser has no WebGPU, or the page was not opened from https:// or http://localhost. ${which}`);
    }
    const adapter = await navigator.gpu.requestAdapter();
    if (!adapter) throw new Error("This browser has WebGPU but finds no adapter for it on this machine.");
    const { subgroupMinSize: least, subgroupMaxSize: most } = adapter.info;
    const fits = subgroups !== null && subgroups[0] <= least && most <= subgroups[1];
    const withSubgroups = fits && adapter.features.has("subgroups");
    const device = await adapter.requestDevice({ requiredFeatures: withSubgroups ? ["subgroups"] : [] });
    return new Host(device, adapter.info, withSubgroups, adapter.features.has("subgroups") ? [least, most] : null);
  }

  constructor(device, info, withSubgroups, offered) {
    this.device = device;
    this.info = info;
    /** Whether kernels that use subgroups can run. */
    this.withSubgroups = withSubgroups;
    /** Sizes of the adapter's subgroups, where it has the feature. */
    this.offered = offered;
    this.sources = new Map();
    this.pipelines = new Map();
    this.kept = new Map();
    /** Milliseconds that were spent waiting for pipelines. */
    this.compiling = 0;
    this.lost = null;
    device.lost.then((reason) => {
      this.lost = reason.message || reason.reason;
    });
    this.errors = [];
    /** Resolves when the work before is done: error scopes of two at once would take each other's errors. */
    this.turn = Promise.resolve();
    device.addEventListener("uncapturederror", (event) => this.errors.push(event.error.message));
  }

  /** The adapter in words. */
  describe() {
    const { vendor, architecture, device, description } = this.info;
    return description || [vendor, architecture, device].filter(Boolean).join(" ") || "an adapter without a name";
  }

  source(kernel) {
    if (!this.sources.has(kernel)) this.sources.set(kernel, load(new URL(`${kernel}.wgsl`, folder), "text"));
    return this.sources.get(kernel);
  }

  /** The pipeline of a dispatch and its layout, compiled once. */
  pipeline(action) {
    const key = JSON.stringify([action.kernel, action.overrides]);
    if (!this.pipelines.has(key)) this.pipelines.set(key, this.compile(action));
    return this.pipelines.get(key);
  }

  async compile({ kernel, subgroups, overrides, bindings }) {
    const source = await this.source(kernel);
    const label = `egmla.${kernel}`;
    // The library's own compiler knows subgroups without the directive, and does not take it.
    const module = this.device.createShaderModule({ label, code: subgroups ? `enable subgroups;\n${source}` : source });
    const { messages } = await module.getCompilationInfo();
    const bad = messages.find((message) => message.type === "error");
    if (bad) throw new ShaderError(`${kernel}.wgsl:${bad.lineNum - subgroups}:${bad.linePos}: ${bad.message}`);
    const visibility = GPUShaderStage.COMPUTE;
    const storage = bindings.map(({ binding, write }) => {
      return { binding, visibility, buffer: { type: write ? "storage" : "read-only-storage" } };
    });
    const entries = [{ binding: 0, visibility, buffer: { type: "uniform" } }, ...storage];
    const layout = this.device.createBindGroupLayout({ label, entries });
    const pipeline = await this.device.createComputePipelineAsync({
      label,
      layout: this.device.createPipelineLayout({ label, bindGroupLayouts: [layout] }),
      compute: { module, entryPoint: "main", constants: Object.fromEntries(overrides) },
    });
    return { pipeline, layout };
  }

  /** A buffer with its first content. `patches` are [word, value]. */
  buffer(data, blobs, patches = []) {
    const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC;
    const buffer = this.device.createBuffer({ size: data.bytes, usage, mappedAtCreation: true });
    const words = new Uint32Array(buffer.getMappedRange());
    if ("fill" in data.first) words.fill(data.first.fill);
    else words.set(blobs.words(data.first));
    for (const [word, value] of patches) words[word] = value;
    buffer.unmap();
    return buffer;
  }

  /**
   * Makes a program ready: pipelines compiled, buffers filled.
   *
   * `program` is `{buffers, actions}` of an export; `ids` are places of token ids, [buffer, word, value]. Buffers that no
   * dispatch writes and that hold no id are kept for the next program when `keep` is set. Returns what `run` takes.
   */
  async prepare({ buffers, actions }, blobs, { ids = [], keep = false } = {}) {
    const dispatches = actions.filter((action) => action.do === "dispatch");
    const start = performance.now();
    const pipelines = await Promise.all(dispatches.map((action) => this.pipeline(action)));
    this.compiling += performance.now() - start;
    const changing = new Set(ids.map(([buffer]) => buffer));
    for (const { bindings } of dispatches) {
      for (const { buffer, write } of bindings) if (write) changing.add(buffer);
    }
    const own = [];
    const made = new Map();
    const use = (index) => {
      if (made.has(index)) return made.get(index);
      const stays = keep && !changing.has(index);
      let buffer = stays ? this.kept.get(index) : undefined;
      if (!buffer) {
        const patches = ids.filter(([of]) => of === index).map(([, word, value]) => [word, value]);
        buffer = this.buffer(buffers[index], blobs, patches);
        if (stays) this.kept.set(index, buffer);
        else own.push(buffer);
      }
      made.set(index, buffer);
      return buffer;
    };
    // All parameters in one uniform buffer, each where a binding may begin.
    const stride = this.device.limits.minUniformBufferOffsetAlignment;
    const room = (bytes) => Math.ceil(bytes / stride) * stride;
    const size = dispatches.reduce((total, { params }) => total + room(params.bytes), stride);
    const uniform = this.device.createBuffer({ size, usage: GPUBufferUsage.UNIFORM, mappedAtCreation: true });
    own.push(uniform);
    const params = new Uint8Array(uniform.getMappedRange());
    let at = 0;
    const groups = dispatches.map((action, index) => {
      params.set(blobs.bytes(action.params), at);
      const entries = action.bindings.map(({ binding, buffer, offset, size }) => {
        return { binding, resource: { buffer: use(buffer), offset, size } };
      });
      entries.push({ binding: 0, resource: { buffer: uniform, offset: at, size: action.params.bytes } });
      at += room(action.params.bytes);
      return this.device.createBindGroup({ layout: pipelines[index].layout, entries });
    });
    uniform.unmap();
    const reads = actions.filter((action) => action.do === "read");
    const total = reads.reduce((sum, read) => sum + 4 * (read.words + 2 * read.guard), 0);
    const staging = this.device.createBuffer({
      size: Math.max(total, 4),
      usage: GPUBufferUsage.COPY_DST | GPUBufferUsage.MAP_READ,
    });
    own.push(staging);
    reads.forEach((read) => use(read.buffer));
    return { actions, pipelines, groups, staging, made, own };
  }

  /** Runs a prepared program; returns the words of every reading, and how long it took from here to the last word. */
  async run({ actions, pipelines, groups, staging, made }, poison) {
    const start = performance.now();
    const encoder = this.device.createCommandEncoder();
    let pass = null;
    let [dispatch, at] = [0, 0];
    const regions = [];
    for (const action of actions) {
      if (action.do === "dispatch") {
        pass ??= encoder.beginComputePass();
        pass.setPipeline(pipelines[dispatch].pipeline);
        pass.setBindGroup(0, groups[dispatch]);
        pass.dispatchWorkgroups(...action.grid);
        dispatch += 1;
      } else {
        pass?.end();
        pass = null;
        const words = action.words + 2 * action.guard;
        if (words > 0) encoder.copyBufferToBuffer(made.get(action.buffer), 0, staging, 4 * at, 4 * words);
        regions.push([at, action]);
        at += words;
      }
    }
    pass?.end();
    this.device.queue.submit([encoder.finish()]);
    await staging.mapAsync(GPUMapMode.READ);
    const milliseconds = performance.now() - start;
    const all = new Uint32Array(staging.getMappedRange()).slice();
    staging.unmap();
    const readings = regions.map(([first, { guard, words }]) => {
      const end = first + guard + words;
      const isWhole = (word) => word === poison;
      if (!all.subarray(first, first + guard).every(isWhole) || !all.subarray(end, end + guard).every(isWhole)) {
        throw new Error("a guard word beside a buffer was overwritten");
      }
      return all.subarray(first + guard, end);
    });
    return { readings, milliseconds };
  }

  /** Gives the buffers of a prepared program back. */
  release({ own }) {
    own.forEach((buffer) => buffer.destroy());
  }

  /** Runs `work` after what came before it, and throws what the device has to say about it. */
  scoped(work) {
    const turn = this.turn.then(() => this.work(work));
    this.turn = turn.catch(() => {});
    return turn;
  }

  async work(work) {
    this.device.pushErrorScope("out-of-memory");
    this.device.pushErrorScope("validation");
    let result;
    let thrown = null;
    try {
      result = await work();
    } catch (error) {
      thrown = error;
    }
    const errors = [await this.device.popErrorScope(), await this.device.popErrorScope()].filter(Boolean);
    if (this.lost !== null) throw new Error(`the device was lost: ${this.lost}`);
    // It names the line; what the scopes caught is the same error without the file.
    if (thrown instanceof ShaderError) throw thrown;
    if (errors.length) throw new Error(errors[0].message || "the device has no memory left");
    if (this.errors.length) throw new Error(this.errors.shift());
    if (thrown) throw thrown;
    return result;
  }
}
