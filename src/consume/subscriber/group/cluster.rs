//! Groups of a cluster, whose members may be at any of its gateways: JetStream keeps the group's place in
//! the log, and gives each record to one member.
//!
//! A member asks for as many records as it has room for. Those whose connection ends hand back what they
//! have not dealt with; what a gateway had that was killed comes to others after some seconds.
//!
//! A group is over when the last session gives up its subscription, or ends. Those that outlive their
//! connections are on a roll, in the bucket that sessions are in; of the others each gateway knows its own.
//! JetStream is told too how long the sessions stay, for those that are never heard of again.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use headgate_bridge_nats::presence::Reply;
use headgate_bridge_nats::stream::Receipt;
use headgate_bridge_nats::{CellError, NatsError, Presence};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::super::sessions::bucket::GroupRolls;
use super::{GroupKey, GroupSession, JoinError, Share};
use crate::filter::TopicFilter;
use crate::log::{Given, KEEP_EVERY, ShareError, SharedPlace, SharedPlaces, SharedRecords};
use crate::message::{Offset, RecordRef};
use crate::subject::Space;

/// How long a group stays while nobody takes from it, beyond what its sessions do: members that are there,
/// and take nothing for so long, count as gone.
const KEPT: Duration = Duration::from_secs(3600);
/// Records that a member asks for at once.
const TAKEN_MAX: usize = 64;
/// How long a member keeps what it hands on: so many leave at the same moment, as their gateway stops, and
/// none of them is to be given it.
const OTHERS_LEAVE: Duration = Duration::from_millis(100);
/// The pause before another attempt.
const PAUSE: Duration = Duration::from_millis(250);
/// How long after somebody has left it is looked whether the group is over.
const LEFT: Duration = Duration::from_millis(600);
/// How often it is said that a session which is there has a group.
const ROLL_AGAIN: Duration = Duration::from_secs(12 * 3_600);
/// What other gateways are asked, with a group's name: has it members there?
const QUESTION: &str = "headgate.groups";
const NONE: &[u8] = b"none";
const SOME: &[u8] = b"some";
/// How long they may take to answer.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(2);

/// The groups, as far as this gateway has to do with them.
pub struct Groups {
    places: SharedPlaces,
    rolls: GroupRolls,
    presence: Arc<Presence>,
    here: Arc<Here>,
    tasks: TaskTracker,
}

/// How many members each group has at this gateway.
#[derive(Default)]
struct Here(Mutex<HashMap<String, usize>>);

impl Here {
    fn locked(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has(&self, group: &str) -> bool {
        self.locked().contains_key(group)
    }

    fn leave(&self, group: &str) {
        let mut here = self.locked();
        if let Some(members) = here.get_mut(group) {
            *members -= 1;
            if *members == 0 {
                here.remove(group);
            }
        }
    }
}

/// The place of a group.
#[derive(Clone)]
struct Group {
    places: SharedPlaces,
    name: String,
    subjects: Vec<String>,
    /// With the datasource as its first level, for a key of all.
    filter: TopicFilter,
    of_all: bool,
}

/// A connected member.
pub struct Member {
    commands: mpsc::UnboundedSender<Command>,
    given: mpsc::UnboundedReceiver<Share>,
    places: SharedPlaces,
    /// How many more were asked for.
    asked: usize,
}

/// Records that were asked for.
struct Asked {
    /// So many were removed before anybody took them.
    skipped: u64,
    records: SharedRecords,
    at: Instant,
}

/// What a member's task is told.
enum Command {
    /// There is room for so many more.
    Room(usize),
    /// This one is dealt with.
    Done(Offset),
}

impl Groups {
    /// None, yet. Other gateways are told of those that will be here.
    ///
    /// # Errors
    /// [`NatsError`]: the connection was closed for good.
    pub async fn start(
        places: SharedPlaces,
        rolls: GroupRolls,
        presence: Arc<Presence>,
    ) -> Result<Self, NatsError> {
        let here = Arc::<Here>::default();
        let here_too = here.clone();
        let answer = move |group: Bytes| {
            let has = std::str::from_utf8(&group).is_ok_and(|group| here_too.has(group));
            std::future::ready(Bytes::from_static(if has { SOME } else { NONE }))
        };
        presence.serve(QUESTION, answer).await?;
        Ok(Self { places, rolls, presence, here, tasks: TaskTracker::new() })
    }

