"""The part of the KVM API that reads and sets the state of a machine: who starts one anew does without (1 ms in all with its users)."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_char, c_uint8, c_uint16, c_uint32, c_uint64

from nagaya.kernel.kvm import ior, iow, iowr


class kvm_msr_list(Structure):
    """The head; `nmsrs` 32-bit indices follow it."""

    _fields_ = [("nmsrs", c_uint32)]


class kvm_pit_channel_state(Structure):
    _fields_ = [
        ("count", c_uint32), ("latched_count", c_uint16), ("count_latched", c_uint8), ("status_latched", c_uint8),
        ("status", c_uint8), ("read_state", c_uint8), ("write_state", c_uint8), ("write_latch", c_uint8),
        ("rw_mode", c_uint8), ("mode", c_uint8), ("bcd", c_uint8), ("gate", c_uint8), ("count_load_time", ctypes.c_int64),
    ]  # fmt: skip


class kvm_pit_state2(Structure):
    _fields_ = [("channels", kvm_pit_channel_state * 3), ("flags", c_uint32), ("reserved", c_uint32 * 9)]


class kvm_clock_data(Structure):
    _fields_ = [
        ("clock", c_uint64), ("flags", c_uint32), ("pad0", c_uint32), ("realtime", c_uint64), ("host_tsc", c_uint64),
        ("pad", c_uint32 * 4),
    ]  # fmt: skip


class kvm_mp_state(Structure):
    _fields_ = [("mp_state", c_uint32)]


class kvm_lapic_state(Structure):
    _fields_ = [("regs", c_char * 0x400)]


class kvm_xsave(Structure):
    _fields_ = [("region", c_uint32 * 1024)]


class kvm_xcr(Structure):
    _fields_ = [("xcr", c_uint32), ("reserved", c_uint32), ("value", c_uint64)]


class kvm_xcrs(Structure):
    _fields_ = [("nr_xcrs", c_uint32), ("flags", c_uint32), ("xcrs", kvm_xcr * 16), ("padding", c_uint64 * 16)]


class kvm_debugregs(Structure):
    _fields_ = [
        ("db", c_uint64 * 4), ("dr6", c_uint64), ("dr7", c_uint64), ("flags", c_uint64), ("reserved", c_uint64 * 9),
    ]  # fmt: skip


KVM_GET_MSR_INDEX_LIST = iowr(0x02, kvm_msr_list)
KVM_SET_CLOCK = iow(0x7B, kvm_clock_data)
KVM_GET_CLOCK = ior(0x7C, kvm_clock_data)
KVM_GET_LAPIC = ior(0x8E, kvm_lapic_state)
KVM_SET_LAPIC = iow(0x8F, kvm_lapic_state)
KVM_GET_MP_STATE = ior(0x98, kvm_mp_state)
KVM_SET_MP_STATE = iow(0x99, kvm_mp_state)
KVM_GET_PIT2 = ior(0x9F, kvm_pit_state2)
KVM_SET_PIT2 = iow(0xA0, kvm_pit_state2)
KVM_GET_DEBUGREGS = ior(0xA1, kvm_debugregs)
KVM_SET_DEBUGREGS = iow(0xA2, kvm_debugregs)
KVM_GET_XSAVE = ior(0xA4, kvm_xsave)
KVM_SET_XSAVE = iow(0xA5, kvm_xsave)
KVM_GET_XCRS = ior(0xA6, kvm_xcrs)
KVM_SET_XCRS = iow(0xA7, kvm_xcrs)

KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_UNINITIALIZED = 1
KVM_MP_STATE_HALTED = 3
