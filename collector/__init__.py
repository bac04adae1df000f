"""Sensor side: from the XDP program to Arrow record batches. Imports no torch.

What others may use is named here and imported when it is asked for, so that the package itself costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowsage.collector.agent import Agent
    from flowsage.collector.agent_settings import AgentSettings
    from flowsage.collector.errors import (
        AttachmentError,
        AttachModeError,
        BusyInterfaceError,
        BusySensorError,
        ConfigurationError,
        FlowsageError,
        InterfaceError,
        KernelSupportError,
        MissingInterfaceError,
        MissingLoaderError,
        ObjectError,
        PrivilegeError,
        ProgramError,
        RejectedError,
        UnknownProgramError,
    )
    from flowsage.collector.interface import Interface, in_namespace, read_interface
    from flowsage.collector.loader import EBPFLoader, EBPFProgramType, LoadedProgram, create_ebpf_loader
    from flowsage.collector.program import FlowProgram, FlowSettings, flow_program
    from flowsage.collector.statistics import MapStats, ProgramStats
    from flowsage.collector.xdp import Attachment, EBPFAttachMode

__all__ = [
    "Agent",
    "AgentSettings",
    "AttachModeError",
    "Attachment",
    "AttachmentError",
    "BusyInterfaceError",
    "BusySensorError",
    "ConfigurationError",
    "EBPFAttachMode",
    "EBPFLoader",
    "EBPFProgramType",
    "FlowProgram",
    "FlowSettings",
    "FlowsageError",
    "Interface",
    "InterfaceError",
    "KernelSupportError",
    "LoadedProgram",
    "MapStats",
    "MissingInterfaceError",
    "MissingLoaderError",
    "ObjectError",
    "PrivilegeError",
    "ProgramError",
    "ProgramStats",
    "RejectedError",
    "UnknownProgramError",
    "create_ebpf_loader",
    "flow_program",
    "in_namespace",
    "read_interface",
]

_MODULES = {
    "agent": ("Agent",),
    "agent_settings": ("AgentSettings",),
    "errors": (
        "AttachModeError", "AttachmentError", "BusyInterfaceError", "BusySensorError", "ConfigurationError",
        "FlowsageError", "InterfaceError", "KernelSupportError", "MissingInterfaceError", "MissingLoaderError",
        "ObjectError", "PrivilegeError", "ProgramError", "RejectedError", "UnknownProgramError",
    ),
    "interface": ("Interface", "in_namespace", "read_interface"),
    "loader": ("EBPFLoader", "EBPFProgramType", "LoadedProgram", "create_ebpf_loader"),
    "program": ("FlowProgram", "FlowSettings", "flow_program"),
    "statistics": ("MapStats", "ProgramStats"),
    "xdp": ("Attachment", "EBPFAttachMode"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    """What is public, from the module that it lies in."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
