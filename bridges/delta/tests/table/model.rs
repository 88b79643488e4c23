//! Random work on a table, killed between any two calls of the store, against a set of offsets.
//!
//! After each kill the table is opened again and must have exactly the rows before the work that was killed or those
//! after it; the cursor says which of both for an append. Every version that was ever seen can be read again. A run is
//! repeated by its seed: `HEADGATE_SEED=7 cargo test -p headgate-bridge-delta model`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use headgate_bridge_delta::object_store::ObjectStore;
use headgate_bridge_delta::object_store::memory::InMemory;
use headgate_bridge_delta::{
    AddFile, LakeError, LakeTable, RowTarget, SetBackOrder, TableAppend, TableSnapshot,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::common::{
    append_next, file, offsets, offsets_aside, offsets_in, open, partition, sorted, spec, value_column,
};
use crate::faults::StoppingStore;

/// Lives of a writer in one run: each ends with a kill.
const LIVES: usize = 40;
const SEEDS: u64 = 6;
const DATASOURCES: [&str; 2] = ["press-4", "boiler"];
const DAYS: [&str; 2] = ["2026-11-29", "2026-11-30"];

/// Whether old files and commits are deleted: then old versions cannot be read.
#[derive(Clone, Copy, PartialEq)]
enum OldVersions {
    Kept,
    Deleted,
}

/// What the table must have.
#[derive(Default)]
struct TableModel {
    rows: BTreeSet<i64>,
    /// Those that are aside.
    aside: BTreeSet<i64>,
    days: BTreeMap<i64, &'static str>,
    /// What was seen in each version.
    versions: BTreeMap<i64, BTreeSet<i64>>,
}

/// What a step does to the rows.
enum ModelStep {
    Append {
        rows: i64,
        day: &'static str,
    },
    /// Puts every `nth` row from an offset on aside, gives all others back, and forgets those that 17 divides.
    Surgery {
        from: i64,
        nth: i64,
    },
    /// Renames the datasource of the rows from an offset on.
    Rename {
        from: i64,
    },
    Retention {
        day: &'static str,
    },
    /// Goes back to an offset.
    SetBack {
        from: i64,
    },
    Upkeep,
}

impl TableModel {
    /// The rows after a step, in the table and aside.
    fn after(&self, step: &ModelStep, cursor: Option<i64>) -> (BTreeSet<i64>, BTreeSet<i64>) {
        let (mut rows, mut aside) = (self.rows.clone(), self.aside.clone());
        match *step {
            ModelStep::Append { rows: count, .. } => {
                let first = cursor.map_or(0, |c| c + 1);
                rows.extend(first..first + count);
            }
            ModelStep::Surgery { from, nth } => {
                rows.append(&mut aside);
                rows.retain(|o| o % 17 != 0);
                (aside, rows) = rows.into_iter().partition(|o| *o >= from && o % nth == 0);
            }
            ModelStep::Retention { day } => rows.retain(|o| self.days[o] != day),
            ModelStep::SetBack { from } => {
                rows.retain(|o| *o < from);
                aside.retain(|o| *o < from);
            }
            ModelStep::Rename { .. } | ModelStep::Upkeep => (),
        }
        (rows, aside)
    }
}

fn step(random: &mut StdRng, next: i64) -> ModelStep {
    match random.random_range(0..10) {
        0..5 => ModelStep::Append { rows: random.random_range(1..30), day: DAYS[random.random_range(0..2)] },
        5 => ModelStep::Surgery { from: random.random_range(0..next.max(1)), nth: random.random_range(2..9) },
        6 if random.random_bool(0.3) => ModelStep::Retention { day: DAYS[0] },
        7 if random.random_bool(0.5) => ModelStep::Rename { from: random.random_range(0..next.max(1)) },
        8 if random.random_bool(0.3) => {
            ModelStep::SetBack { from: next - random.random_range(0..next.max(1)) / 3 }
        }
        _ => ModelStep::Upkeep,
    }
}

async fn perform(
    table: &mut LakeTable,
    step: &ModelStep,
    random: &mut StdRng,
    old: OldVersions,
) -> Result<(), LakeError> {
    match *step {
        ModelStep::Append { rows, day } => append_next(table, &DATASOURCES, day, rows).await,
        ModelStep::Surgery { from, nth } => {
            let target = |partition: &_, offset: i64| match offset {
                o if o % 17 == 0 => RowTarget::Nowhere,
                o if o >= from && o % nth == 0 => RowTarget::Aside,
                _ => RowTarget::Table(BTreeMap::clone(partition)),
            };
            table
                .rewrite(|_| true, |partition, batch| Ok(sorted(batch, |o| target(partition, o))))
                .await
                .map(|_| ())
        }
        ModelStep::Rename { from } => {
            let rename = |partition: &BTreeMap<String, Option<String>>, offset: i64| match offset < from {
                true => RowTarget::Table(partition.clone()),
                false => RowTarget::Table(self::partition(
                    "press-4~1",
                    partition["day"].as_deref().expect("a day"),
                )),
            };
            let selects = |file: &AddFile| file.bounds("offset").is_none_or(|(_, max)| max >= from);
            // Rows aside stay there.
            let aside = offsets_aside(table).await?;
            table
                .rewrite(selects, |partition, batch| {
                    Ok(sorted(batch, |o| {
                        if aside.contains(&o) { RowTarget::Aside } else { rename(partition, o) }
                    }))
                })
                .await
                .map(|_| ())
        }
        ModelStep::Retention { day } => {
            table.drop_files(|file| file.partition("day") == Some(day)).await.map(|_| ())
        }
        ModelStep::SetBack { from } => {
            let epoch = table.mark("epoch").unwrap_or(0) + 1;
            let order =
                SetBackOrder { mark: ("epoch", epoch), from: Some(from), reset: &[], folder: "_set_aside" };
            let report = table.set_back(&order).await?;
            assert!(report.is_some(), "nobody else has done it");
            Ok(())
        }
        ModelStep::Upkeep => match random.random_range(0..4) {
            0 if old == OldVersions::Deleted => {
                table.vacuum(Duration::ZERO, Duration::ZERO).await.map(|_| ())
            }
            1 if old == OldVersions::Deleted => table.expire_log(Duration::ZERO).await.map(|_| ()),
            2 => table.checkpoint().await,
            _ => table.compact(3).await.map(|_| ()),
        },
    }
}

/// A life: steps until the store stops. What the last step was, and where the cursor was before it.
async fn live(
    store: Arc<dyn ObjectStore>,
    random: &mut StdRng,
    model: &mut TableModel,
    old: OldVersions,
) -> Option<(ModelStep, Option<i64>)> {
    let mut table = LakeTable::open(store, spec()).await.ok()?;
    loop {
        let cursor = table.cursor();
        let step = step(random, cursor.map_or(0, |c| c + 1));
        if let ModelStep::Append { rows, day } = step {
            let first = cursor.map_or(0, |c| c + 1);
            model.days.extend((first..first + rows).map(|o| (o, day)));
        }
        if perform(&mut table, &step, random, old).await.is_err() {
            return Some((step, cursor));
        }
        (model.rows, model.aside) = model.after(&step, cursor);
        model.versions.insert(table.snapshot().version(), model.rows.clone());
    }
}

async fn run(seed: u64, old: OldVersions) {
    let mut random = StdRng::seed_from_u64(seed);
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let mut model = TableModel::default();
    for life in 0..LIVES {
        let last_call = random.random_range(0..60);
        let stopping = StoppingStore::new(store.clone(), last_call, random.random_bool(0.5));
        let killed = live(stopping, &mut random, &mut model, old).await;
        let table = open(&store).await;
        let found = offsets(&table, table.snapshot()).await.expect("readable");
        let aside = offsets_aside(&table).await.expect("readable");
        if let Some((step, cursor)) = killed {
            let after = model.after(&step, cursor);
            let is_append = matches!(step, ModelStep::Append { .. });
            let is_done =
                if is_append { table.cursor() != cursor } else { (&found, &aside) == (&after.0, &after.1) };
            if is_done {
                (model.rows, model.aside) = after;
            }
        }
        assert_eq!(found, model.rows, "seed {seed}, life {life}");
        assert_eq!(aside, model.aside, "seed {seed}, life {life}");
        model.versions.insert(table.snapshot().version(), found);
    }
    let table = open(&store).await;
    assert!(table.snapshot().version() > 50, "seed {seed}: little was done");
    if old == OldVersions::Kept {
        for (version, rows) in &model.versions {
            let snapshot = TableSnapshot::read(&*store, *version).await.expect("readable").expect("there");
            assert_eq!(snapshot.version(), *version);
            assert_eq!(
                &offsets(&table, &snapshot).await.expect("readable"),
                rows,
                "seed {seed}, version {version}"
            );
        }
    }
}

fn seeds() -> Vec<u64> {
    match std::env::var("HEADGATE_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => vec![seed],
        None => (0..SEEDS).collect(),
    }
}

#[tokio::test]
async fn each_row_is_there_once_whatever_is_killed_and_every_version_can_be_read() {
    for seed in seeds() {
        run(seed, OldVersions::Kept).await;
    }
}

#[tokio::test]
async fn each_row_is_there_once_while_old_files_and_commits_are_deleted() {
    for seed in seeds() {
        run(seed, OldVersions::Deleted).await;
    }
}

/// Two gateways that believe to be the only one: what one has stored the other does not store again.
#[tokio::test]
async fn two_writers_of_one_cursor_store_each_row_once() {
    let mut random = StdRng::seed_from_u64(1);
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let mut writers = [open(&store).await, open(&store).await];
    let mut superseded = 0;
    for _ in 0..200 {
        let writer = &mut writers[random.random_range(0..2)];
        if random.random_bool(0.2) {
            writer.compact(2).await.expect("merged");
            continue;
        }
        let rows = random.random_range(1..20);
        match append_next(writer, &DATASOURCES, DAYS[0], rows).await {
            Ok(()) => (),
            Err(LakeError::Superseded { .. }) => superseded += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert!(superseded > 10, "the writers did not meet");
    let table = open(&store).await;
    let cursor = table.cursor().expect("rows");
    let found = offsets(&table, table.snapshot()).await.expect("readable");
    assert_eq!(found, (0..=cursor).collect());
}

/// Surgery that meets appends of another writer misses none of their rows.
#[tokio::test]
async fn surgery_reaches_rows_that_are_appended_meanwhile() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let (mut surgeon, mut writer) = (open(&store).await, open(&store).await);
    append_next(&mut writer, &DATASOURCES, DAYS[0], 20).await.expect("appended");
    surgeon
        .rewrite(
            |_| true,
            |partition, batch| {
                // The edit runs between the look at the table and the commit.
                if writer.cursor() == Some(19) {
                    futures_util::FutureExt::now_or_never(append_next(
                        &mut writer,
                        &DATASOURCES,
                        DAYS[0],
                        20,
                    ))
                    .expect("memory does not wait")?;
                }
                Ok(sorted(batch, |o| {
                    if o % 2 == 0 { RowTarget::Table(partition.clone()) } else { RowTarget::Nowhere }
                }))
            },
        )
        .await
        .expect("rewritten");
    let table = open(&store).await;
    let found = offsets(&table, table.snapshot()).await.expect("readable");
    assert_eq!(found, (0..40).filter(|o| o % 2 == 0).collect());
}

/// A writer that does not know the newest rules yet is too late, although no row had to move.
#[tokio::test]
async fn rows_that_follow_older_rules_are_not_appended() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let (mut surgeon, mut writer) = (open(&store).await, open(&store).await);
    surgeon
        .rewrite_with_mark(
            Some(("rules", 1)),
            &[],
            |_| true,
            |_, batch| Ok(sorted(batch, |_| RowTarget::Nowhere)),
        )
        .await
        .expect("rewritten");
    let following = |version: i64| TableAppend {
        through: 9,
        columns: vec![value_column("press-4")],
        files: vec![file("press-4", DAYS[0], 0..10)],
        marks: vec![("rules".to_owned(), version)],
        ..TableAppend::default()
    };
    assert!(matches!(writer.append(&following(0)).await, Err(LakeError::Superseded { cursor: None })));
    writer.append(&following(1)).await.expect("appended");
    let table = open(&store).await;
    assert_eq!((table.mark("rules"), table.cursor()), (Some(1), Some(9)));
}

/// What the table goes back behind is beside it, by name, and no writer that knows an earlier epoch brings it in again.
#[tokio::test]
async fn rows_that_a_table_goes_back_behind_are_kept_beside_it() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let (mut table, mut late) = (open(&store).await, open(&store).await);
    append_next(&mut table, &DATASOURCES, DAYS[0], 20).await.expect("appended");
    let odd_is_aside = |partition: &BTreeMap<String, Option<String>>, offset: i64| match offset % 2 {
        1 => RowTarget::Aside,
        _ => RowTarget::Table(partition.clone()),
    };
    table
        .rewrite(|_| true, |partition, batch| Ok(sorted(batch, |o| odd_is_aside(partition, o))))
        .await
        .expect("rewritten");
    late.refresh().await.expect("read");
    let order = SetBackOrder { mark: ("epoch", 7), from: Some(12), reset: &[], folder: "_set_aside_7" };
    let report = table.set_back(&order).await.expect("set back").expect("it was not done before");
    assert_eq!(report.rows, 8);
    assert_eq!(table.set_back(&order).await.expect("read"), None);
    assert_eq!(late.set_back(&order).await.expect("read"), None, "another gateway comes later");
    table.vacuum(Duration::ZERO, Duration::ZERO).await.expect("vacuumed");
    assert_eq!((table.cursor(), table.mark("epoch")), (Some(11), Some(7)));
    let rows = offsets(&table, table.snapshot()).await.expect("readable");
    assert_eq!(rows, (0..12).filter(|o| o % 2 == 0).collect());
    assert_eq!(offsets_aside(&table).await.expect("readable"), (0..12).filter(|o| o % 2 == 1).collect());
    assert_eq!(offsets_in(&store, "_set_aside_7").await, (12..20).collect());

    // Of an earlier epoch, and at the place of what comes now.
    let stale = TableAppend {
        previous: Some(11),
        through: 19,
        columns: vec![value_column("press-4")],
        files: vec![file("press-4", DAYS[0], 12..20)],
        marks: vec![("epoch".to_owned(), 0)],
        ..TableAppend::default()
    };
    assert!(matches!(late.append(&stale).await, Err(LakeError::Superseded { cursor: Some(11) })));
    append_next(&mut table, &DATASOURCES, DAYS[1], 3).await.expect("appended");
    assert_eq!(table.cursor(), Some(14));

    // What has come since is not of what it has gone back behind.
    let before = all_paths(&store).await;
    assert_eq!(late.set_back(&order).await.expect("read"), None, "another gateway comes later still");
    assert_eq!(all_paths(&store).await, before, "nothing is written for nothing");
}

