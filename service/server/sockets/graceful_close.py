"""Closes a listening socket without resetting a client that has just connected.

The kernel completes a client's handshake before the worker calls ``accept``. A client that connects
between the worker's last ``accept`` and its ``close`` can send a request and is then reset: seen in
2 of 25 shutdowns under load. So the worker first attaches a packet filter to the socket, which
drops packets that open a connection (SYN). Handshakes under way complete, and the worker accepts
those clients. A client whose SYN was dropped tries again within about a second, and reaches another
worker, or none. It has not sent a request yet, so no request is lost.
"""

import contextlib
import ctypes
import socket
import sys

RECONCILE_TIMEOUT_S = 0.02
"""So long after ``reject_new_connections``, the handshakes that were under way are complete."""

# From Linux's asm-generic/socket.h and linux/bpf_common.h.
SO_ATTACH_FILTER = 26
_LOAD_BYTE, _AND, _JUMP_IF_EQUAL, _RETURN = 0x30, 0x54, 0x15, 0x06
_FLAGS_AT, _SYN, _ACK = 13, 0x02, 0x10  # of a TCP header (RFC 9293)
_PROGRAM = (
    (_LOAD_BYTE, 0, 0, _FLAGS_AT),
    (_AND, 0, 0, _SYN | _ACK),
    (_JUMP_IF_EQUAL, 0, 1, _SYN),
    (_RETURN, 0, 0, 0),  # drop the packet
    (_RETURN, 0, 0, 0xFFFFFFFF),  # pass the entire packet
)


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    )


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("program", ctypes.POINTER(_Instruction)))


def reject_new_connections(listener: socket.socket) -> None:
    """Make the kernel drop new connections to ``listener``.

    Does nothing if the kernel does not support the filter.
    """
    if sys.platform != "linux" or listener.family not in (socket.AF_INET, socket.AF_INET6):
        return
    program = (_Instruction * len(_PROGRAM))(*(_Instruction(*each) for each in _PROGRAM))
    with contextlib.suppress(OSError):
        listener.setsockopt(
            socket.SOL_SOCKET, SO_ATTACH_FILTER, bytes(_Filter(len(_PROGRAM), program))
        )