    /// Returns when what the members had that are gone is on its way to others.
    pub(super) async fn close(&self) {
        self.tasks.close();
        self.tasks.wait().await;
        self.places.flush().await;
    }

    pub(super) async fn join(
        &self,
        key: &GroupKey,
        of: GroupSession,
        from: Option<Offset>,
    ) -> Result<(), JoinError> {
        let Some(group) = self.group(key) else { return Ok(()) };
        let begin = from.unwrap_or_else(|| self.places.next_offset());
        let place = group.open(begin, kept(of)).await?;
        if from.is_some() && !place.is_new {
            return Err(JoinError::Elsewhere);
        }
        if of.stays() {
            self.rolls.enter(&group.name, of.uid).await?;
        }
        Ok(())
    }

    pub(super) fn stay(&self, key: &GroupKey, of: GroupSession) {
        let Some(group) = self.group(key) else { return };
        self.tasks.spawn(async move {
            if let Err(error) = group.open(group.places.next_offset(), kept(of)).await {
                warn!(%error, "a group of subscribers may be over before its last session is");
            }
        });
    }

    pub(super) fn leave(&self, key: &GroupKey, uid: u64, ever_stayed: bool) {
        let Some(Group { places, name, .. }) = self.group(key) else { return };
        let (presence, here, rolls) = (self.presence.clone(), self.here.clone(), self.rolls.clone());
        let struck = ever_stayed.then(|| rolls.strike(&name, uid));
        tokio::spawn(async move {
            let over = async {
                if let Some(struck) = struck {
                    struck.await?;
                }
                sleep(LEFT).await;
                if here.has(&name) {
                    return Ok::<_, CellError>(false);
                }
                let answers = presence.ask_all(QUESTION, Bytes::from(name.clone()), ANSWER_WAIT_MAX).await;
                let is_none = |reply: &Reply| match reply {
                    Reply::Answer(answer) => answer == NONE,
                    Reply::Gone => true,
                    Reply::Silent => false,
                };
                Ok(answers.iter().all(|(_, reply)| is_none(reply)) && rolls.is_empty(&name).await?)
            };
            match over.await {
                Ok(false) => {}
                // If it cannot be now, it is over by itself some time later.
                Ok(true) => _ = places.give_up(&name).await,
                Err(error) => debug!(%error, "whether a group of subscribers is over cannot be known now"),
            }
        });
    }

    pub(super) fn member(&self, key: &GroupKey, of: GroupSession) -> Option<Member> {
        let group = self.group(key)?;
        let (commands, told) = mpsc::unbounded_channel();
        let (give, given) = mpsc::unbounded_channel();
        *self.here.locked().entry(group.name.clone()).or_default() += 1;
        let (here, name) = (self.here.clone(), group.name.clone());
        // Before whatever is said when the member is gone.
        let entered = of.stays().then(|| self.rolls.enter(&name, of.uid));
        let rolls = self.rolls.clone();
        let taker = Taker::new(group, kept(of), give);
        self.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = taker.run(told) => {}
                () = stay_on_roll(rolls, &name, of, entered) => {}
            }
            here.leave(&name);
        });
        Some(Member { commands, given, places: self.places.clone(), asked: 0 })
    }

    /// `None` for a filter that no record of a cluster has the topic for.
    fn group(&self, key: &GroupKey) -> Option<Group> {
        let (datasource, group, filter) = key;
        let of_all = datasource.is_all();
        let subjects = Space::Stream.all_named((!of_all).then_some(datasource), filter);
        if subjects.is_empty() {
            return None;
        }
        let filter = TopicFilter::new(filter).ok()?;
        let mut name = String::from("share-");
        let mut hash = blake3::Hasher::new_derive_key("headgate 2026-11 name of a shared subscription");
        for part in [datasource.as_str(), group, filter.as_str()] {
            hash.update(part.as_bytes()).update(&[0]);
        }
        name.push_str(&hash.finalize().to_hex()[..32]);
        Some(Group { places: self.places.clone(), name, subjects, filter, of_all })
    }
}

