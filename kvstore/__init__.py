"""KV memory. `from kvstore import MemPool` is the library; it is loaded only when somebody asks for it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore.pool.addresses import Address, InsertResult, Lease, Match, Medium, WrongAddress
    from kvstore.pool.mem_pool import MemPool, PoolOptions

__all__ = ["Address", "InsertResult", "Lease", "Match", "MemPool", "Medium", "PoolOptions", "WrongAddress"]


def __getattr__(name: str) -> object:
    """The public names of the MemPool library."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvstore.pool import addresses, mem_pool  # late: processes that import a part of kvstore need not load it

    return getattr(addresses, name, None) or getattr(mem_pool, name)
