"""Mappings of the kernel that are held for nothing, so that what must be undone never lacks them.

A process may have so many areas of addresses and no more (vm.max_map_count), whoever in it makes them; a call that divides
an area can leave it above that, and then not even its reverse is borne. Who gives these up has room again.
"""

import ctypes
import mmap
import os

from common.errors import OutOfChunks
from kvstore.memory.backend import VmMisuse

PROT_NONE = 0
MAP_EMPTY = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # addresses that take no memory: MAP_NORESERVE
MAP_FAILED = ctypes.c_void_p(-1).value
_FOR_OTHERS = 64
"""What other threads of the process may map while something is undone."""
_STEP = 128
"""Mappings are taken by so many, so that somewhat larger orders do not each take them anew: 1 to 2 microseconds each."""
_MOST_KEPT = 1024
"""More than these are held for one order only."""


class MappingReserve:
    """Owns one stretch of addresses without memory, every other page of which has other rights: each is an area of its own.

    Used by one thread at a time.
    """

    def __init__(self, libc: ctypes.CDLL) -> None:
        """Nothing is held yet. `libc`: with the types of mmap, mprotect and munmap declared."""
        self._libc = libc
        self._address, self._n_mappings = 0, 0

    @property
    def n_mappings(self) -> int:
        """Held now."""
        return self._n_mappings

    def keep(self, n_mappings: int) -> None:
        """Hold at least so many, and some for other threads. Raises OutOfChunks, and none are held, if the kernel has fewer."""
        needed = -(-(n_mappings + _FOR_OTHERS) // _STEP) * _STEP
        if needed <= self._n_mappings <= max(needed, _MOST_KEPT):
            return
        self.give_up()
        address = self._libc.mmap(None, needed * mmap.PAGESIZE, PROT_NONE, MAP_EMPTY, -1, 0)
        if address == MAP_FAILED:
            raise _too_few(needed)
        self._address, self._n_mappings = address, needed
        for page in range(1, needed, 2):
            if self._libc.mprotect(address + page * mmap.PAGESIZE, mmap.PAGESIZE, mmap.PROT_READ) != 0:
                refusal = _too_few(needed)
                self.give_up()
                raise refusal

    def give_up(self) -> None:
        """Hold none. One call, which the kernel grants above its limit too."""
        if not self._n_mappings:
            return
        if self._libc.munmap(self._address, self._n_mappings * mmap.PAGESIZE) != 0:
            raise VmMisuse(f"munmap of mappings in reserve failed: {os.strerror(ctypes.get_errno())}")
        self._address, self._n_mappings = 0, 0


def _too_few(needed: int) -> OutOfChunks:
    return OutOfChunks(
        f"the system has not the {needed} mappings that must be free before chunks move, so that it can be undone: "
        f"{os.strerror(ctypes.get_errno())}"
    )
