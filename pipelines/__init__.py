"""Where the rooms are put together: configuration, logs, metrics, commands.

What others may use is named here and imported when it is asked for, so that the package itself costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowsage.pipelines.monitoring import EBPFMonitoring, create_ebpf_monitoring
    from flowsage.pipelines.settings import Settings
    from flowsage.pipelines.subscription import DetectionFinding, Subscription, subscribe

__all__ = ["DetectionFinding", "EBPFMonitoring", "Settings", "Subscription", "create_ebpf_monitoring", "subscribe"]

_MODULE_OF = {
    "DetectionFinding": "subscription",
    "EBPFMonitoring": "monitoring",
    "Settings": "settings",
    "Subscription": "subscription",
    "create_ebpf_monitoring": "monitoring",
    "subscribe": "subscription",
}


def __getattr__(name: str) -> object:
    """What is public, from the module that it lies in."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
