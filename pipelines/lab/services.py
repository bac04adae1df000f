"""What the lab's servers offer, by role: real protocols over real sockets."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import asyncssh
from aiohttp import web
from dnslib import QTYPE, RCODE, RR, A, DNSError, DNSRecord

from flowsage.pipelines.lab.node import NETWORK_ERRORS, Node
from flowsage.pipelines.lab.plan import PUBLIC_ZONE, RESOLVER, USERS, ZONE

Service = Callable[[Node], Awaitable[None]]

_DNS_TTL_S = 45


def _page_bytes(path: str) -> int:
    """Size of the document at a path: fixed for the path, spread like web objects (0.4 to 100 kB)."""
    draw = int.from_bytes(hashlib.blake2s(path.encode(), digest_size=4).digest(), "big") / 2**32
    return int(400 * 250**draw)


def http(*ports: int) -> Service:
    """A web server: GET anything for a document of its path's size, GET /download/BYTES, POST /upload."""

    async def serve(node: Node) -> None:
        async def document(request: web.Request) -> web.Response:
            return web.Response(body=node.filler[: _page_bytes(request.path)], content_type="text/html")

        async def download(request: web.Request) -> web.StreamResponse:
            size = int(request.match_info["size"])
            response = web.StreamResponse(headers={"Content-Length": str(size)})
            await response.prepare(request)
            for piece in node.bulk(size):
                await response.write(piece)
            return response

        async def upload(request: web.Request) -> web.Response:
            received = 0
            async for piece in request.content.iter_any():
                received += len(piece)
            node.counters["upload_bytes"] += received
            return web.Response(text=f"{received}\n")

        app = web.Application()
        app.router.add_get(r"/download/{size:\d+}", download)
        app.router.add_post("/upload", upload)
        app.router.add_get("/{path:.*}", document)
        runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        for port in ports:
            await web.TCPSite(runner, "0.0.0.0", port).start()
        node.keep.append(runner)

    return serve


class _DnsServer(asyncio.DatagramProtocol):
    """Answers for a zone; what it does not know it asks `upstream` for, if there is one, and remembers."""

    def __init__(self, node: Node, zone: dict[str, str], upstream: str | None) -> None:
        self.node = node
        self.zone = zone
        self.upstream = upstream
        self.learnt: dict[str, tuple[str, float]] = {}
        self.busy: set[asyncio.Task[None]] = set()
        self.transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        try:
            query = DNSRecord.parse(data)
        except DNSError:
            self.node.counters["dns_malformed"] += 1
            return
        task = asyncio.create_task(self._answer(query, addr))
        self.busy.add(task)
        task.add_done_callback(self.busy.discard)

    async def _find(self, name: str) -> str | None:
        if name in self.zone:
            return self.zone[name]
        known = self.learnt.get(name)
        if known and known[1] > time.monotonic():
            return known[0]
        if self.upstream is None:
            return None
        try:
            address = await self.node.resolve(name, self.upstream)
        except NETWORK_ERRORS:
            return None
        self.learnt[name] = (address, time.monotonic() + _DNS_TTL_S)
        return address

    async def _answer(self, query: DNSRecord, client: tuple[str | Any, int]) -> None:
        name = str(query.q.qname).rstrip(".")
        address = await self._find(name)
        reply = query.reply()
        if address is None:
            reply.header.rcode = RCODE.NXDOMAIN
        else:
            reply.add_answer(RR(query.q.qname, QTYPE.A, rdata=A(address), ttl=_DNS_TTL_S))
        self.node.counters["dns_answered"] += 1
        if self.transport:
            self.transport.sendto(reply.pack(), client)


async def dns(node: Node) -> None:
    """The network's DNS server: its own zone, the rest from the resolver outside."""
    await _listen(node, 53, lambda: _DnsServer(node, ZONE, RESOLVER))


async def resolver(node: Node) -> None:
    """The outside world's DNS. Bound to its one address, or answers would leave from the host's first."""
    await _listen(node, 53, lambda: _DnsServer(node, PUBLIC_ZONE, None), RESOLVER)


async def _listen(
    node: Node, port: int, factory: Callable[[], asyncio.DatagramProtocol], address: str = "0.0.0.0"
) -> None:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(factory, local_addr=(address, port))
    node.keep.append(transport)


class _Echo(asyncio.DatagramProtocol):
    """Sends back what came (NTP's shape: 48 bytes each way), or with `silent` only takes it (syslog's)."""

    def __init__(self, node: Node, *, silent: bool) -> None:
        self.node = node
        self.silent = silent
        self.transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        self.node.counters["datagrams_received"] += 1
        if not self.silent and self.transport:
            self.transport.sendto(data, addr)


async def clock(node: Node) -> None:
    """Time of day on udp/123."""
    await _listen(node, 123, lambda: _Echo(node, silent=False))


async def log_sink(node: Node) -> None:
    """Syslog and telemetry on udp/514: taken, never answered."""
    await _listen(node, 514, lambda: _Echo(node, silent=True))


def blocks(port: int) -> Service:
    """A file service: "GET BYTES" sends that many, "PUT BYTES" takes as many and says OK. Lines end in a newline."""

    async def serve(node: Node) -> None:
        async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while line := await reader.readline():
                    verb, _, number = line.decode("latin-1").strip().partition(" ")
                    if verb not in ("GET", "PUT") or not number.isdigit():
                        break
                    left = int(number)
                    if verb == "GET":
                        for piece in node.bulk(left):
                            writer.write(piece)
                            await writer.drain()
                    else:
                        while left > 0 and (piece := await reader.read(min(left, 1 << 16))):
                            left -= len(piece)
                        writer.write(b"OK\n")
                        await writer.drain()
                    node.counters["blocks_served"] += 1
            except (OSError, ValueError):
                node.counters["blocks_broken"] += 1
            finally:
                writer.close()

        node.keep.append(await asyncio.start_server(client, "0.0.0.0", port))

    return serve


class _SshServer(asyncssh.SSHServer):
    """Password logins for the lab's people; every other password is wrong."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def begin_auth(self, username: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        right = USERS.get(username) == password
        self.node.counters["ssh_logins" if right else "ssh_refused"] += 1
        return right


async def ssh(node: Node) -> None:
    """An SSH server with a shell that answers each line with some text."""

    async def shell(process: asyncssh.SSHServerProcess[str]) -> None:
        try:
            async for line in process.stdin:
                if line.strip() == "exit":
                    break
                process.stdout.write(node.filler[: node.size(300, 1.2, 30_000)].hex() + "\n$ ")
        except asyncssh.Error:
            pass
        process.exit(0)

    server = await asyncssh.create_server(
        lambda: _SshServer(node),
        "0.0.0.0",
        22,
        server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
        process_factory=shell,
        line_editor=False,
    )
    node.keep.append(server)


SERVICES: dict[str, tuple[Service, ...]] = {
    "gateway": (clock,),
    "dns": (dns,),
    "web": (http(80), ssh),
    "app": (http(8080), ssh),
    "files": (blocks(445), ssh),
    "jump": (ssh,),
    "backup": (blocks(873),),
    "monitor": (log_sink,),
    "printer": (blocks(9100), http(80)),
    "camera": (http(80),),
    "office": (blocks(445),),
    "finance": (blocks(445),),
    "sites": (http(80, 443), resolver),
    "c2": (http(443),),
    "dropzone": (http(443),),
}
"""Role to what it offers. Outside servers speak plain HTTP on tcp/443: the records see ports and sizes, not content."""
