"""How long what was promised to another process may be held: said once, for whoever grants and whoever watches."""

LEASE_MS = 30_000
"""A prefill worker's for granted pages, unless a decode worker is told otherwise: the longest lease there is by default."""
HELD_GRACE_MS = 15_000.0
"""Behind a lease, until what is still held for somebody makes its holder degraded."""
