//! The budget: shares, the reserve, waiting.

use std::sync::Arc;

use super::*;

const MIB: usize = 1 << 20;

fn account(budget: &MemoryBudget, key: u8, datasource: &str) -> Arc<MemoryAccount> {
    budget.account_of_key(KeyId([key; 6]), &DatasourceId::new(datasource).expect("slug"))
}

#[test]
fn a_share_holds_for_a_key_and_for_its_datasource_at_one_below_and_one_above() {
    let budget = MemoryBudget::new(100 * MIB, 10 * MIB);
    let first = account(&budget, 1, "press-4");
    let charge = first.charge(10 * MIB).expect("the whole share");
    assert_eq!(charge.bytes(), 10 * MIB);
    let refused = first.charge(1).err().expect("one byte over");
    assert_eq!(refused.owner, Some(MemoryOwner::Key(KeyId([1; 6]))));
    assert!(!refused.is_too_large && first.is_over());
    // Another key of the datasource has a share of its own, and no more than the datasource has.
    let second = account(&budget, 2, "press-4");
    let refused = second.charge(1).err().expect("the datasource's share is used up");
    assert_eq!(refused.owner, Some(MemoryOwner::Datasource(DatasourceId::new("press-4").expect("slug"))));
    let other = account(&budget, 3, "press-5").charge(10 * MIB).expect("another tenant");
    assert_eq!(budget.held_bytes(), 20 * MIB);
    drop((charge, other));
    assert_eq!(budget.held_bytes(), 0);
    assert!(second.charge(10 * MIB).is_ok() && !first.is_over());
    assert!(second.charge(10 * MIB + 1).err().expect("larger than a share").is_too_large);
}

#[test]
fn what_is_to_be_sent_leaves_half_of_a_share_to_what_comes_in() {
    let budget = MemoryBudget::new(100 * MIB, 10 * MIB);
    let account = account(&budget, 1, "press-4");
    let mut sent = account.charge_to_send(4 * MIB).expect("fits");
    sent.grow_to_send(MIB).expect("half of the share");
    assert!(sent.grow_to_send(1).is_err() && account.charge_to_send(1).is_err());
    assert!(account.is_over_to_send() && !account.is_over());
    assert!(account.charge(5 * MIB).is_ok(), "the other half");
}

#[test]
fn what_a_refused_charge_has_taken_is_given_back() {
    let budget = MemoryBudget::new(100 * MIB, 10 * MIB);
    let (first, second) = (account(&budget, 1, "press-4"), account(&budget, 2, "press-4"));
    let held = first.charge(6 * MIB).expect("fits");
    let mut other = second.charge(3 * MIB).expect("fits");
    assert!(other.grow(2 * MIB).is_err(), "the datasource has 10 MiB");
    assert_eq!((other.bytes(), budget.held_bytes()), (3 * MIB, 9 * MIB));
    other.grow(MIB).expect("fits exactly");
    other.resize(0).expect("fewer bytes");
    drop(held);
    assert_eq!(budget.held_bytes(), 0);
}

#[test]
fn who_holds_little_goes_on_when_others_have_used_up_the_whole() {
    let budget = MemoryBudget::new(20 * MIB, 10 * MIB);
    let heavy: Vec<_> = (1..3).map(|n| account(&budget, n, &format!("d{n}"))).collect();
    let held: Vec<_> = heavy.iter().map(|account| account.charge(10 * MIB).expect("a share")).collect();
    let light = account(&budget, 9, "press-4");
    assert!(!light.is_over());
    let charge = light.charge(MEMORY_LIGHT_BYTES_MAX).expect("from the reserve");
    assert_eq!(light.charge(1).err().expect("no longer light").owner, None);
    drop((held, charge));
    assert_eq!(budget.held_bytes(), 0);
}

#[test]
fn strangers_of_one_address_and_all_strangers_have_a_share() {
    let budget = MemoryBudget::new(1 << 30, 1 << 29);
    let stranger = |n: u8| budget.account_of_stranger(IpAddr::from([203, 0, 113, n]));
    let first = stranger(1).charge(MEMORY_BYTES_PER_ADDRESS_MAX).expect("an address' share");
    assert!(stranger(1).charge(1).is_err());
    let others = MEMORY_STRANGERS_BYTES_MAX / MEMORY_BYTES_PER_ADDRESS_MAX;
    let more: Vec<_> = (2..=u8::try_from(others).expect("few"))
        .map(|n| stranger(n).charge(MEMORY_BYTES_PER_ADDRESS_MAX).expect("fits"))
        .collect();
    assert_eq!(stranger(200).charge(1).err().expect("all strangers").owner, Some(MemoryOwner::Strangers));
    assert!(account(&budget, 1, "press-4").charge(1).is_ok());
    drop((first, more));
    assert_eq!(budget.held_bytes(), 0);
}

