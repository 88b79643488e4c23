//! The resident memory of a gateway's process, as the kernel counts it: what an attack made it take at most.

use std::time::{Duration, Instant};

use super::Gateway;
use super::steady::Steady;
use super::wire::{Version, Wire};

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

/// What another tenant's call may take while somebody attacks: generous, because the machine is busy with other tests.
const BYSTANDER_MAX: Duration = Duration::from_secs(15);

/// A second tenant during an attack: it publishes all the time, and its keys are revoked.
pub struct Bystander<'a> {
    gateway: &'a Gateway,
    steady: Steady,
}

impl<'a> Bystander<'a> {
    /// Begins to publish.
    pub fn start(gateway: &'a Gateway) -> Self {
        let source = gateway.create("bystander");
        Self { gateway, steady: Steady::start(gateway.mqtt, &source.key) }
    }

    /// How long the end of a key takes now, from the call to its answer.
    pub fn revocation_took(&self) -> Duration {
        let source = self.gateway.create("bystander-2");
        let mut wire = Wire::login(self.gateway.mqtt, Version::V5, &source.key);
        let started = Instant::now();
        self.gateway.delete("bystander-2");
        let took = started.elapsed();
        wire.disconnected(0x98);
        took
    }

    /// Panics if it noticed much of the attack, or if the attack took too much memory.
    pub fn assert_undisturbed(self, attack: &str) {
        let revocation = self.revocation_took();
        let memory = ResidentMemory::of(self.gateway);
        let acks = self.steady.stop();
        eprintln!("{attack}: acks p99 {:?}, max {:?}; a revocation {revocation:?}", acks.p99(), acks.max());
        memory.assert_bounded(attack);
        assert!(acks.p99() < BYSTANDER_MAX, "{attack}: acks of another tenant took {:?}", acks.p99());
        assert!(revocation < BYSTANDER_MAX, "{attack}: a revocation took {revocation:?}");
    }
}
