"""Every error FlowSAGE raises on purpose, as one tree.

FlowsageError                  exit code 1   something went wrong while running
├── UsageError                 exit code 2   the command line asks for what cannot be
├── InputError                 exit code 1   an input file or record cannot be used
│   ├── CaptureError                         not a capture, or one that ends in the middle of a packet
│   └── SchemaError                          columns missing, or of the wrong type
├── InterfaceError             exit code 1   an interface is missing, busy, or cannot do what was asked
│   ├── MissingInterfaceError                there is none of that name
│   ├── BusyInterfaceError                   it runs an XDP program that somebody else attached
│   ├── AttachModeError                      it cannot run XDP in the mode that was asked for
│   └── AttachmentError                      the kernel does not show what should be attached, or still shows what not
├── ProgramError               exit code 1   the kernel refused an object, or the object is not ours
│   ├── ObjectError                          no file, or none that is a program object
│   ├── RejectedError                        the kernel or its verifier refused to load an object
│   ├── UnknownProgramError                  nobody knows a program, or a map of it, by that name or id
│   ├── MissingLoaderError                   neither libbpf nor bpftool is installed
│   └── KernelSupportError                   the kernel lacks what we need (BTF, bpffs, a map type)
├── LogError                   exit code 1   the log (Kafka, or the one in memory) did not do what was asked
│   ├── LogUnavailableError                  it cannot be reached, or did not answer in time: try again
│   ├── LogFullError                         it holds as much as it may
│   ├── RecordTooLargeError                  it will never take this record
│   └── FencedError                          somebody else has taken over what this one wanted to write or commit
├── ModelError                 exit code 1   a model directory is missing, damaged, or made for another feature schema
├── BusySensorError            exit code 1   another process runs this sensor
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


class MissingInterfaceError(InterfaceError):
    """There is no interface of that name in this network namespace."""


class BusyInterfaceError(InterfaceError):
    """An interface runs an XDP program that somebody else attached."""


class AttachModeError(InterfaceError):
    """An interface cannot run XDP in the mode that was asked for."""


class AttachmentError(InterfaceError):
    """The kernel does not show what should be attached, or still shows what should not be."""


class ProgramError(FlowsageError):
    """The kernel refused an object, or the object is not ours."""


class ObjectError(ProgramError):
    """No file, or none that is a program object."""


class RejectedError(ProgramError):
    """The kernel or its verifier refused to load an object."""


class UnknownProgramError(ProgramError):
    """Nobody knows a program, or a map of it, by that name or id."""


class MissingLoaderError(ProgramError):
    """Neither libbpf nor bpftool is installed."""


class KernelSupportError(ProgramError):
    """The kernel lacks what we need."""


class LogError(FlowsageError):
    """The log did not do what was asked, and trying again will not help unless somebody changes something."""


class LogUnavailableError(LogError):
    """The log cannot be reached or did not answer in time; whether it did what was asked is not known. Try again."""


class LogFullError(LogError):
    """A topic holds as many bytes as it may: consume and commit, or raise its bound."""


class RecordTooLargeError(LogError):
    """The log takes no records of this size, now or later."""


class FencedError(LogError):
    """Somebody else has taken over: a later transactor of this name, or the group has given the partitions away.

    Nothing of the transaction or commit has happened, and nothing will. Throw away what was built, and join again.
    """


class ModelError(FlowsageError):
    """A model directory is missing, damaged, or made for another feature schema."""


class BusySensorError(FlowsageError):
    """Another process runs this sensor."""


class PrivilegeError(FlowsageError):
    """Capabilities are missing."""

    exit_code = 77


class ConfigurationError(FlowsageError):
    """A configuration key or value is wrong."""

    exit_code = 78
