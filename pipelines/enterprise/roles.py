"""What part a host of the simulation plays, read off its address (as `network.build` gives them out)."""

from __future__ import annotations

_CORE = {
    20: "intranet",
    30: "build server",
    40: "mail",
    41: "backup",
    42: "management",
    43: "monitoring",
    44: "crawler",
}
_DEPARTMENT = {11: "file server", 21: "application server", 31: "database", 41: "printer"}


def role_of(address: str) -> str:
    """Role of an address: "workstation", "file server", …, "outside"; for pictures and for reading, not for detection.

    >>> role_of("10.3.0.17"), role_of("10.0.12.21"), role_of("198.18.7.9")
    ('workstation', 'application server', 'outside')
    """
    parts = [int(part) for part in address.split(".")] if address.count(".") == 3 else []
    if len(parts) != 4 or parts[0] != 10:
        return "outside"
    _, second, third, last = parts
    if second == 0 and third == 0:
        return "name server" if last < 20 else _CORE.get(last if last >= 40 else last // 10 * 10, "server")
    if second == 0:
        return _DEPARTMENT.get(max((k for k in _DEPARTMENT if k <= last), default=0), "server")
    return "public server" if (second, third) == (9, 0) and last < 10 else "workstation"