/// Marks go back with the rows, in one commit, so that rules are followed anew; and what depends on an earlier epoch is too
/// late to move them on again.
#[tokio::test]
async fn marks_go_back_together_with_rows() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let (mut table, mut late) = (open(&store).await, open(&store).await);
    append_next(&mut table, &DATASOURCES, DAYS[0], 20).await.expect("appended");
    table.set_mark("rules", 5, &[]).await.expect("set");
    late.refresh().await.expect("read");
    let order = |epoch, from| SetBackOrder {
        mark: ("epoch", epoch),
        from,
        reset: &["rules", "never"],
        folder: "_set_aside_7",
    };
    let marks = |table: &LakeTable| ["epoch", "rules", "never"].map(|name| table.mark(name));
    table.set_back(&order(6, None)).await.expect("set back").expect("it was not done before");
    assert_eq!(marks(&table), [Some(6), Some(5), None], "no row has to leave");
    let version = table.snapshot().version();
    table.set_back(&order(7, Some(12))).await.expect("set back").expect("it was not done before");
    assert_eq!(marks(&table), [Some(7), Some(0), None]);
    assert_eq!(table.snapshot().version(), version + 1, "one commit");

    let follow = async |table: &mut LakeTable, epoch| {
        let nowhere =
            |_: &BTreeMap<String, Option<String>>, batch: &_| Ok(sorted(batch, |_| RowTarget::Nowhere));
        table.rewrite_with_mark(Some(("rules", 6)), &[("epoch", epoch)], |_| true, nowhere).await
    };
    assert!(matches!(follow(&mut late, 6).await, Err(LakeError::Superseded { cursor: Some(11) })));
    assert!(matches!(late.set_mark("rules", 6, &[("epoch", 6)]).await, Err(LakeError::Superseded { .. })));
    assert_eq!(marks(&late), [Some(7), Some(0), None]);
    follow(&mut late, 7).await.expect("rewritten");
    assert_eq!(marks(&late), [Some(7), Some(6), None]);
}

/// Whatever is in the store.
async fn all_paths(store: &Arc<dyn ObjectStore>) -> BTreeSet<String> {
    use futures_util::TryStreamExt;
    let all: Vec<_> = store.list(None).try_collect().await.expect("listed");
    all.into_iter().map(|object| object.location.to_string()).collect()
}
