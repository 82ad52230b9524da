"""Which network interface leads to another machine."""

from __future__ import annotations

import ipaddress
import os
import socket

import psutil


def interface_towards(address: str) -> str | None:
    """This machine's network interface towards an address or a name; None where that is this machine's loopback.

    Raises: OSError when the name is not known.
    """
    family, kind, protocol, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # of a datagram socket: only looks the route up
        own = str(probe.getsockname()[0])
    if ipaddress.ip_address(own.partition("%")[0]).is_loopback:
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if any(one.address == own for one in addresses)), None)


def choose_interface(master_address: str) -> None:
    """Have gloo and NCCL use the interface towards the first node, unless somebody named another one.

    Gloo takes the interface of the machine's own name otherwise, which many systems put on 127.0.1.1, where no other
    node reaches it; NCCL takes the first one that it finds, which may lead nowhere.
    """
    interface = interface_towards(master_address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
