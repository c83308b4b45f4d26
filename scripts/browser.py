"""Serves the repository on localhost and drives a headless Chromium on web/index.html, with nothing but the standard library.

Called by browser.sh, which explains it. Exit 0: every comparison holds; 1: one does not, or nothing was compared; 77: the
browser has no WebGPU here, and `not run: why` was printed.
"""

import argparse
import base64
import contextlib
import functools
import http.server
import json
import os
import pathlib
import re
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOT_RUN = 77
# What the page says of a browser that cannot run it.
NO_WEBGPU = re.compile("has no WebGPU|finds no adapter")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
]


class Fault:
    """A file that is served with another text: what the page must notice. `wanted` stands in what it says."""

    def __init__(self, name, path, old, new, wanted):
        self.name, self.path, self.old, self.new, self.wanted = name, path, old, new, wanted

    def apply(self, text):
        if text.count(self.old) < 1:
            raise RuntimeError(f"the fault `{self.name}` finds no `{self.old}` in {self.path}")
        return text.replace(self.old, self.new)


# The case that they are planted for is one of FAULT_CASE; its kernel adds `delta` to `stream`.
FAULT_CASE = "residual_add/65"
KERNEL = "/shaders/residual_add.wgsl"
DISAGREES = "disagrees with the library"
FAULTS = [
    Fault("a kernel that computes something else", KERNEL, "+= params.factor * delta[i]", "-= params.factor * delta[i]", "relative error"),
    Fault("a kernel that leaves the last element out", KERNEL, "i < params.elements", "i + 1 < params.elements", "worst element 64"),
    Fault("a kernel that does not compile", KERNEL, "stream[i] +=", "stream[i] =+", "residual_add.wgsl:"),
    Fault("a kernel that writes NaN", KERNEL, "+= params.factor * delta[i]", "= bitcast<f32>(params.elements | 0x7fc00000u)", "NaN"),
    Fault("guard words of another kind", "/web/data/index.json", '"poison":2143346349', '"poison":2143346348', "guard word"),
    Fault("a comparator that sees no error", "/web/compare.js", "excess > tolerance.element || error", "false && error", DISAGREES),
    Fault("a comparator without positions", "/web/compare.js", "if (different >= 0) {", "if (false) {", DISAGREES),
    Fault("a tokenizer without merges", "/web/tokenizer.js", "if (at < 0) return symbols;", "return symbols;", "tokens of"),
    Fault("a reference with another scale", "/web/reference.js", "1 / Math.sqrt(query)", "1 / query", "reference is off"),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Files of the repository, without a line for each; of the planted fault, its text."""

    fault = None

    protocol_version = "HTTP/1.1"
    extensions_map = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".json": "application/json", "": "text/plain"}

    def log_message(self, *_):
        pass

    def do_GET(self):
        fault = Quiet.fault
        if fault is None or self.path.split("?")[0] != fault.path:
            super().do_GET()
            return
        body = fault.apply(pathlib.Path(ROOT, fault.path[1:]).read_text()).encode()
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(fault.path))
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)


def serve(port):
    handler = functools.partial(Quiet, directory=ROOT)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class Tab:
    """One page of a browser, by the DevTools protocol over a WebSocket (RFC 6455)."""

    def __init__(self, url):
        host, port, path = re.fullmatch(r"ws://([^:/]+):(\d+)(/.*)", url).groups()
        self.socket = socket.create_connection((host, int(port)), timeout=60)
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        head = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        self.socket.sendall(f"{head}Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        self.buffer = b""
        while b"\r\n\r\n" not in self.buffer:
            self.buffer += self._more()
        answer, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        if b" 101 " not in answer.split(b"\r\n", 1)[0] + b" ":
            raise RuntimeError(f"the browser refused a WebSocket: {answer[:80]!r}")
        self.number = 0

    def _more(self):
        data = self.socket.recv(1 << 16)
        if not data:
            raise RuntimeError("the browser closed the connection")
        return data

    def _take(self, count):
        while len(self.buffer) < count:
            self.buffer += self._more()
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def _send(self, code, data):
        size = len(data)
        if size < 126:
            length = bytes([0x80 | size])
        else:
            length = struct.pack(">BH", 0xFE, size) if size < 1 << 16 else struct.pack(">BQ", 0xFF, size)
        mask = secrets.token_bytes(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
        self.socket.sendall(bytes([0x80 | code]) + length + mask + masked)

    def _receive(self):
        message = b""
        while True:
            first, second = self._take(2)
            size = second & 127
            if size == 126:
                size = struct.unpack(">H", self._take(2))[0]
            elif size == 127:
                size = struct.unpack(">Q", self._take(8))[0]
            data = self._take(size)
            code = first & 15
            if code == 8:
                raise RuntimeError("the browser closed the page")
            if code == 9:
                self._send(10, data)
            elif code < 3:
                message += data
                if first & 0x80:
                    return json.loads(message)

    def call(self, method, **parameters):
        self.number += 1
        self._send(1, json.dumps({"id": self.number, "method": method, "params": parameters}).encode())
        while True:
            answer = self._receive()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error'].get('message')}")
                return answer["result"]

    def evaluate(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, expression, seconds):
        """The value of an expression once it is not null; the page's own problem ends the waiting."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = self.evaluate(expression)
            if value is not None:
                return value
            problem = self.evaluate("window.egmla?.problem ?? null")
            if problem is not None:
                raise PageError(problem)
            time.sleep(0.2)
        raise PageError(f"after {seconds} s the page still waits for {expression}")


class PageError(RuntimeError):
    """What the page says keeps it from working."""


class StartError(RuntimeError):
    """Why there is no browser to drive."""


@contextlib.contextmanager
def browser(program, flags):
    """A Chromium with a profile of its own; yields the address of its DevTools."""
    profile = tempfile.mkdtemp(prefix="egmla-browser-")
    command = [program, *flags, f"--user-data-dir={profile}", "about:blank"]
    log = open(os.path.join(profile, "log"), "wb")
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        port_file = pathlib.Path(profile, "DevToolsActivePort")
        end = time.monotonic() + 90
        while not (port_file.is_file() and port_file.read_text().strip()):
            if process.poll() is not None or time.monotonic() > end:
                tail = pathlib.Path(profile, "log").read_text(errors="replace").strip().splitlines()[-3:]
                raise StartError(f"Chromium does not start: {' / '.join(tail)}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port_file.read_text().split()[0]}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()
        shutil.rmtree(profile, ignore_errors=True)


def open_tab(devtools, url):
    pages = json.load(urllib.request.urlopen(f"{devtools}/json/list", timeout=60))
    tab = Tab(next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page"))
    tab.call("Page.enable")
    tab.call("Page.navigate", url=url)
    return tab


def type_text(tab, text):
    """Replaces what stands in the text field, as a visitor's keyboard would."""
    tab.evaluate("document.getElementById('text').focus(); document.getElementById('text').select()")
    tab.call("Input.insertText", text=text)


def screenshots(tab, folder):
    for width in (1100, 380):
        tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        for scheme in ("light", "dark"):
            tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            time.sleep(0.3)
            image = tab.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
            pathlib.Path(folder, f"{scheme}_{width}.png").write_bytes(base64.b64decode(image["data"]))
    tab.call("Emulation.clearDeviceMetricsOverride")


def run_demo(tab, seconds):
    """Types two texts, with the cache in f32 and in f16; returns the largest error, or raises."""
    runs = 0
    for storage in ("f32", "f16"):
        select = f"(s => {{ s.value = '{storage}'; s.dispatchEvent(new Event('change')); }})(document.getElementById('storage'))"
        tab.evaluate(select)
        for text in ("What's in a name? that which we call a rose", "O"):
            type_text(tab, text)
            quoted = json.dumps(text)
            wanted = f"window.egmla.demo?.text === {quoted} && window.egmla.demo.results.every(r => r.storage === '{storage}')"
            done = tab.wait(f"{wanted} ? window.egmla.demo : null", seconds)
            if done.get("problem") or len(done["results"]) < 2:
                raise PageError(f"the demo on {text!r}: {done.get('problem', 'too few results')}")
            for one in done["results"]:
                good = one["problem"] is None and 0 <= one["error"] <= one["tolerance"] and 0 <= one["decoded"] <= one["tolerance"]
                if not good:
                    raise PageError(f"the demo on {text!r}, {one['storage']} {one['path']}: {one['problem']} (error {one['error']})")
                yield one
                runs += 1
            shown = tab.evaluate("document.getElementById('status').textContent")
            if shown != "Every result is within its tolerance.":
                raise PageError(f"the demo shows {shown!r}")
    if runs < 8:
        raise PageError(f"the demo ran {runs} times only")


def plant_faults(tab, address):
    """Shows that the page can fail: serves one fault after another, and requires that it is told."""
    for fault in FAULTS:
        Quiet.fault = fault
        try:
            tab.call("Network.clearBrowserCache")
            tab.evaluate("window.egmla = { check: null, problem: null }")
            tab.call("Page.navigate", url=f"{address}?check&filter={FAULT_CASE}")
            check = tab.wait("window.egmla?.check ?? null", 180)
            problems = [row["problem"] for row in check.get("rows", []) if row["problem"]]
            said = "; ".join(problems) or check.get("problem") or f"{check.get('passed')} right"
        except PageError as error:
            if NO_WEBGPU.search(str(error)):
                raise
            said = str(error)
        finally:
            Quiet.fault = None
        if fault.wanted not in said:
            raise PageError(f"{fault.name} was not noticed: {said}")
    return len(FAULTS)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="serve the page for a visitor, until interrupted")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--filter", default="", help="only the cases whose id contains this")
    parser.add_argument("--quick", action="store_true", help="leave most cases of whole layers out")
    parser.add_argument("--subgroups", action="store_true", help="print MIN:MAX of the browser's subgroups, and nothing else")
    parser.add_argument("--screenshots", metavar="DIR", help="write pictures of the page")
    parser.add_argument("--json", metavar="FILE", help="write the whole result")
    parser.add_argument("--seconds", type=int, default=1500, help="the longest that the check may take")
    parser.add_argument("--chromium", default="chromium")
    options = parser.parse_args()

    server = serve(options.port)
    address = f"http://localhost:{server.server_address[1]}/web/"
    if options.serve:
        print(f"open {address}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        return 0
    try:
        version = subprocess.run([options.chromium, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise StartError(f"Chromium does not start: {error}") from None
    version = (re.findall(r"\d+(?:\.\d+)+", version) or ["of unknown version"])[0]
    start = time.monotonic()
    with browser(options.chromium, FLAGS) as devtools:
        if options.subgroups:
            sizes = "`${a.info.subgroupMinSize}:${a.info.subgroupMaxSize}`"
            probe = f"navigator.gpu?.requestAdapter().then(a => a?.features.has('subgroups') ? {sizes} : '')"
            tab = open_tab(devtools, address + "style.css")
            time.sleep(1)
            answer = tab.call("Runtime.evaluate", expression=f"({probe})", awaitPromise=True, returnByValue=True)
            print(answer["result"].get("value") or "")
            return 0
        tab = open_tab(devtools, "about:blank")
        tab.call("Network.enable")
        try:
            faults = plant_faults(tab, address)
            print(f"browser: {faults} planted faults noticed", flush=True)
            tab.call("Network.clearBrowserCache")
            tab.call("Page.navigate", url=address + ("?quick" if options.quick else ""))
            tab.wait("window.egmla?.ready || null", 180)
            demo = list(run_demo(tab, 300))
            worst = max(demo, key=lambda one: one["error"] / one["tolerance"])
            print(
                f"browser: demo: {len(demo)} runs of a typed text right, worst error {worst['error']:.1e} of {worst['tolerance']:.0e}"
                f" ({worst['storage']} {worst['path']})",
                flush=True,
            )
            quoted = json.dumps(options.filter)
            tab.evaluate(f"document.getElementById('filter').value = {quoted}; document.getElementById('start').click()")
            check = tab.wait("window.egmla.check", options.seconds)
            type_text(tab, "JULIET:\nWhat's in a name? that which we call a rose\nBy any other name would smell as sweet;")
            tab.wait("window.egmla.demo?.text.startsWith('JULIET') || null", 300)
            if options.screenshots:
                pathlib.Path(options.screenshots).mkdir(parents=True, exist_ok=True)
                screenshots(tab, options.screenshots)
        except PageError as error:
            if NO_WEBGPU.search(str(error)):
                print(f"browser: not run: Chromium {version}: {error}")
                return NOT_RUN
            print(f"browser: Chromium {version}: FAILED: {error}")
            return 1
    return report(check, version, time.monotonic() - start, options)


def report(check, version, seconds, options):
    """Prints the verdict; returns the exit code."""
    if "problem" in check:
        print(f"browser: Chromium {version}: FAILED: {check['problem']}")
        return 1
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(check))
    reasons = {}
    for row in check["rows"]:
        if row["skipped"] is not None:
            reasons.setdefault((row["kernel"], row["skipped"]), []).append(row)
        elif row["problem"] is not None:
            print(f"browser: FAILED: {row['id']} ({row['tuning']}): {row['problem']}")
    for (kernel, reason), rows in reasons.items():
        print(f"browser: {kernel}: {reason} ({len(rows)} cases)")
    worst = check["worst"]
    # JSON has no infinity.
    error = "infinite" if worst and worst["error"] is None else f"{worst['error']:.2e}" if worst else ""
    largest = f"worst error {error} ({worst['id']})" if worst else "nothing was compared"
    subset = f" without {check['leftOut']} of layers" if check["leftOut"] else ""
    subset += f", only those with `{options.filter}`" if options.filter else ""
    print(
        f"browser: Chromium {version}, {check['cases']} cases{subset}, {check['passed']} right, {check['failed']} wrong,"
        f" {check['skipped']} not run, {check['kernels']} kernels, {largest}, {seconds:.0f} s"
        f" ({check['compiling']:.0f} s of it waiting for pipelines)"
    )
    good = check["complete"] and check["passed"] > 0 and check["failed"] == 0 and check["cases"] > 0
    return 0 if good else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except StartError as error:
        print(f"browser: not run: {error}")
        sys.exit(NOT_RUN)
