//! What goes wrong beneath a model run: clocks that are set, full disks, restarts, kills and losses of power.

use std::time::{Duration, Instant};

use super::client::ModelConnection;
use super::run::{ModelGateway, ModelRun};
use crate::intake::Refusal;
use crate::log::AppendError;
use crate::seeded_random::SeededRandom;

impl ModelRun {
    /// The clock is set, by up to an hour in either direction.
    pub(super) fn jump_clock(&mut self) {
        let hour = 3_600_000_000;
        self.clock += i64::try_from(self.random.below(2 * hour)).expect("small") - 3_600_000_000;
    }

    /// A read while the disk is full. What is refused so is not in the log, whatever comes later.
    pub(super) async fn fill_disk(&mut self, connection: usize) {
        while !self.connections[connection].pending.is_empty() {
            self.take_answer(connection).await;
        }
        self.gateway().log.barrier().await;
        self.disk.set_full(true);
        let (draft, messages) = self.draft(connection);
        let answer = self.gateway().intake.admit(draft).await.expect("room").await;
        self.disk.set_full(false);
        match answer {
            // There was nothing to write.
            Ok(durable) => self.settle(connection, &messages, &durable.outcomes).await,
            Err(Refusal::Log(AppendError::DiskFull)) => {
                messages.iter().for_each(|message| self.message(message.number).refused = true);
                self.connections[connection].lose_answers();
            }
            Err(other) => panic!("{other:?}"),
        }
    }

    /// Stops and starts the gateway. Clients may lose the answers that they wait for.
    pub(super) async fn restart(&mut self) {
        if self.random.percent(50) {
            self.take_all_answers().await;
        }
        let ModelGateway { intake, log, storage } = self.gateway.take().expect("open");
        log.close().await;
        self.connections.iter_mut().for_each(ModelConnection::lose_answers);
        storage.stop(Instant::now() + Duration::from_secs(10)).await;
        drop((intake, log, storage));
        self.gateway = Some(ModelGateway::open(self.dir.path(), &self.disk));
    }

    /// The gateway is killed or loses its power, perhaps while it writes a read of `connection`. What was not synced is
    /// there whole, not at all, or in part.
    pub(super) async fn crash(&mut self, connection: usize) {
        if !self.may_crash {
            return;
        }
        if self.random.percent(50) {
            self.take_all_answers().await;
        }
        self.gateway().log.barrier().await;
        let (draft, messages) = self.draft(connection);
        let ModelGateway { intake, log, storage } = self.gateway.take().expect("open");
        storage.stop(Instant::now() + Duration::from_secs(10)).await;
        self.disk.set_syncs_fail(true);
        if self.random.percent(70) {
            match intake.admit(draft).await.expect("room").await {
                // It may be found or not, so nothing is known of it.
                Err(Refusal::Log(AppendError::Failed(_))) | Ok(_) => {}
                Err(other) => panic!("{other:?}"),
            }
        } else {
            drop(draft);
            messages.iter().for_each(|message| self.message(message.number).refused = true);
        }
        log.close().await;
        self.connections.iter_mut().for_each(ModelConnection::lose_answers);
        drop((intake, log, storage));
        let reached_percent = [0, 100, 50, 90][self.random.below(4)];
        // Of its own, because how much there is to lose depends on more than the seed.
        let mut random = SeededRandom(self.random.below(1 << 30) as u64);
        self.disk.lose_power(|| random.percent(reached_percent));
        self.disk.set_syncs_fail(false);
        self.gateway = Some(ModelGateway::open(self.dir.path(), &self.disk));
    }
}
