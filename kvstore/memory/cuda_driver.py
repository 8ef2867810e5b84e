"""The CUDA driver's virtual memory calls on one device: checked, in plain numbers, from any thread.

Addresses and handles are ints. Every call sets the device's primary context, which torch uses too, current in the
calling thread. Calls wait for the host side of the driver only: none of them waits for kernels, so whoever unmaps
guarantees that no kernel uses those addresses any more.
"""

from typing import Any

from common.errors import ConfigError, OutOfChunks
from kvstore.memory.backend import VmMisuse

_UNSUPPORTED = (
    "CUDA_ERROR_NOT_SUPPORTED",
    "CUDA_ERROR_NO_DEVICE",
    "CUDA_ERROR_INVALID_DEVICE",
    "CUDA_ERROR_NOT_PERMITTED",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
    "CUDA_ERROR_SYSTEM_NOT_READY",
    "CUDA_ERROR_DEVICE_UNAVAILABLE",
)


class CudaDriver:
    """Raises OutOfChunks when memory is out, ConfigError for what this machine cannot do, VmMisuse for all else."""

    def __init__(self, device_index: int) -> None:
        """Raises ConfigError if the driver, the device or its virtual memory is not there."""
        self._cuda: Any = _bindings()  # Any: the bindings have no types
        try:
            self.call("cuInit", 0)
        except RuntimeError as error:  # the bindings look for the driver's library at the first call
            raise ConfigError(f"device cuda needs the NVIDIA driver: {error}") from error
        self.device_index = device_index
        self._device = self.call("cuDeviceGet", device_index)
        self._require("CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED", "virtual memory management")
        self._require("CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED", "memory in file descriptors")
        self._context = self.call("cuDevicePrimaryCtxRetain", self._device)
        self._properties = self.properties()
        self._access = self._read_write()
        self.granularity_bytes = int(
            self.call(
                "cuMemGetAllocationGranularity",
                self._properties,
                self._cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM,
            )
        )

    @property
    def device_uuid(self) -> str:
        """Names the device across processes, whatever index each of them sees it under: 32 hex digits."""
        return bytes(self.call("cuDeviceGetUuid", self._device).bytes).hex()

    def attribute(self, name: str) -> int:
        """A device attribute by its name in the driver's header."""
        return int(self.call("cuDeviceGetAttribute", getattr(self._cuda.CUdevice_attribute, name), self._device))

    def properties(self, *, host_node: int | None = None) -> Any:  # Any: the bindings have no types
        """What `create` makes: memory of the device, or of a NUMA node of the host; shareable by descriptor."""
        kinds, places = self._cuda.CUmemAllocationType, self._cuda.CUmemLocationType
        made = self._cuda.CUmemAllocationProp()
        made.type = kinds.CU_MEM_ALLOCATION_TYPE_PINNED
        if host_node is None:
            made.location.type, made.location.id = places.CU_MEM_LOCATION_TYPE_DEVICE, self.device_index
        else:
            made.location.type, made.location.id = places.CU_MEM_LOCATION_TYPE_HOST_NUMA, host_node
        made.requestedHandleTypes = self._descriptor_type
        return made

    @property
    def _descriptor_type(self) -> Any:  # Any: the bindings have no types
        return self._cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    def _read_write(self) -> Any:  # Any: the bindings have no types
        access = self._cuda.CUmemAccessDesc()
        access.location.type = self._cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = self.device_index
        access.flags = self._cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        return access

    def reserve(self, length_bytes: int) -> int:
        """Addresses without memory."""
        return int(self.enter("cuMemAddressReserve", length_bytes, 0, 0, 0))

    def unreserve(self, address: int, length_bytes: int) -> None:
        """Give addresses back, where nothing is mapped any more."""
        self.enter("cuMemAddressFree", address, length_bytes)

    def create(self, length_bytes: int, properties: Any = None) -> int:  # Any: the bindings have no types
        """A handle of new physical memory."""
        return int(self.enter("cuMemCreate", length_bytes, properties or self._properties, 0))

    def release(self, handle: int) -> None:
        """Drop a handle; its memory goes once nobody maps it and no descriptor of it is open."""
        self.enter("cuMemRelease", handle)

    def map(self, address: int, length_bytes: int, handle: int, offset_bytes: int = 0) -> None:
        """Put the handle's memory there; nobody may touch it before `allow`."""
        self.enter("cuMemMap", address, length_bytes, offset_bytes, handle, 0)

    def allow(self, address: int, length_bytes: int) -> None:
        """Make a wholly mapped stretch, of however many mappings, readable and writable. The dear call: one per run."""
        self.enter("cuMemSetAccess", address, length_bytes, [self._access], 1)

    def unmap(self, address: int, length_bytes: int) -> None:
        """Undo every mapping in a stretch, none of them in part."""
        self.enter("cuMemUnmap", address, length_bytes)

    def export_fd(self, handle: int) -> int:
        """A new descriptor of the handle's memory, which the caller closes."""
        return int(self.enter("cuMemExportToShareableHandle", handle, self._descriptor_type, 0))

    def import_fd(self, fd: int) -> int:
        """A handle of memory that another process exported. The caller may close `fd` then, and releases the handle."""
        return int(self.enter("cuMemImportFromShareableHandle", fd, self._descriptor_type))

    def wait(self) -> None:
        """Until every kernel and copy that was started on the device has ended. Raises VmMisuse if one of them failed."""
        self.enter("cuCtxSynchronize")

    def close(self) -> None:
        """Let go of the device's context; torch's own hold on it stays."""
        self.call("cuDevicePrimaryCtxRelease", self._device)

    def enter(self, name: str, *arguments: Any) -> Any:  # Any: the bindings have no types
        """`call` in the device's context."""
        self.call("cuCtxSetCurrent", self._context)
        return self.call(name, *arguments)

    def call(self, name: str, *arguments: Any) -> Any:  # Any: the bindings have no types
        """Call the driver; returns what it returns besides its status."""
        status, *results = getattr(self._cuda, name)(*arguments)
        if status.value:
            raise _error(self._cuda, name, status)
        return results[0] if len(results) == 1 else results

    def _require(self, attribute: str, what: str) -> None:
        if not self.attribute(attribute):
            raise ConfigError(f"device cuda:{self.device_index} has no {what}, which the page pool needs")


def _bindings() -> Any:  # Any: the bindings have no types
    try:
        from cuda.bindings import driver  # here: CPU installations do not have it
    except ImportError as error:
        raise ConfigError(f"device cuda needs the package cuda-bindings: {error}") from error
    return driver


def _error(cuda: Any, call: str, status: Any) -> Exception:  # Any: the bindings have no types
    _, text = cuda.cuGetErrorString(status)
    message = f"{call} failed with {status.name}: {text.decode() if text else 'no description'}"
    if status.name == "CUDA_ERROR_OUT_OF_MEMORY":
        return OutOfChunks(message)
    return ConfigError(message) if status.name in _UNSUPPORTED else VmMisuse(message)
