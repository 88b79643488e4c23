//! A member of a group of a cluster: asks JetStream for as many records as it has room for, and reports the
//! outcome of each.

use std::collections::BTreeMap;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::future::BoxFuture;
use headgate_bridge_nats::stream::DeliveryReceipt;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tracing::warn;

use super::super::ShareDelivery;
use super::super::prefetch_window::PrefetchWindow;
use super::{ClusterShareGroup, GroupCount};
use crate::log::{
    Batch, DeliveredRecord, RecordPlace, SHARED_KEEP_INTERVAL, ShareError, SharedPlaces, SharedRecords,
};
use crate::message::Offset;
use crate::trouble::TroubleCell;

/// How many records a member asks for at once, at most.
const MEMBER_REQUEST_RECORDS_MAX: usize = 64;
/// How long a leaving member waits before it hands records back. When a gateway stops, many members leave
/// at once, and none of them should be given these records.
const HAND_BACK_DELAY: Duration = Duration::from_millis(100);
/// How long the records of a full window last at least: a request to JetStream and its answer take some of it.
const CLUSTER_MEMBER_AHEAD: Duration = Duration::from_millis(5);
/// The pause before another attempt.
const MEMBER_RETRY_PAUSE: Duration = Duration::from_millis(250);

/// A connected member.
pub struct ClusterShareMember {
    commands: mpsc::UnboundedSender<MemberCommand>,
    given: mpsc::UnboundedReceiver<ShareDelivery>,
    places: SharedPlaces,
    /// How many records were asked for and not given yet.
    asked: usize,
    window: PrefetchWindow,
    /// When each record was taken that is not acknowledged.
    taken: BTreeMap<Offset, Instant>,
    /// The same of those that are this member's for good.
    kept: BTreeMap<Offset, Instant>,
    /// The group's place in the count of its datasource's groups.
    counted: GroupCount,
}

/// The answer to a request for records.
struct RequestedRecords {
    /// This many were removed before any member took them.
    skipped: u64,
    records: SharedRecords,
    at: Instant,
}

/// A member's message to its task.
enum MemberCommand {
    /// There is room for this many records.
    Room(usize),
    /// The record at this offset is dealt with.
    Done(Offset),
}

impl ClusterShareGroup {
    /// Asks for up to `max` records. Opens the group first if `open` gives where it begins and how long it is
    /// kept. On an error, returns after a pause.
    async fn request_records(
        self,
        max: usize,
        open: Option<(Offset, Option<Duration>)>,
    ) -> Result<RequestedRecords, ShareError> {
        let asked = async {
            let mut skipped = 0;
            if let Some((begin, kept)) = open {
                skipped = self.open(begin, kept).await?.skipped;
            }
            let records = self.places.take(&self.name, max).await?;
            if skipped > 0 {
                // Several members may see it, and one reports it. If NATS is away, a later request does.
                skipped = self.places.told_of_skipped(&self.name).await.unwrap_or(0);
            }
            Ok(RequestedRecords { skipped, records, at: Instant::now() })
        };
        match asked.await {
            Ok(asked) => Ok(asked),
            Err(error) => {
                sleep(MEMBER_RETRY_PAUSE).await;
                Err(error)
            }
        }
    }
}

impl ClusterShareMember {
    /// A member, for which the group is `kept` this long, and its task. After the member is dropped, the task
    /// hands its records on to others and ends.
    pub(super) fn new_with_task(
        group: ClusterShareGroup,
        kept: Option<Duration>,
        counted: GroupCount,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (commands, told) = mpsc::unbounded_channel();
        let (give, given) = mpsc::unbounded_channel();
        let places = group.places.clone();
        let taker = MemberTask::new(group, kept, give).run(told);
        let window = PrefetchWindow::new(CLUSTER_MEMBER_AHEAD, Instant::now().into_std());
        let (taken, kept) = (BTreeMap::new(), BTreeMap::new());
        (Self { commands, given, places, asked: 0, window, taken, kept, counted }, taker)
    }

