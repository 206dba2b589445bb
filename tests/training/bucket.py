"""A stand-in for Google Cloud Storage: a bucket in memory behind as much of the JSON API as TensorStore's driver, gcsfs
and Google's client use. No authentication, no versions kept, and none of a real bucket's limits and delays.
"""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Bucket(ThreadingHTTPServer):
    """``objects`` are (content, generation) by name. Any bucket's name is this bucket. ``forbidden`` refuses all."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.sessions: dict[str, tuple[str, bytes]] = {}  # of resumable uploads
        self.lock, self.count = threading.RLock(), 0
        self.forbidden = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up early is no error."""

    @property
    def environment(self) -> dict[str, str]:
        url = f"http://127.0.0.1:{self.server_port}"
        return {
            "TENSORSTORE_GCS_HTTP_URL": url,
            "STORAGE_EMULATOR_HOST": url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def put(self, name: str, content: bytes) -> dict[str, Any]:
        with self.lock:
            self.count += 1
            self.objects[name] = (content, self.count)
            return self.describe(name)

    def describe(self, name: str) -> dict[str, Any]:
        content, generation = self.objects[name]
        fields = {"generation": str(generation), "metageneration": "1", "size": str(len(content))}
        times = dict.fromkeys(("timeCreated", "updated"), "2026-01-01T00:00:00.000Z")
        return {"kind": "storage#object", "name": name, "bucket": "bucket", "etag": str(generation), **fields, **times}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bucket

    def do_GET(self) -> None:
        name, query = self.parsed()
        if self.server.forbidden:
            self.answer({"error": {"code": 403, "message": "forbidden"}}, 403)
        elif name is None:
            self.answer({"name": "bucket", "location": "US", "hierarchicalNamespace": {"enabled": False}})
        elif name == "":
            self.answer(self.listing(query))
        elif name not in self.server.objects:
            self.answer({"error": {"code": 404, "message": f"no object {name}"}}, 404)
        elif query.get("alt") != "media":
            self.answer(self.server.describe(name))
        else:
            self.media(*self.server.objects[name])

    def do_POST(self) -> None:
        if self.path.startswith("/session/"):
            return self.do_PUT()
        name, query = self.parsed()
        body = self.body()
        if copied := re.search(r"/o/([^/]+)/(?:rewriteTo|copyTo)/b/[^/]+/o/([^/?]+)", self.path):
            content, _ = self.server.objects[unquote(copied[1])]
            done = self.server.put(unquote(copied[2]), content)
            self.answer(
                {"done": True, "resource": done, "totalBytesRewritten": done["size"], "objectSize": done["size"]}
            )
        elif query["uploadType"] == "media":
            self.store(query["name"], body, query)
        elif query["uploadType"] == "multipart":
            message = BytesParser().parsebytes(
                b"Content-Type: " + self.headers["Content-Type"].encode() + b"\n\n" + body
            )
            about, content = (part.get_payload(decode=True) for part in message.get_payload())
            # The parser takes line ends for text's; what lies between the part's own header and the boundary is exact.
            boundary = b"\r\n--" + message.get_boundary().encode()
            content = body.rsplit(boundary, 1)[0].split(boundary, 1)[1].split(b"\r\n\r\n", 1)[1]
            self.store(query.get("name") or json.loads(about)["name"], content, query)
        else:
            name = query.get("name") or json.loads(body)["name"]
            session = str(len(self.server.sessions))
            self.server.sessions[session] = (name, b"")
            url = f"{self.server.environment['STORAGE_EMULATOR_HOST']}/session/{session}"
            self.answer({}, headers={"Location": url})

    def do_PUT(self) -> None:
        session = self.path.split("?")[0].rsplit("/", 1)[1]
        body = self.body()
        name, before = self.server.sessions[session]
        self.server.sessions[session] = (name, before + body)
        if (self.headers.get("Content-Range") or "/0").endswith("/*"):
            self.answer({}, 308, {"Range": f"bytes=0-{len(before + body) - 1}"})
        else:
            self.answer(self.server.put(name, before + body))

    def do_DELETE(self) -> None:
        name, _ = self.parsed()
        with self.server.lock:
            found = self.server.objects.pop(name, None)
        self.answer({} if found else {"error": {"code": 404, "message": f"no object {name}"}}, 204 if found else 404)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def parsed(self) -> tuple[str | None, dict[str, str]]:
        """The object's name ("" for all, None for the bucket itself) and the query."""
        url = urlsplit(self.path)
        found = re.search(r"/b/[^/]+/o(?:/([^/]+))?$", url.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        return (unquote(found[1] or "") if found else None), query

    def listing(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        with self.server.lock:
            for name in sorted(self.server.objects):
                rest = name[len(prefix) :]
                inside = name.startswith(prefix)
                inside &= query.get("startOffset", "") <= name < query.get("endOffset", "\U0010ffff")
                if inside and delimiter and delimiter in rest:
                    prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
                elif inside:
                    items.append(self.server.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def store(self, name: str, content: bytes, query: dict[str, str]) -> None:
        with self.server.lock:
            wanted = query.get("ifGenerationMatch")
            if wanted is not None and int(wanted) != self.server.objects.get(name, (b"", 0))[1]:
                self.answer({"error": {"code": 412, "message": "generation"}}, 412)
            else:
                self.answer(self.server.put(name, content))

    def media(self, content: bytes, generation: int) -> None:
        headers = {"x-goog-generation": str(generation), "ETag": str(generation)}
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            start = int(wanted[1]) if wanted[1] else len(content) - int(wanted[2])
            end = min(int(wanted[2]) + 1 if wanted[1] and wanted[2] else len(content), len(content))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            if start >= len(content):
                self.answer({"error": {"code": 416, "message": "range"}}, 416)
            else:
                self.answer(content[start:end], 206, headers)
        else:
            self.answer(content, 200, headers)

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        data = b"" if status == 204 else data
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json; charset=UTF-8"
        for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *values: object) -> None:
        pass


@contextlib.contextmanager
def bucket() -> Iterator[Bucket]:
    with Bucket() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
