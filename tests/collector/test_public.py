"""What others may use of the collector: an exact list, and a package that costs nothing to import."""

import subprocess
import sys

import flowsage.collector

LIST = """
Agent AgentSettings AttachModeError Attachment AttachmentError BusyInterfaceError BusySensorError ConfigurationError
EBPFAttachMode EBPFLoader EBPFProgramType FlowProgram FlowSettings FlowsageError Interface InterfaceError
KernelSupportError LoadedProgram MapStats MissingInterfaceError MissingLoaderError ObjectError PrivilegeError
ProgramError ProgramStats RejectedError UnknownProgramError create_ebpf_loader flow_program in_namespace read_interface
"""


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_public_names_are_these_and_all_are_there() -> None:
    assert flowsage.collector.__all__ == sorted(LIST.split())
    for name in flowsage.collector.__all__:
        assert getattr(flowsage.collector, name).__name__ == name


def test_every_error_is_a_class_of_its_own_under_one_root() -> None:
    errors = {name: getattr(flowsage.collector, name) for name in flowsage.collector.__all__ if name.endswith("Error")}
    assert len(set(errors.values())) == len(errors) == 15
    assert all(issubclass(error, flowsage.collector.FlowsageError) for error in errors.values())


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    assert not hasattr(flowsage.collector, "create_everything")


def test_importing_the_package_costs_nothing_and_the_loader_no_array_library() -> None:
    code = (
        "import sys, time; before = set(sys.modules); t = time.process_time()\n"
        "import flowsage.collector\n"
        "print(time.process_time() - t)\n"
        "from flowsage.collector import create_ebpf_loader\n"
        "print(*(set(sys.modules) - before) & {'numpy', 'pyarrow', 'pyroute2', 'torch', 'pydantic'})"
    )
    seconds, heavy = min(python(code).split("\n")[:2] for _ in range(3))
    assert float(seconds) < 0.1
    assert heavy == ""