    /// The group's place in the count, for a session that is away.
    pub fn counted(&self) -> &GroupCount {
        &self.counted
    }

    pub(in super::super) fn poll_take(&mut self, max: usize, cx: &mut Context<'_>) -> Poll<ShareDelivery> {
        loop {
            if self.asked == 0 {
                let room = self.window.room(Instant::now().into_std());
                self.asked = max.min(room).min(MEMBER_REQUEST_RECORDS_MAX);
                if self.asked > 0 {
                    let _ = self.commands.send(MemberCommand::Room(self.asked));
                }
            }
            // The channel ends only when the task ends, with this member.
            let Some(given) = ready!(self.given.poll_recv(cx)) else { return Poll::Pending };
            let ShareDelivery::Records(records) = &given else { return Poll::Ready(given) };
            self.asked = self.asked.saturating_sub(records.len());
            let left_out = self.places.withheld().now();
            let is_withheld =
                |(batch, place): &&(Batch, RecordPlace)| left_out.withholds(&batch.reader().read(*place));
            match records.iter().find(is_withheld) {
                None => {
                    let now = Instant::now();
                    self.taken.extend(records.iter().map(|(_, place)| (place.offset, now)));
                    self.window.take(records.len(), now.into_std());
                    return Poll::Ready(given);
                }
                // Acknowledge it and go on: each share has one record.
                Some((_, withheld)) => self.finish(withheld.offset),
            }
        }
    }

    pub(in super::super) fn acknowledge(&mut self, offset: Offset) {
        if let Some(taken_at) = self.taken.remove(&offset) {
            self.window.acknowledge(taken_at.into_std(), Instant::now().into_std());
        }
        self.finish(offset);
    }

    pub(in super::super) fn keep(&mut self, offset: Offset) {
        if let Some(taken_at) = self.taken.remove(&offset) {
            self.kept.insert(offset, taken_at);
        }
        self.finish(offset);
    }

    pub(in super::super) fn acknowledge_kept(&mut self, offset: Offset) {
        if let Some(taken_at) = self.kept.remove(&offset) {
            self.window.acknowledge(taken_at.into_std(), Instant::now().into_std());
        }
    }

    /// Reports that a record is dealt with.
    fn finish(&self, offset: Offset) {
        let _ = self.commands.send(MemberCommand::Done(offset));
    }
}

/// Takes records for a member, and reports the outcome of each.
struct MemberTask {
    group: ClusterShareGroup,
    kept: Option<Duration>,
    give: mpsc::UnboundedSender<ShareDelivery>,
    /// The offset after the last record given: where the group begins again, should it be gone.
    behind: Offset,
    /// How many records there is room for.
    room: usize,
    /// The request under way. It is never dropped halfway, because its records arrive in any case.
    asking: Option<BoxFuture<'static, Result<RequestedRecords, ShareError>>>,
    /// The records of the last request.
    records: Option<RequestedRecords>,
    /// Records that were given and not dealt with.
    outstanding: BTreeMap<Offset, DeliveryReceipt>,
    /// Why it can take no records.
    trouble: TroubleCell,
}

impl MemberTask {
    fn new(
        group: ClusterShareGroup,
        kept: Option<Duration>,
        give: mpsc::UnboundedSender<ShareDelivery>,
    ) -> Self {
        let (behind, outstanding) = (group.places.next_offset(), BTreeMap::new());
        let trouble = TroubleCell::new(
            "a member of a group of subscribers gets no records; trying again",
            "a member of a group of subscribers gets records again",
        );
        Self { group, kept, give, behind, room: 0, asking: None, records: None, outstanding, trouble }
    }

