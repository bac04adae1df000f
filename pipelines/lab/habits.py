"""What the lab's people and machines do all day, by role.

Think times are log-normal, web sites are popular by Zipf's law, sizes are log-normal, machines keep periods with
jitter. Everything that can be drawn is drawn from the host's own seeded dice.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from itertools import accumulate

import aiohttp
import asyncssh

from flowsage.pipelines.lab.node import Node
from flowsage.pipelines.lab.plan import ADDRESS, BY_NAME, DOMAIN, HOSTS, RETIRED, SITES, USERS

Habit = Callable[[Node], Awaitable[None]]

_TIMEOUT = aiohttp.ClientTimeout(total=20)
_POPULARITY = list(accumulate(1 / (rank + 1) ** 1.1 for rank in range(len(SITES))))
_MISTYPED = ("intrnet", "wikki", "printer2", "wpad", "isatap")


async def _get(session: aiohttp.ClientSession, node: Node, url: str, host: str) -> None:
    async with session.get(url, headers={"Host": host}) as response:
        async for _ in response.content.iter_any():
            pass
    node.counters["http_ok"] += 1


async def _visit(node: Node, name: str, port: int, path: str, objects: int, local: str | None = None) -> None:
    """Resolve a site, fetch a page, then its objects over up to two kept connections."""
    address = await node.resolve(name)
    connector = aiohttp.TCPConnector(limit=2, local_addr=(local, 0) if local else None)
    async with aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT) as session:
        base = f"http://{address}:{port}"
        await _get(session, node, f"{base}/{path}", name)
        async with asyncio.TaskGroup() as group:
            for number in range(objects):
                group.create_task(_get(session, node, f"{base}/{path}/{number}", name))


def _flat(habit: Habit) -> Habit:
    """A habit whose task group failed reports the first of its errors, so that it counts as one network error."""

    async def run(node: Node) -> None:
        try:
            await habit(node)
        except ExceptionGroup as group:
            raise group.exceptions[0] from group

    run.__name__ = habit.__name__
    return run


async def browse_outside(node: Node) -> None:
    """A person reads the web: a site by popularity, a page, a few objects."""
    await node.pause(5)
    site = node.rng.choices(range(len(SITES)), cum_weights=_POPULARITY)[0]
    port = 443 if node.rng.random() < 0.8 else 80
    objects = min(int(node.rng.expovariate(1 / 2.5)), 8)
    await _visit(node, f"www.site{site:02d}.example", port, f"page{node.rng.randrange(30)}", objects)


async def browse_inside(node: Node) -> None:
    """The intranet or the wiki; developers live in the wiki."""
    await node.pause(6)
    wiki = node.rng.random() < (0.7 if node.plan.role == "developer" else 0.25)
    name, port = (f"wiki.{DOMAIN}", 8080) if wiki else (f"intranet.{DOMAIN}", 80)
    await _visit(node, name, port, f"doc{node.rng.randrange(200)}", node.rng.randrange(3))


async def mistype(node: Node) -> None:
    """Now and then a name is asked for that does not exist."""
    await node.pause(60)
    await node.resolve(f"{node.rng.choice(_MISTYPED)}.{DOMAIN}")


async def _transfer(node: Node, address: str, port: int, verb: str, size: int) -> None:
    """GET or PUT some bytes at a file service."""
    reader, writer = await asyncio.wait_for(asyncio.open_connection(address, port), 10)
    try:
        writer.write(f"{verb} {size}\n".encode())
        if verb == "PUT":
            for piece in node.bulk(size):
                writer.write(piece)
                await writer.drain()
            await asyncio.wait_for(reader.readline(), 30)
        else:
            left = size
            while left > 0 and (piece := await asyncio.wait_for(reader.read(1 << 16), 30)):
                left -= len(piece)
        node.counters["transfers_ok"] += 1
        node.counters["transfer_bytes"] += size
    finally:
        writer.close()


async def use_files(node: Node) -> None:
    """Open and save documents on the file server; finance does it most."""
    await node.pause(6 if node.plan.role == "finance" else 12)
    address = await node.resolve(f"files.{DOMAIN}")
    verb = "PUT" if node.rng.random() < 0.3 else "GET"
    await _transfer(node, address, 445, verb, node.size(60_000, 1.3, 3_000_000))


async def download(node: Node) -> None:
    """A large file from a popular site."""
    await node.pause(30)
    site = node.rng.choices(range(8), cum_weights=_POPULARITY[:8])[0]
    address = await node.resolve(f"www.site{site:02d}.example")
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        await _get(session, node, f"http://{address}:443/download/{node.size(700_000, 0.9, 4_000_000)}", "download")


async def print_document(node: Node) -> None:
    """Send some pages to the printer."""
    await node.pause(25)
    await _transfer(node, await node.resolve(f"printer.{DOMAIN}"), 9100, "PUT", node.size(40_000, 1.0, 500_000))


async def work_remotely(node: Node) -> None:
    """An SSH session: a login (sometimes mistyped first), commands with think times, out again."""
    await node.pause(20)
    target = ADDRESS[node.rng.choices(("jump", "app", "web"), (6, 3, 1))[0]]
    user = sorted(USERS)[int(node.plan.name[-1]) % len(USERS)]
    if node.rng.random() < 0.08:
        try:
            await ssh_login(target, user, USERS[user][:-1])
        except asyncssh.PermissionDenied:
            node.counters["ssh_mistyped"] += 1
            await node.pause(2)
    connection = await ssh_login(target, user, USERS[user])
    node.counters["ssh_ok"] += 1
    async with connection, connection.create_process(encoding=None) as shell:
        for _ in range(node.rng.randrange(3, 12)):
            shell.stdin.write(b"x" * node.size(20, 0.5, 200) + b"\n")
            await asyncio.wait_for(shell.stdout.readuntil(b"$ "), 10)
            await node.pause(2.0)
        shell.stdin.write(b"exit\n")


async def ssh_login(
    target: str, user: str, password: str, sock: socket.socket | None = None
) -> asyncssh.SSHClientConnection:
    """A password login over a new connection, or over `sock`. Raises asyncssh.PermissionDenied."""
    return await asyncssh.connect(
        target if sock is None else "",
        22 if sock is None else 0,
        sock=sock,
        username=user,
        password=password,
        known_hosts=None,
        client_keys=None,
        agent_path=None,
        config=None,
        preferred_auth="password",
        connect_timeout=10,
        login_timeout=20,
    )


async def ask_time(node: Node) -> None:
    """NTP's rhythm, faster: a datagram to the gateway every 16 s."""
    await node.datagram(ADDRESS["gw"], 123, node.filler[:48])
    await asyncio.sleep(16 * node.rng.uniform(0.95, 1.05) * node.pace)


