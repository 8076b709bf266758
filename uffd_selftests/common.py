# SPDX-License-Identifier: GPL-2.0-only
"""What the cases are written in: the one import of a case, as uffd-common.h is upstream.

It only hands on: each name is at home in the file of ``toolkit/`` that its idea has, or in the kernel's interface.
"""

from uffd_selftests.abi import kvm as kvm
from uffd_selftests.abi import syscalls as syscalls
from uffd_selftests.abi import uapi as uapi
from uffd_selftests.abi.errors import *
from uffd_selftests.abi.native import ffi as ffi
from uffd_selftests.abi.native import lib as lib
from uffd_selftests.abi.uapi import *
from uffd_selftests.machine.cgroup import MemoryGroup as MemoryGroup
from uffd_selftests.machine.doors import DEVICE as DEVICE
from uffd_selftests.machine.facts import THP as THP
from uffd_selftests.machine.hugepages import hugepage_sizes as hugepage_sizes
from uffd_selftests.machine.hugepages import hugepages as hugepages
from uffd_selftests.machine.hugepages import lack_of_hugepages as lack_of_hugepages
from uffd_selftests.machine.settings import Sysctl as Sysctl
from uffd_selftests.mem_types import *
from uffd_selftests.toolkit import stress as stress
from uffd_selftests.toolkit.access import *
from uffd_selftests.toolkit.contents import *
from uffd_selftests.toolkit.context import *
from uffd_selftests.toolkit.coredump import *
from uffd_selftests.toolkit.debuggers import *
from uffd_selftests.toolkit.events import *
from uffd_selftests.toolkit.expectations import *
from uffd_selftests.toolkit.faulting import *
from uffd_selftests.toolkit.files import *
from uffd_selftests.toolkit.folios import *
from uffd_selftests.toolkit.handle import *
from uffd_selftests.toolkit.handler import *
from uffd_selftests.toolkit.hugetlb import *
from uffd_selftests.toolkit.hwpoison import *
from uffd_selftests.toolkit.ia32 import *
from uffd_selftests.toolkit.iouring import *
from uffd_selftests.toolkit.kernelside import *
from uffd_selftests.toolkit.kinds import *
from uffd_selftests.toolkit.ksm import *
from uffd_selftests.toolkit.memory import *
from uffd_selftests.toolkit.messages import *
from uffd_selftests.toolkit.migration import *
from uffd_selftests.toolkit.mixtures import *
from uffd_selftests.toolkit.pagemap import *
from uffd_selftests.toolkit.pins import *
from uffd_selftests.toolkit.privileges import *
from uffd_selftests.toolkit.processes import *
from uffd_selftests.toolkit.races import *
from uffd_selftests.toolkit.refusals import *
from uffd_selftests.toolkit.registered import *
from uffd_selftests.toolkit.rwp import *
from uffd_selftests.toolkit.smaps import *
from uffd_selftests.toolkit.starving import *
from uffd_selftests.toolkit.swap import *
from uffd_selftests.toolkit.sysv import *
from uffd_selftests.toolkit.thp import *
from uffd_selftests.toolkit.threads import *
from uffd_selftests.toolkit.tracking import *
from uffd_selftests.toolkit.vcpu import *
from uffd_selftests.toolkit.vcpu_interrupts import *
