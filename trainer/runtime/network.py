"""Find the network interface that leads to another machine."""

from __future__ import annotations

import ipaddress
import os
import socket

import psutil

from trainer.runtime.launch_environment import LaunchError


def interface_towards(address: str) -> str | None:
    """Return this machine's network interface towards an address or host name; None if that is its loopback.

    Raises:
        OSError: The name is unknown.
    """
    family, kind, protocol, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # sends nothing: connecting a datagram socket only looks up the route
        own = str(probe.getsockname()[0])
    if ipaddress.ip_address(own.partition("%")[0]).is_loopback:
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if any(one.address == own for one in addresses)), None)


def choose_interface(master_address: str) -> None:
    """Make gloo and NCCL use the interface towards the first node, unless the environment names another one.

    By default, gloo uses the interface of the machine's own host name. Many systems resolve that name to 127.0.1.1,
    which no other node can reach. NCCL uses the first interface that it finds, which may lead nowhere.

    Raises:
        LaunchError: The address cannot be reached, or the environment names an interface that this machine lacks.
    """
    try:
        interface = interface_towards(master_address)
    except OSError as error:
        raise LaunchError(f"MASTER_ADDR={master_address} cannot be reached from here: {error.strerror}") from None
    named, existing = os.environ.get("GLOO_SOCKET_IFNAME"), psutil.net_if_addrs()
    if named and not any(name in existing for name in named.split(",")):
        known = ", ".join(existing)
        raise LaunchError(f"GLOO_SOCKET_IFNAME={named} is not an interface of this machine ({known}); unset it")
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
