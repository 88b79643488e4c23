//! Which gateway writes. The row with the cursor names it, with its connection and the time until which no other one takes
//! its place. That time is moved on with every transaction; a gateway that is stopped for longer loses its place, and the
//! server ends its connection, with the transaction that it may be in. One whose connection has ended loses it at once.

use std::time::{Duration, Instant};

use super::{PostgresError, PostgresSink};

/// How long a gateway keeps its place without a sign of life, in seconds.
pub(super) const LEASE_S: f64 = 10.0;
/// How often it gives one when it has nothing to store.
const LEASE_RENEWAL_INTERVAL: Duration = Duration::from_secs(2);
/// How long a gateway alone waits for a place that it may have had itself before it was killed.
const OWN_LEASE_WAIT: Duration = Duration::from_secs(5);

impl PostgresSink {
    /// Whether this gateway writes now. If another one does, takes over how far that is.
    ///
    /// # Errors
    /// [`PostgresError::OtherOwner`] if the tables are not shared.
    pub(in crate::consume) fn is_writer(&mut self) -> Result<bool, PostgresError> {
        if self.leased_at.is_some_and(|at| at.elapsed() < LEASE_RENEWAL_INTERVAL) {
            return Ok(true);
        }
        let row = self.connection.query_one(
            "SELECT owner, owner_pid, coalesce(lease_until < clock_timestamp(), true),
                 EXISTS (SELECT FROM pg_stat_activity a WHERE a.pid = s.owner_pid
                     AND coalesce(a.backend_start = s.owner_since, true))
             FROM sink s",
            &[],
        )?;
        let (owner, pid): (Option<String>, Option<i32>) = (row.get(0), row.get(1));
        let (is_late, is_alive): (bool, bool) = (row.get(2), row.get(3));
        if owner.as_deref() == Some(&*self.name) && self.leased_at.is_some() {
            self.extend_lease(Duration::ZERO)?;
            return Ok(true);
        }
        if is_late || !is_alive {
            if is_alive && let Some(pid) = pid {
                // Its transaction, if it is in one, holds locks on what is written next.
                self.connection.query("SELECT pg_terminate_backend($1)", &[&pid])?;
            }
            return self.take_place(owner.as_deref());
        }
        self.leased_at = None;
        self.read_cursor()?;
        if !self.is_shared && self.started_at.elapsed() > OWN_LEASE_WAIT {
            return Err(PostgresError::OtherOwner { schema: self.config.schema.clone() });
        }
        Ok(false)
    }

    /// Takes the place of the one that writes, if that is still `earlier`.
    fn take_place(&mut self, earlier: Option<&str>) -> Result<bool, PostgresError> {
        let taken = self.connection.execute(
            "UPDATE sink SET owner = $1, owner_pid = pg_backend_pid(), lease_until = clock_timestamp() + $3 * interval '1 second',
                 owner_since = (SELECT backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid())
             WHERE owner IS NOT DISTINCT FROM $2",
            &[&self.name, &earlier, &LEASE_S],
        )?;
        if taken == 1 {
            // The connection of its samples may wait for it in the middle of a transaction, for ever.
            self.connection.query(
                "SELECT pg_terminate_backend(a.pid) FROM sample_lane l JOIN pg_stat_activity a ON a.pid = l.pid
                 WHERE a.backend_start = l.pid_since AND a.pid <> pg_backend_pid()",
                &[],
            )?;
            self.lane = None;
        }
        self.read_cursor()?;
        if taken == 1 {
            self.names.clear();
            self.sizes.clear();
            self.left_out = None;
            self.leased_at = Some(Instant::now());
        }
        Ok(taken == 1)
    }

    /// Keeps the place for as long as usual, and for `more`.
    pub(super) fn extend_lease(&mut self, more: Duration) -> Result<(), PostgresError> {
        let kept = self.connection.execute(
            "UPDATE sink SET lease_until = clock_timestamp() + $2 * interval '1 second'
             WHERE owner = $1 AND owner_pid = pg_backend_pid()",
            &[&self.name, &(LEASE_S + more.as_secs_f64())],
        )?;
        if kept != 1 {
            self.leased_at = None;
            return Err(self.cursor_moved());
        }
        self.leased_at = Some(Instant::now());
        Ok(())
    }
}
