"""The cluster of a storm: two prefill workers that hand over to one decode worker, a mixed one, a store; all with little memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.ids import WorkerId
from tests.support.driver import Driver
from tests.support.storm import Asked, Storm, Watch, watching
from tests.support.threads import ThreadCluster, thread_cluster

STORE, DECODE, MIXED = "kvstore-0", "decode-0", "mixed-0"
PREFILLS = ("prefill-0", "prefill-1")
ROUTES = [(name, DECODE) for name in PREFILLS] * 2 + [(MIXED, None)]
Flags = Mapping[str, object]

POLICIES: Mapping[str, Flags] = {
    "plain": {},
    "virtual": {"kv_layout": "virtual"},
    "elastic": {"elastic": "full"},
    "layer offload": {"layer_offload": "auto"},
    "layer offload of all": {"layer_offload": 2},
    "host buffer": {"host_buffer": "2MiB"},
    "spare memory": {"spare_memory": "release"},
    "slo": {"admission": "slo"},
    "caching 0": {"caching": 0},
    "caching 1": {"caching": 1},
    "caching 2": {"caching": 2},
    "write-back": {"spill": "write-back"},
    "tcp": {"transport": "tcp"},
    "layer by layer": {"transfer": "layer"},
    "whole requests": {"transfer": "request"},
    "aggregated": {"transfer": "aggregated"},
    "planned ahead": {"plan_ahead": "on"},
}
"""Each memory policy alone, beside what is the default."""


@dataclass(frozen=True)
class Rig:
    """What a storm needs."""

    workers: ThreadCluster
    driver: Driver
    watch: Watch
    asked: Asked

    def storm(self, seed: int) -> Storm:
        return Storm(self.driver, self.watch, self.asked, ROUTES, seed)


_SMALL, _WITH_SCRATCH, _STORE = "4MiB", "12MiB", "4MiB"
"""32 blocks of 16 tokens, less than half of what is asked for at once; the scratch of steps is taken from an elastic worker's."""


@contextmanager
def storm_rig(folder: Path, asked: Asked, flags: Flags) -> Iterator[Rig]:
    """Started and connected. `flags`: of every worker."""
    device_memory = _SMALL if flags.get("elastic", "off") == "off" else _WITH_SCRATCH
    with thread_cluster(folder) as workers, watching() as watch:
        given = {"model": asked.model, "dtype": "float32", "max_context_tokens": 1024, "fetch": "always", **flags}
        members = [workers.start("kvstore", STORE, host_memory=_STORE, verify_kv=True)]
        for name in (DECODE, *PREFILLS, MIXED):
            role = name.partition("-")[0]
            members.append(workers.start(role, name, device_memory=device_memory, verify_kv=True, **given))
        with Driver(members) as driver:
            driver.until_reported(lambda: all(_reaches_decode(driver, name) for name in PREFILLS), "they are connected")
            yield Rig(workers, driver, watch, asked)


def _reaches_decode(driver: Driver, name: str) -> bool:
    return any(way.peer.startswith(DECODE) for way in driver.reports[WorkerId(name)].transports)