async def log_lines(node: Node) -> None:
    """Syslog to the monitoring host whenever something happens, one datagram a line, never answered."""
    await node.pause(10, 1.0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        channel.connect((ADDRESS["monitor"], 514))
        for _ in range(node.rng.randrange(1, 5)):
            channel.send(node.filler[: node.rng.randrange(60, 400)])
            await asyncio.sleep(0.05)


async def back_up(node: Node) -> None:
    """A periodic job: push what changed to the backup host every 20 s or so, more of it from the file server."""
    await asyncio.sleep(20 * node.rng.uniform(0.9, 1.1) * node.pace)
    median = 1_500_000 if node.plan.role == "files" else 400_000
    await _transfer(node, ADDRESS["backup"], 873, "PUT", node.size(median, 0.4, 6_000_000))


async def poll_everyone(node: Node) -> None:
    """Monitoring: each host pinged about every 12 s, each web service asked, and one server that no longer exists."""
    for host in HOSTS:
        if host.outside or host.name == node.plan.name:
            continue
        await asyncio.sleep(12 / 20 * node.rng.uniform(0.8, 1.2) * node.pace)
        await node.ping(host.address)
        if host.role in ("web", "app", "printer", "camera"):
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3)) as session:
                port = 8080 if host.role == "app" else 80
                await _get(session, node, f"http://{host.address}:{port}/status", host.name)
    await node.ping(RETIRED)


async def knock_at_retired(node: Node) -> None:
    """An old check that nobody removed: a TCP connection to a server that is gone, never answered."""
    await asyncio.sleep(15 * node.rng.uniform(0.9, 1.1) * node.pace)
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(RETIRED, 8443), 1.5)
        writer.close()
    except (OSError, TimeoutError):
        node.counters["retired_unanswered"] += 1


async def serve_pages(node: Node) -> None:
    """The web server asks the application server for what its pages need."""
    await node.pause(3)
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        await _get(session, node, f"http://{ADDRESS['app']}:8080/api/{node.rng.randrange(50)}", "app")


async def stream_pictures(node: Node) -> None:
    """The camera's telemetry: a handful of datagrams every two seconds from one port, never answered."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        channel.connect((ADDRESS["monitor"], 514))
        while True:
            for _ in range(node.rng.randrange(2, 6)):
                channel.send(node.filler[: node.rng.randrange(600, 1200)])
            await asyncio.sleep(2 * node.pace)


async def look_for_updates(node: Node) -> None:
    """Machines ask one outside site for updates, every 30 s or so."""
    await asyncio.sleep(30 * node.rng.uniform(0.7, 1.3) * node.pace)
    await _visit(node, "www.site03.example", 443, "updates", 0)


async def visit_from_outside(node: Node) -> None:
    """The company's web server has visitors from the internet, each from an address of its own."""
    await node.pause(4)
    local = node.rng.choice(SITES)
    connector = aiohttp.TCPConnector(limit=2, local_addr=(local, 0))
    async with aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT) as session:
        base = f"http://{BY_NAME['web'].address}:80/public{node.rng.randrange(12)}"
        for number in range(node.rng.randrange(1, 4)):
            await _get(session, node, f"{base}/{number}", f"www.{DOMAIN}")


_PERSON: tuple[Habit, ...] = (
    browse_outside, browse_inside, use_files, download, print_document, mistype, ask_time, log_lines, look_for_updates,
)  # fmt: skip
_SERVER: tuple[Habit, ...] = (ask_time, log_lines, look_for_updates)

HABITS: dict[str, tuple[Habit, ...]] = {
    role: tuple(_flat(habit) for habit in habits)
    for role, habits in {
        "office": _PERSON,
        "finance": _PERSON,
        "developer": (*_PERSON, work_remotely),
        "dns": _SERVER,
        "web": (*_SERVER, serve_pages, back_up),
        "app": (*_SERVER, back_up),
        "files": (*_SERVER, back_up),
        "jump": _SERVER,
        "backup": (ask_time, log_lines),
        "monitor": (ask_time, poll_everyone, knock_at_retired),
        "printer": (ask_time, log_lines),
        "camera": (ask_time, stream_pictures),
        "sites": (visit_from_outside,),
    }.items()
}
"""Role to what it does, all at once, for ever."""