#[tokio::test]
async fn everybody_who_waits_goes_on_when_there_is_room() {
    let budget = MemoryBudget::new(100 * MIB, 10 * MIB);
    let account = account(&budget, 1, "press-4");
    let held = account.charge_held(12 * MIB);
    let waiting: Vec<_> = (0..50)
        .map(|_| {
            let account = account.clone();
            tokio::spawn(async move { account.wait_room().await })
        })
        .collect();
    tokio::task::yield_now().await;
    assert!(waiting.iter().all(|waiting| !waiting.is_finished()));
    drop(held);
    for waiting in waiting {
        waiting.await.expect("goes on");
    }
}

/// The first in line needed more than was freed, and kept it from the second.
#[tokio::test]
async fn who_cannot_use_what_is_freed_leaves_it_to_the_next_in_line() {
    let budget = MemoryBudget::new(100 * MIB, 10 * MIB);
    let account = account(&budget, 1, "press-4");
    let (large, small) = (account.charge_held(6 * MIB), account.charge_held(4 * MIB));
    let wait_for = |bytes| {
        let account = account.clone();
        tokio::spawn(async move { account.wait_for(bytes).await })
    };
    let waiting = [8 * MIB, 9 * MIB, 3 * MIB, 1].map(wait_for);
    tokio::task::yield_now().await;
    drop(small);
    let [first, second, third, fourth] = waiting;
    let in_time = |task| tokio::time::timeout(std::time::Duration::from_secs(20), task);
    let third = in_time(third).await.expect("there is room for it").expect("no panic");
    let fourth = in_time(fourth).await.expect("and for the one behind it").expect("no panic");
    assert!(!first.is_finished() && !second.is_finished());
    drop((large, third, fourth));
    drop(in_time(first).await.expect("there is room").expect("no panic"));
    drop(in_time(second).await.expect("there is room").expect("no panic"));
    assert_eq!(budget.held_bytes(), 0);
}

/// Waits for `bytes`, and counts how often it is woken.
async fn wait_counted(account: Arc<MemoryAccount>, bytes: usize, polls: Arc<AtomicUsize>) -> MemoryCharge {
    let mut waiting = std::pin::pin!(account.wait_for(bytes));
    let polled = std::future::poll_fn(|cx| {
        polls.fetch_add(1, Ordering::Relaxed);
        waiting.as_mut().poll(cx)
    });
    polled.await
}

/// Each release, and each one that went on, woke all others of them, in vain.
#[tokio::test]
async fn those_who_wait_for_the_same_are_woken_once_each() {
    const COUNT: usize = 1000;
    let budget = MemoryBudget::new(100 * MIB, 10 * MIB);
    let account = account(&budget, 1, "press-4");
    let held: Vec<_> = (0..10).map(|_| account.charge(MIB).expect("fits")).collect();
    let polls = Arc::new(AtomicUsize::new(0));
    let waiting: Vec<_> = (0..COUNT)
        .map(|_| tokio::spawn(wait_counted(account.clone(), MIB, polls.clone())))
        .map(|waiting| tokio::spawn(async move { drop(waiting.await.expect("no panic")) }))
        .collect();
    while polls.load(Ordering::Relaxed) < COUNT {
        tokio::task::yield_now().await;
    }
    drop(held);
    let all = async {
        for waiting in waiting {
            waiting.await.expect("goes on");
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), all).await.expect("there is room for all");
    let woken = polls.load(Ordering::Relaxed) - COUNT;
    assert!(woken <= 4 * COUNT, "{woken} times for {COUNT}");
    assert_eq!(budget.held_bytes(), 0);
}

/// What it had taken of one share, and gave back because of the other, was told like something that is freed.
#[tokio::test]
async fn a_refused_charge_wakes_nobody_for_whom_there_is_no_room() {
    let budget = MemoryBudget::new(100 * MIB, 10 * MIB);
    let (first, other) = (account(&budget, 1, "press-4"), account(&budget, 2, "press-4"));
    let (held, held_too) = (first.charge(4 * MIB).expect("fits"), other.charge(6 * MIB).expect("fits"));
    let polls = Arc::new(AtomicUsize::new(0));
    let wait = |_| {
        let waiting = wait_counted(first.clone(), 7 * MIB, polls.clone());
        tokio::spawn(async move { drop(waiting.await) })
    };
    let waiting: Vec<_> = (0..10).map(wait).collect();
    tokio::task::yield_now().await;
    for _ in 0..100 {
        assert!(first.charge(MIB).is_err(), "the datasource's share is used up");
        tokio::task::yield_now().await;
    }
    assert_eq!(polls.load(Ordering::Relaxed), 10, "once each, when it came");
    drop((held, held_too));
    for waiting in waiting {
        waiting.await.expect("no panic");
    }
}

#[test]
fn owners_without_an_account_are_forgotten() {
    let budget = MemoryBudget::new(100 * MIB, 10 * MIB);
    for n in 0..10_000_u32 {
        let [_, a, b, c] = n.to_be_bytes();
        drop(budget.account_of_stranger(IpAddr::from([10, a, b, c])));
    }
    assert!(budget.0.owners.lock().uses.len() <= 128);
}
