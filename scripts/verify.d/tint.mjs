// Gives shaders to Dawn (npm `webgpu`), whose compiler is tint: each file as a module, then as a compute pipeline at each of its override
// settings.
//
//     node tint.mjs < list
//
// reads a line "FILE <tab> {overrides as JSON}" a setting, settings of one file together, and answers each with "ok <tab> FILE",
// "FAILED <tab> FILE <tab> MESSAGE" or "not run <tab> FILE <tab> WHY". The first line is "version <tab> ADAPTER".
import fs from 'node:fs';
import { create, globals } from 'webgpu';

Object.assign(globalThis, globals);
const say = (...fields) => console.log(fields.map(field => String(field).replace(/\s+/g, ' ')).join('\t'));
// Named, so that it lives as long as its devices.
const gpu = create(['backend=vulkan']);
const adapter = await gpu.requestAdapter();
if (!adapter) {
    console.error('Dawn finds no Vulkan adapter');
    process.exit(2);
}
const room = adapter.limits.maxComputeWorkgroupStorageSize;
const device = await adapter.requestDevice({
    requiredFeatures: ['subgroups', 'shader-f16'].filter(feature => adapter.features.has(feature)),
    requiredLimits: { maxComputeWorkgroupStorageSize: room },
});
say('version', adapter.info.device, adapter.info.description);

// What tint says of a file; empty when nothing, warnings included.
async function opened(file) {
    device.pushErrorScope('validation');
    const module = device.createShaderModule({ code: fs.readFileSync(file, 'utf8') });
    const { messages } = await module.getCompilationInfo();
    const error = await device.popErrorScope();
    const said = messages.map(message => `${message.lineNum}:${message.linePos} ${message.type}: ${message.message}`);
    return { module, problem: said.join(' | ') || error?.message || '' };
}

let current = '', open;
for (const line of fs.readFileSync(0, 'utf8').split('\n').filter(line => line)) {
    const [file, overrides] = line.split('\t');
    if (file !== current) [current, open] = [file, await opened(file)];
    if (open.problem) {
        say('FAILED', file, open.problem);
        continue;
    }
    const compute = { module: open.module, entryPoint: 'main', constants: JSON.parse(overrides) };
    try {
        await device.createComputePipelineAsync({ layout: 'auto', compute });
        say('ok', file);
    } catch (error) {
        const used = /workgroup storage .*?\((\d+) bytes\)|uses (\d+) bytes/.exec(error.message);
        const needed = used ? Number(used[1] ?? used[2]) : 0;
        if (needed > room) say('not run', file, `needs more than this adapter's ${room} bytes of workgroup memory`);
        else say('FAILED', file, `${overrides}: ${error.message}`);
    }
}
process.exit(0);
