"""Who is on the lab's network: names, roles, addresses, and what is called by name in its DNS."""

from __future__ import annotations

from dataclasses import dataclass

GATEWAY = "10.77.0.1"
DARK_NETWORK = "10.77.9.0/24"
"""Routed through the gateway and used by nobody: what is sent there is never answered."""
DOMAIN = "corp.example"
SITES = tuple(f"203.0.113.{n}" for n in range(10, 42))
"""Web sites of the outside world, the most popular first."""
RESOLVER = "203.0.113.53"
C2 = "198.51.100.66"
DROP_ZONE = "198.51.100.77"
C2_NAME, DROP_ZONE_NAME = "cdn.update-check.example", "share.example"
RETIRED = "10.77.9.9"
"""A server that is gone and that the monitoring still polls."""

USERS = {"alice": "correct horse", "bob": "battery staple", "carol": "tr0ub4dor&3"}
"""Who may log in by SSH, with the passwords that the lab's own people use."""


@dataclass(frozen=True)
class HostPlan:
    """One host: `name` (at most 9 characters), `role` (its services and habits), `addresses` (the first is its own)."""

    name: str
    role: str
    addresses: tuple[str, ...]
    department: str = ""

    @property
    def address(self) -> str:
        """The host's own address."""
        return self.addresses[0]

    @property
    def outside(self) -> bool:
        """Whether the host stands for the internet."""
        return not self.address.startswith("10.")


def _inside(name: str, role: str, last: int, department: str = "") -> HostPlan:
    return HostPlan(name, role, (f"10.77.0.{last}",), department)


HOSTS: tuple[HostPlan, ...] = (
    _inside("gw", "gateway", 1),
    _inside("dns", "dns", 2),
    _inside("web", "web", 10),
    _inside("app", "app", 11),
    _inside("files", "files", 12),
    _inside("jump", "jump", 13),
    _inside("backup", "backup", 14),
    _inside("monitor", "monitor", 15),
    _inside("printer", "printer", 20),
    _inside("camera", "camera", 21),
    *(_inside(f"office{n}", "office", 100 + n, "sales") for n in (1, 2, 3)),
    *(_inside(f"dev{n}", "developer", 110 + n, "engineering") for n in (1, 2, 3)),
    *(_inside(f"fin{n}", "finance", 120 + n, "finance") for n in (1, 2)),
    HostPlan("sites", "sites", (*SITES, RESOLVER)),
    HostPlan("c2", "c2", (C2,)),
    HostPlan("dropzone", "dropzone", (DROP_ZONE,)),
)

BY_NAME = {host.name: host for host in HOSTS}
ADDRESS = {host.name: host.address for host in HOSTS}
INSIDE = tuple(host.address for host in HOSTS if not host.outside)

ZONE: dict[str, str] = {
    **{f"{host.name}.{DOMAIN}": host.address for host in HOSTS if not host.outside},
    f"intranet.{DOMAIN}": ADDRESS["web"],
    f"wiki.{DOMAIN}": ADDRESS["app"],
}
"""Names that the lab's own DNS server answers for."""
PUBLIC_ZONE: dict[str, str] = {
    **{f"www.site{number:02d}.example": address for number, address in enumerate(SITES)},
    C2_NAME: C2,
    DROP_ZONE_NAME: DROP_ZONE,
}
"""Names that only the resolver outside knows."""