/// How long a group is kept for a session; `None`: for ever.
fn kept(of: GroupSession) -> Option<Duration> {
    (of.expiry_s != u32::MAX).then(|| Duration::from_secs(of.expiry_s.into()) + KEPT)
}

/// Says again and again that a session has the group, so that it is on its roll for as long as it stays. Never
/// returns.
async fn stay_on_roll(
    rolls: GroupRolls,
    group: &str,
    of: GroupSession,
    entered: Option<impl Future<Output = Result<(), CellError>>>,
) {
    let Some(entered) = entered else { return std::future::pending().await };
    let mut result = entered.await;
    loop {
        sleep(if result.is_ok() { ROLL_AGAIN } else { LEFT }).await;
        result = rolls.enter(group, of.uid).await;
    }
}

impl Group {
    async fn open(&self, from: Offset, kept: Option<Duration>) -> Result<SharedPlace, ShareError> {
        self.places.open(&self.name, self.subjects.clone(), from, kept).await
    }

    /// Asks for up to `max` records, after it was opened, if `open` says where it begins and for how long it is
    /// kept. If that cannot be, it is over after a pause.
    async fn ask(self, max: usize, open: Option<(Offset, Option<Duration>)>) -> Result<Asked, ShareError> {
        let asked = async {
            let mut skipped = 0;
            if let Some((begin, kept)) = open {
                skipped = self.open(begin, kept).await?.skipped;
            }
            let records = self.places.take(&self.name, max).await?;
            if skipped > 0 {
                // Of several members who found it one tells it. If NATS is away, it is for the next time.
                skipped = self.places.told_of_skipped(&self.name).await.unwrap_or(0);
            }
            Ok(Asked { skipped, records, at: Instant::now() })
        };
        match asked.await {
            Ok(asked) => Ok(asked),
            Err(error) => {
                sleep(PAUSE).await;
                Err(error)
            }
        }
    }

    /// Whether a record is one of the group's: its subjects may say more.
    fn matches(&self, record: &RecordRef<'_>) -> bool {
        match self.of_all {
            true => self.filter.matches(&format!("{}/{}", record.datasource, record.topic)),
            false => self.filter.matches(record.topic),
        }
    }
}

impl Member {
    pub(super) fn poll_take(&mut self, max: usize, cx: &mut Context<'_>) -> Poll<Share> {
        loop {
            if self.asked == 0 {
                self.asked = max.min(TAKEN_MAX);
                let _ = self.commands.send(Command::Room(self.asked));
            }
            // The task ends with this.
            let Some(given) = ready!(self.given.poll_recv(cx)) else { return Poll::Pending };
            let Share::Records(batch, places) = &given else { return Poll::Ready(given) };
            self.asked = self.asked.saturating_sub(places.len());
            let left_out = self.places.withheld().now();
            let mut reader = batch.reader();
            match places.iter().find(|place| left_out.withholds(&reader.read(**place))) {
                None => return Poll::Ready(given),
                // They come one by one.
                Some(withheld) => self.acknowledge(withheld.offset),
            }
        }
    }

    pub(super) fn acknowledge(&self, offset: Offset) {
        let _ = self.commands.send(Command::Done(offset));
    }
}

/// Takes records for a member, and says what becomes of them.
struct Taker {
    group: Group,
    kept: Option<Duration>,
    give: mpsc::UnboundedSender<Share>,
    /// Behind what it was given: where the group begins anew, should it be gone.
    behind: Offset,
    /// For how many there is room.
    room: usize,
    /// Records are being asked for. What was asked for comes, and so this is never given up halfway.
    asking: Option<BoxFuture<'static, Result<Asked, ShareError>>>,
    /// Those that were asked for.
    records: Option<Asked>,
    /// Given and not dealt with.
    outstanding: BTreeMap<Offset, Receipt>,
    /// Why it cannot take any, as was said last.
    trouble: Option<String>,
}

