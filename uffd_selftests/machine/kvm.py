# SPDX-License-Identifier: GPL-2.0-only
"""KVM: whether a virtual processor can be had here, and how its accesses reach memory.

It is looked for where a case wants it, not in every run. In a guest of --kernel its modules are loaded then.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
from ctypes import addressof, create_string_buffer, memmove
from pathlib import Path

from uffd_selftests.abi import syscalls
from uffd_selftests.abi.errors import errno_name
from uffd_selftests.abi.kvm import CREATE_VCPU, CREATE_VM, DEVICE, MACHINE, Cap, Exit, Vcpu, Vm, call, is_absent
from uffd_selftests.abi.native import lib
from uffd_selftests.machine.system import OWN_MACHINE

MODULES = Path("/modules/kvm")
"""Where a guest of --kernel has them (vm/bundle.py), in the order of their names."""
VENDORS = {"kvm_amd": "svm", "kvm_intel": "vmx"}
"""Modules that are of use with a flag of /proc/cpuinfo alone."""

SECONDS = 10.0 * float(os.environ.get("UFFD_DEADLINE_SCALE") or 1)
"""How long the first steps of a virtual processor may take, with the modules to load; else they take milliseconds."""
PAGE = 4096
PROT_NONE, PROT_ALL = 0, 3
MAP_FLAGS = 0x02 | 0x20  # MAP_PRIVATE, MAP_ANONYMOUS
LOAD = b"\x8b\x07\xe6\x01"
"""mov eax, [edi]; out 1, al."""

FAULTS = "page faults"
"""An access to memory that is not there is a fault of a page, which KVM looks up as get_user_pages() does."""
EMULATION = "emulation"
"""KVM carries out the instructions itself, and accesses memory as system calls do."""

UNKNOWN: dict[str, str | None] = {"reason": None, "accesses": FAULTS}
"""What stands for an answer when none could be had: cases are to run then, and to show why."""


def open_kvm() -> int:
    """Open /dev/kvm; raises OSError. A guest of --kernel loads its modules first."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if not is_absent(error.errno or 0) or not os.environ.get(OWN_MACHINE) or not load_modules():
            raise
    return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)


def load_modules(folder: Path = MODULES) -> bool:
    """Load KVM's modules, if there are some for this processor; return whether any was."""
    flags = Path("/proc/cpuinfo").read_text().split()
    parameters = create_string_buffer(b"")
    loaded = False
    for path in sorted(folder.glob("*.ko")):
        name = path.stem.partition("-")[2]
        if VENDORS.get(name, "") in ("", *flags):
            with path.open("rb") as file, contextlib.suppress(OSError):  # what it depends on finds no device
                syscalls.call("finit_module", file.fileno(), addressof(parameters), 0)
                loaded = True
    return loaded


def probe_kvm() -> dict[str, str | None]:
    """Return, as plain data, why no virtual processor can be had, and how one comes by its memory; never fails.

    It is tried in a child, which may hang: there are hosts whose KVM is there and runs nothing.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            signal.set_wakeup_fd(-1)
            os.write(writer, json.dumps(_try()).encode())
        os._exit(0)
    os.close(writer)
    try:
        if select.select([reader], [], [], SECONDS)[0]:
            if told := os.read(reader, 1 << 12):
                return dict(json.loads(told))
            return _lacking(f"{DEVICE}: a process that tries a virtual processor dies")
        return _lacking(f"{DEVICE}: a virtual processor has not executed two instructions after {SECONDS:g} seconds")
    finally:
        os.close(reader)
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def hold_machine() -> list[int]:
    """Make a virtual machine with a processor, and return descriptors to be kept: it is there as long as they are.

    With the first one and the last one the kernel changes its own code (static keys), which QEMU's emulated processors
    sometimes execute half-changed when there are several: an Oops of int3, with 7.2 once in some dozen of them.
    """
    system = open_kvm()
    vm = call(system, CREATE_VM, "CREATE_VM")
    return [system, vm, call(vm, CREATE_VCPU, "CREATE_VCPU")]


def _lacking(reason: str) -> dict[str, str | None]:
    return {"reason": reason, "accesses": None}


def _try() -> dict[str, str | None]:
    if os.uname().machine != MACHINE:
        return _lacking(f"what a virtual processor executes is code for {MACHINE}")
    try:
        system = open_kvm()
    except OSError as error:
        return _lacking(_closed(error))
    try:
        vm = Vm(system)
        if not vm.has(Cap.USER_MEMORY):
            return _lacking(f"{DEVICE}: no KVM_CAP_USER_MEMORY")
        return {"reason": None, "accesses": _accesses(vm)}
    except OSError as error:
        return _lacking(f"{DEVICE}: {error}: is another hypervisor using the processor?")
    except Refused as reason:
        return _lacking(f"{DEVICE}: {reason}")


class Refused(Exception):
    """KVM is there, and does not do what it is for."""


def _accesses(vm: Vm) -> str:
    """Execute a load of memory that is there, and one of memory that nobody may access."""
    code = lib.uffd_mmap(0, 2 * PAGE, PROT_ALL, MAP_FLAGS, -1, 0)
    shut = lib.uffd_mmap(0, PAGE, PROT_NONE, MAP_FLAGS, -1, 0)
    memmove(code, LOAD, len(LOAD))
    memmove(code + PAGE, b"\x78\x56\x34\x12", 4)
    vm.set_slot(0, 0, code, 2 * PAGE)
    vm.set_slot(1, 16 * PAGE, shut, PAGE)
    vcpu = Vcpu(vm, 0)
    vcpu.set_regs(rip=0, rdi=PAGE)
    reason = vcpu.run()
    if reason != Exit.IO or vcpu.regs().rax != 0x12345678:
        raise Refused(f"KVM_RUN of a load from memory ends with exit {reason}")
    vcpu.set_regs(rip=0, rdi=16 * PAGE)
    try:
        vcpu.run()
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return FAULTS
    return EMULATION  # to which memory that cannot be read is a device's


def _closed(error: OSError) -> str:
    """Say why /dev/kvm cannot be opened."""
    number = error.errno or 0
    if is_absent(number) and os.environ.get(OWN_MACHINE):
        remedy = "boot a kernel with CONFIG_KVM, built in or with its modules, on a processor with SVM or VMX"
    elif is_absent(number):
        remedy = "load kvm_amd or kvm_intel, on a machine with SVM or VMX; a container needs --device /dev/kvm"
    else:
        remedies = {
            errno.EACCES: "join the group kvm, or run as root",
            errno.EPERM: "the container's device rules forbid it: --device /dev/kvm",
        }
        remedy = remedies.get(number, "")
    return f"{DEVICE}: {errno_name(number)}" + (f": {remedy}" if remedy else "")
