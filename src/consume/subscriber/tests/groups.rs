//! What the members of a group get of its records, each at its pace.

use std::task::Poll;

use super::*;
use crate::consume::subscriber::ShareMember;

/// How a member deals with its records.
#[derive(Clone, Copy)]
enum MemberPace {
    /// It acknowledges them as they are sent.
    AtOnce,
    /// It needs so long for each.
    Each(Duration),
    /// It does nothing with them.
    Hung,
}

/// A group of members on tasks of their own, and how many records each has taken.
struct PacedGroup {
    scene: Scene,
    groups: Arc<ShareGroups>,
    key: super::super::ShareGroupKey,
    taken: Vec<Arc<parking_lot::Mutex<Vec<Offset>>>>,
    members: Vec<tokio::task::JoinHandle<()>>,
}

impl PacedGroup {
    async fn of(paces: &[MemberPace]) -> Self {
        let scene = Scene::new();
        let groups =
            Arc::new(ShareGroups::local(scene.router.clone(), scene.log.clone(), scene.shares.clone()));
        let key = (id("a"), "workers".into(), "#".into());
        let of = GroupSession { uid: 1, expiry_s: 0 };
        groups.join(&key, of, None).await.expect("joined");
        let mut group = Self { scene, groups, key, taken: Vec::new(), members: Vec::new() };
        let started = Arc::new(tokio::sync::Semaphore::new(0));
        paces.iter().for_each(|pace| group.add(*pace, started.clone()));
        let all = u32::try_from(paces.len()).expect("few");
        started.acquire_many(all).await.expect("never closed").forget();
        group
    }

    fn add(&mut self, pace: MemberPace, started: Arc<tokio::sync::Semaphore>) {
        let of = GroupSession { uid: 1, expiry_s: 0 };
        let member = self.groups.member(&self.key, of).expect("the group is there");
        let taken = Arc::new(parking_lot::Mutex::new(Vec::new()));
        self.taken.push(taken.clone());
        self.members.push(tokio::spawn(async move {
            let mut member = member;
            let none_yet = poll_fn(|cx| Poll::Ready(member.poll_take(256, cx).is_pending()));
            assert!(none_yet.await, "nothing is published yet");
            started.add_permits(1);
            work(member, pace, taken).await;
        }));
    }

    fn counts(&self) -> Vec<usize> {
        self.taken.iter().map(|taken| taken.lock().len()).collect()
    }

    /// Waits until members have taken so many records.
    async fn until_taken(&self, records: usize, of: impl Fn(&[usize]) -> usize) -> Vec<usize> {
        let waiting = async {
            while of(&self.counts()) < records {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(SOON, waiting).await.unwrap_or_else(|_| panic!("{:?} of {records}", self.counts()));
        self.counts()
    }
}

/// A connection's task: takes records, and acknowledges each when its client has dealt with it.
async fn work(mut member: ShareMember, pace: MemberPace, all: Arc<parking_lot::Mutex<Vec<Offset>>>) {
    let mut queue = std::collections::VecDeque::new();
    let mut busy = std::pin::pin!(tokio::time::sleep(Duration::ZERO));
    loop {
        let done = {
            let taking = poll_fn(|cx| member.poll_take(256, cx));
            tokio::select! {
                () = &mut busy, if !queue.is_empty() && !matches!(pace, MemberPace::Hung) => None,
                taken = taking => Some(taken.expect("the log is whole")),
            }
        };
        match done {
            None => {
                queue.pop_front().into_iter().for_each(|offset| member.acknowledge(offset));
            }
            Some(ShareDelivery::Skipped(_)) => panic!("nothing is removed"),
            Some(ShareDelivery::Records(records)) => {
                for (_, place) in records {
                    match pace {
                        MemberPace::AtOnce => member.acknowledge(place.offset),
                        _ => queue.push_back(place.offset),
                    }
                    // Once it is counted, the member has none.
                    all.lock().push(place.offset);
                }
                if done_waiting(&queue, pace).is_none() {
                    continue;
                }
            }
        }
        if let Some(each) = done_waiting(&queue, pace)
            && busy.is_elapsed()
        {
            busy.as_mut().reset(tokio::time::Instant::now() + each);
        }
    }
}

/// How long the client needs for the first record of its queue.
fn done_waiting(queue: &std::collections::VecDeque<Offset>, pace: MemberPace) -> Option<Duration> {
    match pace {
        MemberPace::Each(each) if !queue.is_empty() => Some(each),
        _ => None,
    }
}

fn all(counts: &[usize]) -> usize {
    counts.iter().sum()
}

/// A burst went whole to one member.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_is_shared_evenly_whether_it_comes_in_one_commit_or_in_many() {
    for commits in [1, 10, 1000] {
        // On a busy machine a member may get no processor for a while: then it takes less, as it should.
        let mut tries = 0;
        loop {
            let mut group = PacedGroup::of(&[MemberPace::AtOnce; 4]).await;
            for _ in 0..commits {
                append_many(&group.scene, "a", "x", 1000 / commits).await;
            }
            let counts = group.until_taken(1000, all).await;
            let mut offsets: Vec<Offset> =
                group.taken.iter().flat_map(|taken| taken.lock().clone()).collect();
            offsets.sort_unstable();
            assert_eq!(offsets, (0..1000).collect::<Vec<_>>(), "each once");
            group.members.drain(..).for_each(|member| member.abort());
            if counts.iter().all(|count| (200..=300).contains(count)) {
                break;
            }
            tries += 1;
            assert!(tries < 10, "{counts:?} in {commits} commits");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_gets_as_many_as_it_deals_with_and_one_that_hangs_keeps_a_few() {
    let paces =
        [2, 20].map(|ms| MemberPace::Each(Duration::from_millis(ms))).into_iter().chain([MemberPace::Hung]);
    let group = PacedGroup::of(&paces.collect::<Vec<_>>()).await;
    append_many(&group.scene, "a", "x", 500).await;
    let counts = group.until_taken(500, all).await;
    let [fast, slow, hung] = counts[..] else { panic!("three") };
    assert!(hung <= 10, "{counts:?}");
    // A tenth, give or take what it has in hand.
    assert!((20..=90).contains(&slow) && fast > 350, "{counts:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_hung_member_has_goes_to_others_when_it_leaves() {
    let mut group = PacedGroup::of(&[MemberPace::Hung, MemberPace::AtOnce]).await;
    append_many(&group.scene, "a", "x", 100).await;
    let counts = group.until_taken(100, all).await;
    assert!((1..=10).contains(&counts[0]), "{counts:?}");
    group.members.remove(0).abort();
    let counts = group.until_taken(100, |counts| counts[1]).await;
    assert_eq!(counts[1], 100);
    append_many(&group.scene, "a", "x", 1).await;
    group.until_taken(101, |counts| counts[1]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn single_records_go_round() {
    let group = PacedGroup::of(&[MemberPace::AtOnce; 4]).await;
    for n in 1..=40 {
        append_many(&group.scene, "a", "x", 1).await;
        group.until_taken(n, all).await;
    }
    // On a busy machine a member may still be on its way back to the queue when it is its turn.
    let counts = group.counts();
    assert!(counts.iter().all(|count| (8..=12).contains(count)), "{counts:?}");
}