impl Taker {
    fn new(group: Group, kept: Option<Duration>, give: mpsc::UnboundedSender<Share>) -> Self {
        let (behind, outstanding) = (group.places.next_offset(), BTreeMap::new());
        Self { group, kept, give, behind, room: 0, asking: None, records: None, outstanding, trouble: None }
    }

    /// Runs until the member is gone; what it had goes to others then.
    async fn run(mut self, mut told: mpsc::UnboundedReceiver<Command>) {
        let mut keep = interval(KEEP_EVERY);
        keep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // It may be gone, and whoever asks for what is not there gets no answer.
        let mut is_open = false;
        let mut first_offset = 0;
        loop {
            if self.room > 0 && self.asking.is_none() && self.records.is_none() {
                // Retention may have removed what nobody has taken.
                let first_before = std::mem::replace(&mut first_offset, self.group.places.first_offset());
                is_open &= first_before == first_offset;
                let open = (!is_open).then_some((self.behind, self.kept));
                self.asking = Some(Box::pin(self.group.clone().ask(self.room, open)));
            }
            tokio::select! {
                command = told.recv() => match command {
                    Some(Command::Room(room)) => self.room = room,
                    Some(Command::Done(offset)) => {
                        if let Some(receipt) = self.outstanding.remove(&offset) {
                            receipt.done().await;
                        }
                    }
                    None => break,
                },
                asked = of(&mut self.asking), if self.asking.is_some() => {
                    self.asking = None;
                    is_open = asked.is_ok();
                    self.note(asked.as_ref().err());
                    if let Ok(Asked { skipped: skipped @ 1.., .. }) = asked {
                        let _ = self.give.send(Share::Skipped(skipped));
                    }
                    self.records = asked.ok();
                }
                given = next(&mut self.records), if self.records.is_some() => match given {
                    Some(given) => self.give(given).await,
                    None => if let Some(Asked { records, at, .. }) = self.records.take() {
                        is_open = records.are_all();
                        // It was refused: there are too many who wait, or there is no leader now.
                        if !is_open && at.elapsed() < PAUSE {
                            self.asking = Some(Box::pin(async { sleep(PAUSE).await; Err(ShareError::refused()) }));
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
        if let Some(asking) = self.asking {
            self.records = asking.await.ok();
            if let Some(Asked { skipped: skipped @ 1.., .. }) = self.records {
                warn!(
                    skipped,
                    "retention has removed records before a group read them, and its member has left"
                );
            }
        }
        let rest = match self.records {
            Some(Asked { records, .. }) => records.end().await,
            None => Vec::new(),
        };
        if !self.outstanding.is_empty() || !rest.is_empty() {
            sleep(OTHERS_LEAVE).await;
        }
        for receipt in self.outstanding.into_values().chain(rest) {
            receipt.pass_on().await;
        }
    }

    async fn give(&mut self, Given { batch, place, receipt }: Given) {
        if !self.group.matches(&batch.reader().read(place)) {
            receipt.done().await;
            return;
        }
        self.behind = self.behind.max(place.offset + 1);
        // A record that comes again, as nothing was heard of it for so long, is not given again.
        if self.outstanding.insert(place.offset, receipt).is_none() {
            self.room = self.room.saturating_sub(1);
            let _ = self.give.send(Share::Records(batch, vec![place]));
        }
    }

    fn note(&mut self, trouble: Option<&ShareError>) {
        let trouble = trouble.map(ToString::to_string);
        if let Some(trouble) = trouble.as_ref().filter(|_| self.trouble != trouble) {
            warn!(trouble, "a member of a group of subscribers gets no records; trying again");
        }
        self.trouble = trouble;
    }
}

async fn of<T>(asking: &mut Option<BoxFuture<'static, T>>) -> T {
    match asking {
        Some(asking) => asking.await,
        None => std::future::pending().await,
    }
}

async fn next(asked: &mut Option<Asked>) -> Option<Given> {
    asked.as_mut()?.records.next().await
}
