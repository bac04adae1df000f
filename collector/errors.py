"""Every error FlowSAGE raises on purpose, as one tree.

FlowsageError                  exit code 1   something went wrong while running
├── UsageError                 exit code 2   the command line asks for what cannot be
├── InputError                 exit code 1   an input file or record cannot be used
│   ├── CaptureError                         not a capture, or one that ends in the middle of a packet
│   └── SchemaError                          columns missing, or of the wrong type
├── InterfaceError             exit code 1   an interface is missing, busy, or cannot do what was asked
├── ProgramError               exit code 1   the kernel refused an object, or the object is not ours
│   └── KernelSupportError                   the kernel lacks what we need (BTF, bpffs, a map type)
├── PrivilegeError             exit code 77  capabilities are missing
└── ConfigurationError         exit code 78  a configuration key or value is wrong

A message says what happened, to what, and what to do about it, in one sentence.
"""


class FlowsageError(Exception):
    """Root of the tree. `exit_code` is what a command ends with when nobody handles it."""

    exit_code = 1


class UsageError(FlowsageError):
    """The command line asks for what cannot be."""

    exit_code = 2


class InputError(FlowsageError):
    """An input file or record cannot be used."""


class CaptureError(InputError):
    """Not a capture that we read, or one that ends in the middle of a packet: `packets` were read before."""

    def __init__(self, message: str, *, packets: int = 0) -> None:
        super().__init__(message)
        self.packets = packets


class SchemaError(InputError):
    """Columns of a flow file are missing or of the wrong type."""


class InterfaceError(FlowsageError):
    """An interface is missing, busy, or cannot do what was asked."""


class ProgramError(FlowsageError):
    """The kernel refused an object, or the object is not ours."""


class KernelSupportError(ProgramError):
    """The kernel lacks what we need."""


class PrivilegeError(FlowsageError):
    """Capabilities are missing."""

    exit_code = 77


class ConfigurationError(FlowsageError):
    """A configuration key or value is wrong."""

    exit_code = 78
