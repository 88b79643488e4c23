//! The resident memory of a gateway's process, as the kernel counts it: what an attack made it take at most.

use super::Gateway;

/// What the resident memory of a gateway at its defaults stays under, whatever anybody sends.
pub const RESIDENT_BYTES_MAX: u64 = 512 << 20;

/// The memory of a running gateway.
pub struct ResidentMemory {
    pid: u32,
}

impl ResidentMemory {
    /// That of `gateway`.
    pub fn of(gateway: &Gateway) -> Self {
        Self { pid: gateway.pid() }
    }

    /// The most bytes that were ever resident (`VmHWM`), so that no peak is missed between two looks.
    pub fn peak_bytes(&self) -> u64 {
        self.bytes("VmHWM:")
    }

    /// The bytes that are resident now (`VmRSS`).
    pub fn bytes_now(&self) -> u64 {
        self.bytes("VmRSS:")
    }

    /// Panics if more than [`RESIDENT_BYTES_MAX`] were ever resident; `during` says what was going on.
    pub fn assert_bounded(&self, during: &str) {
        let peak = self.peak_bytes();
        eprintln!("{during}: {} MiB resident at the most, {} now", peak >> 20, self.bytes_now() >> 20);
        assert!(
            peak < RESIDENT_BYTES_MAX,
            "{during}: {} MiB were resident, of {} that are allowed",
            peak >> 20,
            RESIDENT_BYTES_MAX >> 20
        );
    }

    fn bytes(&self, field: &str) -> u64 {
        let path = format!("/proc/{}/status", self.pid);
        let status = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kib.unwrap_or_else(|| panic!("no {field} in {path}")) << 10
    }
}
