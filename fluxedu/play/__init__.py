"""The miniature in a web page: ``fluxedu play`` serves it on this computer, ``copy_to`` writes it for any web host.

The page is a folder of files and computes everything in the browser, with ONNX Runtime's WASM build. It loads the same
safetensors files as Python; ``graphs/`` holds the operations (``web/export.py`` writes them), ``static/`` the
front end (``node web/build.mjs`` writes it). Nothing here imports torch.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fluxedu.errors import RequestError, check_integer

STATIC = Path(__file__).parent / "static"
GRAPHS = Path(__file__).parent / "graphs"
WEIGHTS = Path(__file__).parents[1] / "nano" / "weights"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webp": "image/webp",
}
#: files that are compressed for a web host, which may not do it by itself; the page expands them
COMPRESSED = (".safetensors", ".onnx")


def files() -> dict[str, Path]:
    """Everything that the page consists of: its name in the page's folder -> the file."""
    manifest = json.loads((GRAPHS / "manifest.json").read_text(encoding="utf-8"))
    found = {path.name: path for path in sorted(STATIC.iterdir()) if path.is_file()}
    found |= {f"graphs/{path.name}": path for path in sorted(GRAPHS.iterdir()) if path.suffix in (".onnx", ".json")}
    for settings in manifest["tokenizers"].values():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            found[f"{settings['folder']}/{name}"] = WEIGHTS / settings["folder"] / name
    for weights in manifest["weights"].values():
        for name in sorted({segment[0] for segment in weights["segments"]}):
            found[name] = WEIGHTS / name
    return found


def version() -> str:
    """A hash of the names and the contents of all files; the page's copy in a browser is kept for one version."""
    digest = hashlib.sha256()
    for name, path in sorted(files().items()):
        digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def contents(compress: bool = False) -> dict[str, bytes]:
    """The page's folder: name -> bytes, with ``files.json``, the list of its files and their sizes in bytes.

    compress: weights and graphs are compressed by gzip; their names then end in ``.gz``.
    """
    folder, listed = {}, {}
    for name, path in files().items():
        data, url = path.read_bytes(), name
        if compress and path.suffix in COMPRESSED:
            data, url = gzip.compress(data, 9, mtime=0), f"{name}.gz"
        folder[url] = data
        listed[name] = {"bytes": len(data)} | ({} if url == name else {"url": url})
    listing = {"version": version(), "files": listed}
    folder["files.json"] = json.dumps(listing, indent=1).encode()
    if "sw.js" in folder:  # its bytes change with the version, which makes browsers load the new files
        folder["sw.js"] = f'self.VERSION="{listing["version"]}";\n'.encode() + folder["sw.js"]
    return folder


def copy_to(folder: str | Path) -> int:
    """Write the page into ``folder`` for a web host, weights and graphs compressed; returns the number of bytes."""
    folder, written = Path(folder), contents(compress=True)
    for name, data in written.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return sum(map(len, written.values()))


# ---------------------------------------------------------------- on this computer


def make_server(port: int = 0) -> ThreadingHTTPServer:
    """A server of the page for this computer alone; 0 takes any free port. Raises RequestError for a port in use."""
    check_integer("port", port, 0, 65535, "8899 is the default")
    folder = contents()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = unquote(urlsplit(self.path).path).lstrip("/") or "index.html"
            data = folder.get(name)
            self.send_response(404 if data is None else 200)
            data = b"not found" if data is None else data
            self.send_header("Content-Type", TYPES.get(Path(name).suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-cache")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *arguments) -> None:
            pass

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise RequestError(f"port must be free, but {port} is not ({error.strerror}); choose another port.") from None


def serve(port: int = 8899, open_browser: bool = True) -> None:
    """Serve the page on this computer until Ctrl-C, and open it in the browser."""
    with make_server(port) as server:
        address = f"http://localhost:{server.server_port}/"
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        if open_browser:
            webbrowser.open(address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
