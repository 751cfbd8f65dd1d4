"""A few numbers on their way from the device to the host: started without waiting, read when they have arrived.

Reading a number of the step that the GPU is busy with makes the host wait, and then the GPU waits for the host. A number that is
read one step later has long arrived.
"""

import torch
from torch import Tensor


class HostCopy:
    """The copy of a small tensor. `read` waits for what was on the device's queue before it, and nothing after."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.device.type != "cuda":
            self._host = values
            return
        # From pageable memory the driver would copy in step with the host, whatever non_blocking says.
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._host.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def read(self) -> list[float]:
        """The numbers, in order."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
