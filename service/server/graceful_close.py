"""The end of a listening socket, without a connection that is made and never answered.

A client is connected when the kernel has shaken hands, before anybody accepts. Between the last
``accept`` and ``close`` there is always a moment, and whoever connects in it is reset after it has
asked: seen twice in 25 ends under load. So first the kernel is told to let nobody new begin, by a
filter that drops the packets that would (SYN); who has begun finishes, and is accepted. Whoever is
dropped tries again within a second or so, and finds another who listens, or nobody: no request
of theirs was sent.
"""

import contextlib
import ctypes
import socket
import sys

RECONCILE_TIMEOUT_S = 0.02
"""After ``reject_new_connections``, handshakes that had begun are over."""

# From Linux's asm-generic/socket.h and linux/bpf_common.h.
SO_ATTACH_FILTER = 26
_LOAD_BYTE, _AND, _JUMP_IF_EQUAL, _RETURN = 0x30, 0x54, 0x15, 0x06
_FLAGS_AT, _SYN, _ACK = 13, 0x02, 0x10  # of a TCP header (RFC 9293)
_PROGRAM = (
    (_LOAD_BYTE, 0, 0, _FLAGS_AT),
    (_AND, 0, 0, _SYN | _ACK),
    (_JUMP_IF_EQUAL, 0, 1, _SYN),
    (_RETURN, 0, 0, 0),  # dropped
    (_RETURN, 0, 0, 0xFFFFFFFF),  # whole
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
    """Have nobody new begin to connect; where the kernel cannot, nothing changes."""
    if sys.platform != "linux" or listener.family not in (socket.AF_INET, socket.AF_INET6):
        return
    preprocessed = (_Instruction * len(_PROGRAM))(*(_Instruction(*each) for each in _PROGRAM))
    with contextlib.suppress(OSError):
        listener.setsockopt(
            socket.SOL_SOCKET, SO_ATTACH_FILTER, bytes(_Filter(len(_PROGRAM), preprocessed))
        )
