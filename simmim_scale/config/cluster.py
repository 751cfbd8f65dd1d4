"""Devices and links that `simmim plan` knows by name, from their makers' data sheets. Pure tables and look-ups."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Device:
    """A GPU: matrix products in bf16 or fp16, and in fp32 without TF32, FLOP/s; bandwidth of its memory and of its link, B/s.

    `link` is that of NVLink in one direction, or of PCIe where a card has no NVLink. memory: of the card, GiB.
    """

    name: str
    half: float
    single: float
    bandwidth: float
    link: float
    memory: int


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device("B200", 2250e12, 75e12, 8000 * GB, 900 * GB, 180),
        Device("H200", 989.4e12, 66.9e12, 4800 * GB, 450 * GB, 141),
        Device("H100", 989.4e12, 66.9e12, 3350 * GB, 450 * GB, 80),
        Device("A100", 311.9e12, 19.5e12, 2039 * GB, 300 * GB, 80),
        Device("L40S", 362.1e12, 91.6e12, 864 * GB, 32 * GB, 48),
        Device("A40", 149.7e12, 37.4e12, 696 * GB, 32 * GB, 48),
        Device("A10", 125e12, 31.2e12, 600 * GB, 32 * GB, 24),
        Device("V100", 125e12, 15.7e12, 900 * GB, 150 * GB, 32),
    )
}


@dataclass(frozen=True)
class Link:
    """What a collective goes through: bytes a second and direction, of each GPU (or of the whole node, shared by its GPUs)."""

    name: str
    bandwidth: float
    per_node: bool = False

    def per_gpu(self, gpus_per_node: int) -> float:
        return self.bandwidth / gpus_per_node if self.per_node else self.bandwidth


FIXED_LINKS: Mapping[str, float] = {"pcie": 32 * GB, "pcie3": 16 * GB, "pcie4": 32 * GB, "pcie5": 64 * GB}


def find_device(name: str) -> Device:
    """A device of the table, whatever the case of its name.

    Raises:
        ValueError: it is not there.
    """
    found = {key.lower(): device for key, device in DEVICES.items()}.get(name.lower())
    if found is None:
        raise ValueError(
            f"--gpu: one of {', '.join(DEVICES)}, got {name!r}. Take the nearest one; --gpu-memory is yours to give."
        )
    return found


def find_link(text: str | None, device: Device, *, nodes: int) -> Link:
    """What `--interconnect` says: nvlink, pcie, pcie3 to pcie5, ib-NUMBER or ethernet-NUMBER (Gbit/s), or a number of GB/s.

    InfiniBand is counted as one adapter for each GPU, Ethernet as one for each node. None: the card's own link inside a node,
    and ib-400 between nodes.

    Raises:
        ValueError: something else, a bandwidth that is not positive, or a link inside a node for several nodes.
    """
    text = text or ("ib-400" if nodes > 1 else "nvlink")
    name = text.lower()
    if nodes > 1 and (name == "nvlink" or name in FIXED_LINKS):
        raise ValueError(f"--interconnect: {text} ends at a node's edge, got {nodes} nodes. Name their network, e.g. ib-400.")
    if name == "nvlink":
        return Link(f"{device.name}'s own link", device.link)
    if name in FIXED_LINKS:
        return Link(name, FIXED_LINKS[name])
    network = re.fullmatch(r"(ib|ethernet)-(\d+(?:\.\d+)?)", name)
    if network and float(network[2]) > 0:
        return Link(name, float(network[2]) / 8 * GB, per_node=network[1] == "ethernet")
    number = re.fullmatch(r"(\d+(?:\.\d+)?)(?:\s*gb/s)?", name)
    if number and float(number[1]) > 0:
        return Link(f"{float(number[1]):g} GB/s", float(number[1]) * GB)
    raise ValueError(
        f"--interconnect: nvlink, pcie, pcie3, pcie4, pcie5, ib-GBITS (ib-400), ethernet-GBITS (ethernet-100), or GB/s as a"
        f" positive number, got {text!r}."
    )