    /// Runs until the member is gone, and then passes its records on to others.
    async fn run(mut self, mut told: mpsc::UnboundedReceiver<MemberCommand>) {
        let mut keep = interval(SHARED_KEEP_INTERVAL);
        keep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // JetStream does not answer requests for a group that is gone, so open it first when in doubt.
        let mut is_open = false;
        let mut first_offset = 0;
        loop {
            if self.room > 0 && self.asking.is_none() && self.records.is_none() {
                // Retention may have removed records that nobody had taken; opening the group finds out.
                let first_before = std::mem::replace(&mut first_offset, self.group.places.first_offset());
                is_open &= first_before == first_offset;
                let open = (!is_open).then_some((self.behind, self.kept));
                self.asking = Some(Box::pin(self.group.clone().request_records(self.room, open)));
            }
            tokio::select! {
                command = told.recv() => match command {
                    Some(MemberCommand::Room(room)) => self.room = room,
                    Some(MemberCommand::Done(offset)) => {
                        if let Some(receipt) = self.outstanding.remove(&offset) {
                            receipt.done().await;
                        }
                    }
                    None => break,
                },
                asked = finish_request(&mut self.asking), if self.asking.is_some() => {
                    is_open = asked.is_ok();
                    self.receive(asked);
                }
                given = next_given_record(&mut self.records), if self.records.is_some() => match given {
                    Some(given) => self.deliver(given).await,
                    None => if let Some(RequestedRecords { records, at, .. }) = self.records.take() {
                        is_open = records.is_complete();
                        // Refused: too many members wait, or there is no leader now.
                        if !is_open && at.elapsed() < MEMBER_RETRY_PAUSE {
                            self.asking = Some(Box::pin(async { sleep(MEMBER_RETRY_PAUSE).await; Err(ShareError::refused()) }));
                        }
                    },
                },
                _ = keep.tick() => {
                    for receipt in self.outstanding.values() {
                        receipt.keep().await;
                    }
                }
            }
        }
        self.hand_back().await;
    }

    /// Receives the answer to the request under way.
    fn receive(&mut self, asked: Result<RequestedRecords, ShareError>) {
        self.asking = None;
        self.trouble.set(asked.as_ref().err().map(ToString::to_string));
        if let Ok(RequestedRecords { skipped: skipped @ 1.., .. }) = asked {
            let _ = self.give.send(ShareDelivery::Skipped(skipped));
        }
        self.records = asked.ok();
    }

    /// Passes on to others what the member has not dealt with, and what is still coming.
    async fn hand_back(mut self) {
        if let Some(asking) = self.asking {
            self.records = asking.await.ok();
            if let Some(RequestedRecords { skipped: skipped @ 1.., .. }) = self.records {
                warn!(
                    skipped,
                    "retention has removed records before a group read them, and its member has left"
                );
            }
        }
        let rest = match self.records {
            Some(RequestedRecords { records, .. }) => records.end().await,
            None => Vec::new(),
        };
        if !self.outstanding.is_empty() || !rest.is_empty() {
            sleep(HAND_BACK_DELAY).await;
        }
        for receipt in self.outstanding.into_values().chain(rest) {
            receipt.pass_on().await;
        }
    }

    async fn deliver(&mut self, DeliveredRecord { batch, place, receipt }: DeliveredRecord) {
        if !self.group.matches(&batch.reader().read(place)) {
            receipt.done().await;
            return;
        }
        self.behind = self.behind.max(place.offset + 1);
        // JetStream sends a record again when it hears nothing of it for long; give it only once.
        if self.outstanding.insert(place.offset, receipt).is_none() {
            self.room = self.room.saturating_sub(1);
            let _ = self.give.send(ShareDelivery::Records(vec![(batch, place)]));
        }
    }
}

async fn finish_request<T>(asking: &mut Option<BoxFuture<'static, T>>) -> T {
    match asking {
        Some(asking) => asking.await,
        None => std::future::pending().await,
    }
}

async fn next_given_record(asked: &mut Option<RequestedRecords>) -> Option<DeliveredRecord> {
    asked.as_mut()?.records.next().await
}
