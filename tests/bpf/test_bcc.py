"""The same source through BCC: the same records, the same names, and plain words where something is missing."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from flowsage.collector import libbpf
from flowsage.collector.bcc_object import BccObject
from flowsage.collector.errors import KernelSupportError, MissingLoaderError, ObjectError, ProgramError, RejectedError
from flowsage.collector.kernel_headers import KernelHeaders, find_headers
from flowsage.collector.kernel_object import OBJECT, Loader
from flowsage.collector.program import FlowProgram, FlowSettings
from flowsage.collector.ring import Records

from .support import SECOND, build, drain_all, loaded, needs_root, tcp, udp, udp_frames
from .test_lifetime import closed, feed

pytestmark = needs_root

COUNTER = OBJECT.parent / "counter.bpf.o"
LOADERS: tuple[Loader, ...] = ("libbpf", "bcc")


def story(program: FlowProgram) -> Records:
    """Every way for a record to come about: last ACK, RST and SYN, active and idle timeouts, table full, flush."""
    feed(program, *closed(), (2, tcp("S", sport=7)), (3, tcp("R", sport=7, back=True)), (3.5, tcp("S", sport=7)))
    feed(program, *((t, udp(1)) for t in range(4, 30)), (30, udp(2)), (31, udp(3, back=True)))
    program.expire(32 * SECOND)
    feed(program, (60, udp(2)), *((61, frame) for frame in udp_frames(40)))
    return np.concatenate([program.ring.drain(), drain_all(program)])


def test_both_loaders_tell_the_same_story_byte_for_byte() -> None:
    told = []
    for loader in LOADERS:
        with loaded(loader=loader, table_entries=8, active_ns=10 * SECOND) as program:
            records = story(program)
        assert {1, 2, 3, 4, 5} <= set(records["end_reason"].tolist())
        records["sequence"] = 0  # tells the order, which for a walk is that of a hash with a seed of its own
        told.append(sorted(record.tobytes() for record in records))
    assert told[0] == told[1]


def test_a_compiled_object_has_the_names_and_sizes_of_the_shipped_one() -> None:
    build()
    compiled, shipped = BccObject(OBJECT), libbpf.Object(OBJECT)
    try:
        assert set(compiled.programs) == set(shipped.programs)
        assert set(compiled.maps) == set(shipped.maps) - {".rodata.settings"}
        assert compiled.first_program(6) == shipped.first_program(6) == "flow_xdp"
        compiled.resize("flows", 1000)
        compiled.load()
        assert (compiled.max_entries("flows"), compiled.max_entries("records")) == (1000, 16 << 20)
        assert compiled.max_entries("counters") == shipped.max_entries("counters")
    finally:
        compiled.close()
        shipped.close()


def test_the_counter_compiles_too() -> None:
    counter = BccObject(COUNTER)
    try:
        counter.load()
        assert counter.first_program(6) == "xdp_counter"
        assert counter.max_entries("protocols") == 4
    finally:
        counter.close()


def test_compiling_leaves_the_process_as_it_was() -> None:
    before = (os.getcwd(), os.environ.get("BCC_KERNEL_SOURCE"), len(os.listdir("/proc/self/fd")))
    counter = BccObject(COUNTER)
    counter.load()
    counter.close()
    assert (os.getcwd(), os.environ.get("BCC_KERNEL_SOURCE"), len(os.listdir("/proc/self/fd"))) == before


@pytest.mark.parametrize("name", ["no_such_map", ".rodata.settings"])
def test_names_of_another_version_are_refused(name: str) -> None:
    with pytest.raises(ProgramError, match="belongs to another version"):
        BccObject(COUNTER).data(name, type(FlowSettings()))
    with pytest.raises(ProgramError, match="belongs to another version"):
        BccObject(COUNTER).resize(name, 1)


def test_a_source_that_does_not_compile_says_why_on_our_side(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "broken.bpf.c"
    source.write_text('#define SEC(x)\nSEC("xdp.frags")\nint broken(struct xdp_md *ctx)\n{\n\treturn nothing;\n}\n')
    with pytest.raises(RejectedError, match=r"broken\.bpf\.c.*undeclared identifier 'nothing'"):
        BccObject(source).load()
    assert capfd.readouterr().err == ""


def test_a_program_that_the_verifier_refuses_says_so(tmp_path: Path) -> None:
    source = tmp_path / "loop.bpf.c"
    text = '#define SEC(x)\nSEC("xdp.frags")\nint astray(struct xdp_md *ctx)\n{\n\treturn *(int *)(long)ctx->data;\n}\n'
    source.write_text(text)
    with pytest.raises(RejectedError, match=r"the kernel refused astray of .*invalid access to packet"):
        BccObject(source).load()


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ObjectError, match=r"no program source at .*flow\.bpf\.c"):
        BccObject(tmp_path / "flow.bpf.o")


def test_without_bcc_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcc", None)
    with pytest.raises(MissingLoaderError, match="install the package python3-bpfcc"):
        BccObject(COUNTER).load()


def tree(folder: Path, *, source: bool = True, generated: bool = True) -> Path:
    if source:
        (folder / "include/linux").mkdir(parents=True)
        (folder / "include/linux/kconfig.h").touch()
    if generated:
        (folder / "include/generated/uapi").mkdir(parents=True)
        (folder / "arch/x86/include/generated/uapi").mkdir(parents=True)
    return folder


def test_without_headers_the_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(KernelSupportError, match="install the package linux-headers-amd64"):
        find_headers(root=tmp_path)
    with pytest.raises(KernelSupportError, match="no kernel headers at"):
        BccObject(COUNTER, headers=tmp_path).load()


def test_headers_that_are_named_come_first_then_the_running_kernels_then_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BCC_KERNEL_SOURCE", raising=False)
    common = tree(tmp_path / "usr/src/linux-headers-6.12.9-common", generated=False)
    older = tree(tmp_path / "usr/src/linux-headers-6.1.0-7-amd64", source=False)
    newest = tree(tmp_path / "usr/src/linux-headers-6.12.9-amd64", source=False)
    for build_tree in (older, newest):
        (build_tree / "Makefile").write_text(f"include {common}/Makefile\n")
    assert find_headers(root=tmp_path) == KernelHeaders(common, newest)
    running = tree(tmp_path / "lib/modules" / os.uname().release / "build")
    assert find_headers(root=tmp_path) == KernelHeaders(running, running)
    assert find_headers(older, root=tmp_path) == KernelHeaders(common, older)
    monkeypatch.setenv("BCC_KERNEL_SOURCE", str(newest))
    assert find_headers(root=tmp_path) == KernelHeaders(common, newest)
    assert KernelHeaders(running, running).flags() == []
    assert f"-I{newest}/arch/x86/include/generated" in KernelHeaders(common, newest).flags()


def test_headers_in_the_kernel_itself_are_left_to_bcc(tmp_path: Path) -> None:
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "sys/kernel/kheaders.tar.xz").touch()
    assert find_headers(root=tmp_path) is None
