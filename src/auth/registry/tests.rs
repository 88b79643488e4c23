//! Tests of the registry's public interface: the effect of a change when it returns and after a restart.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::json;
use tempfile::TempDir;

use super::audit::{AuditEntry, AuditEvent, AuditQuery};
use super::transfer::NewImport;
use super::*;
use crate::auth::connections::{CloseReason, ConnectionControl};
use crate::auth::{
    Actor, ApiKey, Datasource, Grant, LeakRow, LeakedKeyFate, Registry, RegistryError, Scope, Scopes,
};
use crate::limits::{DATASOURCE_ID_BYTES_MAX, NAME_BYTES_MAX};
use crate::message::{DatasourceId, TimeMicros, now_micros};

fn empty() -> (TempDir, Registry) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let registry = Registry::open(dir.path()).expect("opens");
    (dir, registry)
}

fn reopened(dir: &TempDir, registry: Registry) -> Registry {
    drop(registry);
    Registry::open(dir.path()).expect("opens again")
}

fn ingest() -> Scopes {
    Scopes::from_slice(&[Scope::Ingest])
}

fn slug(id: &str) -> DatasourceId {
    DatasourceId::new(id).expect("a slug")
}

/// The attributes of a datasource, for comparison.
fn told(datasource: impl AsRef<Datasource>) -> (String, String, TimeMicros) {
    let datasource = datasource.as_ref();
    (datasource.id.to_string(), datasource.name.to_string(), datasource.created_at)
}

fn audited(registry: &Registry) -> Vec<AuditEntry> {
    registry.audit_entries(&AuditQuery { from: None, to: None, after: 0, limit: 1_000 }).expect("readable")
}

/// Makes every change fail as a full or broken disk would.
fn break_disk(registry: &Registry, broken: bool) {
    registry.lock_database().refuse_changes(broken);
}

#[test]
fn a_new_registry_holds_nothing() {
    let (_dir, registry) = empty();
    assert_eq!(registry.key_count(), 0);
    assert!(registry.datasources().is_empty());
    assert!(registry.find(&ApiKey::generate().digest()).is_none());
}

#[test]
fn what_was_created_is_there_after_a_restart() {
    let (dir, registry) = empty();
    let (press, first, first_secret) =
        registry.create_datasource(&Actor::SYSTEM, None, " Press 4 ", ingest()).expect("created");
    assert_eq!((press.id.as_str(), &*press.name), ("press-4", "Press 4"));
    let both = Scopes::from_slice(&[Scope::Subscribe, Scope::Ingest]);
    let far = now_micros() + 1_000_000_000;
    let (second, second_secret) =
        registry.create_key(&Actor::SYSTEM, &press.id, "line 2", both, Some(far)).expect("created");
    let (admin, admin_secret) = registry
        .create_key(&Actor::SYSTEM, &DatasourceId::all(), "admin", Scopes::from_slice(&[Scope::Admin]), None)
        .expect("created");

    let registry = reopened(&dir, registry);
    let stored: Vec<_> = registry.datasources().iter().map(told).collect();
    assert_eq!(stored, [told(&press)]);
    assert_eq!(registry.datasource("press-4").map(|datasource| told(&datasource)), Some(told(&press)));
    assert_eq!(registry.key_count(), 3);
    for (secret, was) in [(first_secret, first), (second_secret, second), (admin_secret, admin)] {
        let key = registry.find(&secret.digest()).expect("kept");
        assert_eq!((key.id, &key.datasource, key.scopes), (was.id, &was.datasource, was.scopes));
        assert_eq!((&key.label, key.created_at), (&was.label, was.created_at));
        assert_eq!(key.expires_at(), was.expires_at());
        assert!(key.holds());
    }
    let labels: Vec<_> = registry.keys(&press.id).iter().map(|key| key.label.clone()).collect();
    assert_eq!(labels, ["".into(), Box::from("line 2")]);
    assert_eq!(registry.keys(&DatasourceId::all()).len(), 1);
}

#[test]
fn what_ends_with_a_change_whose_key_has_died_is_not_replaced_and_takes_nothing_along() {
    let (_dir, registry) = empty();
    let (all, admin) = (DatasourceId::all(), Scopes::from_slice(&[Scope::Admin]));
    let create = || registry.create_key(&Actor::SYSTEM, &all, "", admin, None).expect("created").0;
    let (leaked, other, _stays) = (create(), create(), create());
    let (press, key, _) =
        registry.create_datasource(&Actor::SYSTEM, None, "Press 4", ingest()).expect("created");
    let actor = &Actor::of_grant(&Grant::new(leaked.clone()), None);
    let (keys, before) = (registry.keys(&all).len(), audited(&registry).len());
    thread::scope(|scope| {
        let locked = registry.lock_database();
        let rotating = scope.spawn(|| registry.rotate_key(actor, &all, other.id, Duration::ZERO));
        let deleting = scope.spawn(|| registry.delete_datasource(actor, &press.id));
        // Both have ended what goes at once, and wait.
        while other.holds() || key.holds() {
            thread::yield_now();
        }
        let revoking = scope.spawn(|| registry.revoke_key(&Actor::SYSTEM, &all, leaked.id));
        while leaked.holds() {
            thread::yield_now();
        }
        drop(locked);
        assert!(revoking.join().expect("no panic").expect("revoked").is_some());
        let rotated = rotating.join().expect("no panic");
        assert!(matches!(rotated, Err(RegistryError::Denied(_))), "{rotated:?}");
        let deleted = deleting.join().expect("no panic");
        assert!(matches!(deleted, Err(RegistryError::Denied(_))), "{deleted:?}");
    });
    assert!(!other.holds() && !key.holds() && registry.has_datasource("press-4"));
    assert_eq!(registry.keys(&all).len(), keys - 2, "no key is new");
    let entries = audited(&registry);
    let actions: Vec<_> = entries[before..].iter().map(|entry| &*entry.action).collect();
    assert_eq!(actions, ["key.revoked"; 3]);
}

#[test]
fn a_change_that_has_waited_until_its_key_was_dead_is_not_made() {
    let (_dir, registry) = empty();
    let (all, admin) = (DatasourceId::all(), Scopes::from_slice(&[Scope::Admin]));
    let create = || registry.create_key(&Actor::SYSTEM, &all, "", admin, None).expect("created").0;
    let (leaked, other, _stays) = (create(), create(), create());
    let (gone, ..) = registry.create_datasource(&Actor::SYSTEM, None, "Oven", ingest()).expect("created");
    registry.delete_datasource(&Actor::SYSTEM, &gone.id).expect("deleted");
    let (press, key, _) =
        registry.create_datasource(&Actor::SYSTEM, None, "Press 4", ingest()).expect("created");
    let actor = &Actor::of_grant(&Grant::new(leaked.clone()), None);
    let (what, at) = (json!({}), now_micros());
    let row = LeakRow { datasource: press.id.clone(), key_id: key.id, since: Some(at), below: Some(1), at };
    let import = NewImport {
        id: slug("mill"),
        may_rename: false,
        name: "Mill",
        limits: None,
        schemas: None,
        event_time: None,
        keys: &[],
        is_rehearsal: false,
    };
    let act = AuditEvent { action: "client.disconnected", datasource: None, key_id: None, what: &what };
    let grace = Duration::from_secs(60);
    let changes: [&(dyn Fn() -> Result<(), RegistryError> + Sync); 11] = [
        &|| registry.create_key(actor, &all, "", admin, None).map(drop),
        &|| registry.create_datasource(actor, None, "Lathe", ingest()).map(drop),
        &|| registry.import(actor, &import).map(drop),
        &|| registry.set_key_limits(actor, &press.id, key.id, None).map(drop),
        &|| registry.set_datasource_limits(actor, &press.id, None),
        &|| registry.set_datasource_schemas(actor, &press.id, None),
        &|| registry.set_datasource_event_time(actor, &press.id, None),
        &|| registry.rotate_key(actor, &press.id, key.id, grace).map(drop),
        &|| registry.purge_incarnation(actor, &gone.id, 1).map(drop),
        &|| registry.add_leak_rule(actor, &row, 10).map(drop),
        &|| registry.audit(actor, &act),
    ];
    let before = audited(&registry).len();
    let made: Vec<_> = thread::scope(|scope| {
        let locked = registry.lock_database();
        let waiting: Vec<_> = changes.iter().map(|change| scope.spawn(change)).collect();
        thread::sleep(Duration::from_millis(100));
        let revoking = scope.spawn(|| registry.revoke_key(&Actor::SYSTEM, &all, leaked.id));
        while leaked.holds() {
            thread::yield_now();
        }
        drop(locked);
        assert!(revoking.join().expect("no panic").expect("revoked").is_some());
        waiting.into_iter().map(|change| change.join().expect("no panic")).collect()
    });
    assert!(made.iter().all(|made| matches!(made, Err(RegistryError::Denied(_)))), "{made:?}");
    for ended in [
        registry.revoke_key(actor, &all, other.id).map(drop),
        registry.delete_datasource(actor, &press.id).map(drop),
        registry.rotate_key(actor, &all, other.id, Duration::ZERO).map(drop),
    ] {
        assert!(matches!(ended, Err(RegistryError::Denied(_))), "{ended:?}");
    }
    assert!(other.holds() && key.holds() && registry.has_datasource("press-4"));
    let entries = audited(&registry);
    let actions: Vec<_> = entries[before..].iter().map(|entry| &*entry.action).collect();
    assert_eq!(actions, ["key.revoked"]);

    // A key that ends itself with a change sees that made.
    let own = Actor::of_grant(&Grant::new(other.clone()), None);
    let rotated = registry.rotate_key(&own, &all, other.id, Duration::ZERO).expect("rotated").expect("there");
    assert!(!other.holds());
    let own = Actor::of_grant(&Grant::new(rotated.key.clone()), None);
    assert!(registry.revoke_key(&own, &all, rotated.key.id).expect("revoked").is_some());
    assert_eq!(audited(&registry).len(), before + 3);
}

#[test]
fn a_deleted_datasource_takes_its_keys_with_it_at_once_and_for_good() {
    let (dir, registry) = empty();
    let (a, key, secret) = registry.create_datasource(&Actor::SYSTEM, None, "a", ingest()).expect("created");
    let (b, _, b_secret) = registry.create_datasource(&Actor::SYSTEM, None, "b", ingest()).expect("created");
    let (second, second_secret) =
        registry.create_key(&Actor::SYSTEM, &a.id, "", ingest(), None).expect("created");
    let control = Arc::new(ConnectionControl::default());
    let _entered = key.connections().enter(Arc::clone(&control));

    let dead = registry.delete_datasource(&Actor::SYSTEM, &a.id).expect("deleted");
    assert!(!key.holds() && !second.holds());
    assert_eq!(control.closed(), Some(CloseReason::KeyDead));
    let mut dead: Vec<_> = dead.iter().map(|key| key.id).collect();
    let mut expected = [key.id, second.id];
    dead.sort_unstable();
    expected.sort_unstable();
    assert_eq!(dead, expected);

    let check = |registry: &Registry| {
        for secret in [&secret, &second_secret] {
            assert!(registry.find(&secret.digest()).is_none());
            assert!(registry.was_revoked(&secret.digest()));
        }
        assert!(!registry.has_datasource("a") && registry.datasource("a").is_none());
        assert!(registry.keys(&a.id).is_empty());
        assert_eq!(registry.datasources().iter().map(told).collect::<Vec<_>>(), [told(&b)]);
        assert!(registry.find(&b_secret.digest()).is_some_and(|key| key.holds()));
        assert_eq!(registry.key_count(), 1);
        let error = registry.delete_datasource(&Actor::SYSTEM, &a.id).expect_err("deleted already");
        assert!(matches!(error, RegistryError::NoDatasource(_)), "{error}");
    };
    check(&registry);
    let registry = reopened(&dir, registry);
    check(&registry);

    let (again, ..) =
        registry.create_datasource(&Actor::SYSTEM, Some(a.id.clone()), "a", ingest()).expect("free");
    assert_eq!(registry.keys(&again.id).len(), 1, "the old keys stay dead");
    assert!(registry.was_revoked(&secret.digest()));
}

#[test]
fn a_revoked_key_is_dead_at_once_and_for_good_and_its_sisters_live() {
    let (dir, registry) = empty();
    let (a, first, secret) =
        registry.create_datasource(&Actor::SYSTEM, None, "a", ingest()).expect("created");
    let (b, ..) = registry.create_datasource(&Actor::SYSTEM, None, "b", ingest()).expect("created");
    let (sister, sister_secret) =
        registry.create_key(&Actor::SYSTEM, &a.id, "", ingest(), None).expect("created");
    let control = Arc::new(ConnectionControl::default());
    let _entered = first.connections().enter(Arc::clone(&control));

    assert!(registry.revoke_key(&Actor::SYSTEM, &b.id, first.id).expect("asked").is_none(), "not b's key");
    assert!(first.holds() && control.closed().is_none());
    let error = registry.revoke_key(&Actor::SYSTEM, &slug("c"), first.id).expect_err("no c");
    assert!(matches!(error, RegistryError::NoDatasource(_)), "{error}");

    let dead = registry.revoke_key(&Actor::SYSTEM, &a.id, first.id).expect("revoked").expect("was live");
    assert_eq!(dead.id, first.id);
    assert!(!first.holds());
    assert_eq!(control.closed(), Some(CloseReason::KeyDead));
    assert!(registry.revoke_key(&Actor::SYSTEM, &a.id, first.id).expect("asked").is_none(), "once");

    let registry = reopened(&dir, registry);
    assert!(registry.find(&secret.digest()).is_none() && registry.was_revoked(&secret.digest()));
    assert!(registry.find(&sister_secret.digest()).is_some());
    assert_eq!(registry.keys(&a.id).iter().map(|key| key.id).collect::<Vec<_>>(), [sister.id]);
}

#[test]
fn a_key_for_all_can_be_revoked_too() {
    let (_dir, registry) = empty();
    let (key, secret) =
        registry.create_key(&Actor::SYSTEM, &DatasourceId::all(), "", ingest(), None).expect("created");
    registry.revoke_key(&Actor::SYSTEM, &DatasourceId::all(), key.id).expect("revoked").expect("was live");
    assert!(registry.was_revoked(&secret.digest()));
    assert_eq!(registry.key_count(), 0);
}

#[test]
fn what_a_call_returned_is_on_disk_without_a_clean_end() {
    let (dir, registry) = empty();
    // The files as a kill at this moment would leave them.
    let as_left = || {
        let left = tempfile::tempdir().expect("temporary directory");
        for file in std::fs::read_dir(dir.path()).expect("readable") {
            let file = file.expect("entry");
            std::fs::copy(file.path(), left.path().join(file.file_name())).expect("copied");
        }
        let registry = Registry::open(left.path()).expect("opens");
        (left, registry)
    };
    let (a, _, secret) = registry.create_datasource(&Actor::SYSTEM, None, "a", ingest()).expect("created");
    assert!(as_left().1.find(&secret.digest()).is_some());
    registry.delete_datasource(&Actor::SYSTEM, &a.id).expect("deleted");
    let (_left, after) = as_left();
    assert!(after.find(&secret.digest()).is_none() && after.was_revoked(&secret.digest()));
    assert!(after.datasources().is_empty());
}

#[test]
fn a_change_that_does_not_reach_the_disk_does_not_reach_the_live_view() {
    let (dir, registry) = empty();
    let (a, key, secret) = registry.create_datasource(&Actor::SYSTEM, None, "a", ingest()).expect("created");
    break_disk(&registry, true);
    let failed = [
        registry.create_datasource(&Actor::SYSTEM, None, "b", ingest()).err(),
        registry.create_key(&Actor::SYSTEM, &a.id, "", ingest(), None).err(),
        registry.rotate_key(&Actor::SYSTEM, &a.id, key.id, Duration::from_secs(60)).err(),
    ];
    for error in failed {
        assert!(matches!(error, Some(RegistryError::Database(_))), "{error:?}");
    }
    let check = |registry: &Registry| {
        assert_eq!(registry.datasources().len(), 1);
        assert_eq!(registry.key_count(), 1);
        assert!(registry.find(&secret.digest()).is_some_and(|key| key.holds()));
    };
    check(&registry);
    assert!(key.holds());
    break_disk(&registry, false);
    registry.create_key(&Actor::SYSTEM, &a.id, "", ingest(), None).expect("works again");
    registry.revoke_key(&Actor::SYSTEM, &a.id, registry.keys(&a.id)[1].id).expect("works again");
    check(&reopened(&dir, registry));
}

#[test]
fn a_rotation_without_grace_ends_the_old_key_also_when_there_can_be_no_new_one() {
    let (dir, registry) = empty();
    let (a, old, secret) = registry.create_datasource(&Actor::SYSTEM, None, "a", ingest()).expect("created");
    let all = DatasourceId::all();
    let admin = Scopes::from_slice(&[Scope::Admin]);
    let (last_admin, _) = registry.create_key(&Actor::SYSTEM, &all, "", admin, None).expect("created");
    break_disk(&registry, true);
    let rotate = |of: &DatasourceId, id, grace| registry.rotate_key(&Actor::SYSTEM, of, id, grace);
    let kept = rotate(&a.id, old.id, Duration::from_secs(60));
    assert!(matches!(kept, Err(RegistryError::Database(_))) && old.holds(), "{kept:?}");
    let kept = rotate(&all, last_admin.id, Duration::ZERO);
    assert!(matches!(kept, Err(RegistryError::Database(_))) && last_admin.holds(), "{kept:?}");
    let error = rotate(&a.id, old.id, Duration::ZERO).expect_err("no new key");
    let RegistryError::NotReplaced { dead, .. } = &error else { panic!("{error}") };
    assert!(dead.id == old.id && error.to_string().contains(&old.id.to_string()), "{error}");
    assert!(!old.holds() && registry.was_revoked(&secret.digest()));
    assert!(registry.describe_unwritten(&a.id, Some(old.id)).is_some() && registry.trouble().is_some());
    assert!(rotate(&a.id, old.id, Duration::ZERO).expect("no such key").is_none());

    break_disk(&registry, false);
    registry.write_ends().expect("written");
    let registry = reopened(&dir, registry);
    assert!(registry.was_revoked(&secret.digest()));
}

#[test]
fn a_key_dies_whatever_the_disk_says_and_its_end_is_written_before_anything_else() {
    let (dir, registry) = empty();
    let (a, first, first_secret) =
        registry.create_datasource(&Actor::SYSTEM, None, "a", ingest()).expect("created");
    let (b, second, second_secret) =
        registry.create_datasource(&Actor::SYSTEM, None, "b", ingest()).expect("created");
    let (third, third_secret) =
        registry.create_key(&Actor::SYSTEM, &a.id, "", ingest(), None).expect("created");
    assert_eq!(registry.trouble(), None);
    break_disk(&registry, true);
    registry.revoke_key(&Actor::SYSTEM, &a.id, first.id).expect("dead").expect("was live");
    registry.delete_datasource(&Actor::SYSTEM, &b.id).expect("gone");
    let digest = third_secret.digest();
    let leaked = registry.revoke_leaked(&Actor::SYSTEM, &digest, "").expect("dead");
    assert!(matches!(leaked, LeakedKeyFate::Revoked(_)), "{leaked:?}");
    let dead = [(&first, &first_secret), (&second, &second_secret), (&third, &third_secret)];
    let trouble = registry.trouble().expect("an operator is told");
    for (key, secret) in dead {
        assert!(!key.holds() && registry.was_revoked(&secret.digest()));
        assert!(trouble.contains(&key.id.to_string()), "{trouble}");
        assert!(registry.describe_unwritten(&key.datasource, Some(key.id)).is_some());
    }
    assert!(registry.describe_unwritten(&b.id, None).is_some() && !registry.has_datasource("b"));
    let error = registry.create_datasource(&Actor::SYSTEM, Some(b.id.clone()), "b", ingest());
    assert!(matches!(error, Err(RegistryError::Database(_))), "{error:?}");

    break_disk(&registry, false);
    let (again, new, new_secret) = registry
        .create_datasource(&Actor::SYSTEM, Some(b.id.clone()), "b", ingest())
        .expect("the deletion was written first");
    assert_eq!((registry.trouble(), &again.id), (None, &b.id));
    for (key, _) in dead {
        assert_eq!(registry.describe_unwritten(&key.datasource, Some(key.id)), None);
    }
    let actions: Vec<_> = audited(&registry).into_iter().map(|entry| entry.action).skip(3).collect();
    assert_eq!(actions, ["key.revoked", "datasource.deleted", "key.leaked", "datasource.created"]);
    let registry = reopened(&dir, registry);
    for (_, secret) in dead {
        assert!(registry.was_revoked(&secret.digest()));
    }
    assert!(registry.find(&new_secret.digest()).is_some_and(|key| key.id == new.id));
}

#[test]
fn no_file_of_the_registry_holds_a_secret() {
    let (dir, registry) = empty();
    let (a, _, first) = registry.create_datasource(&Actor::SYSTEM, None, "a", ingest()).expect("created");
    let (second_key, second) =
        registry.create_key(&Actor::SYSTEM, &a.id, "label", ingest(), None).expect("created");
    registry.revoke_key(&Actor::SYSTEM, &a.id, second_key.id).expect("revoked");
    let files = || -> Vec<u8> {
        let files = std::fs::read_dir(dir.path()).expect("readable");
        files.flat_map(|file| std::fs::read(file.expect("entry").path()).expect("readable")).collect()
    };
    let holds = |bytes: &[u8], part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
    let open = files();
    drop(registry);
    for bytes in [open, files()] {
        for secret in [&first, &second] {
            assert!(
                holds(&bytes, &secret.digest().0),
                "the digest is there, so this looks in the right place"
            );
            assert!(!holds(&bytes, &secret.expose().as_bytes()[4..20]));
            assert!(!holds(&bytes, b"hgk_"));
        }
    }
}

#[test]
fn an_id_that_is_given_has_to_be_free_and_one_that_is_made_is() {
    let (_dir, registry) = empty();
    let create = |id: Option<&str>, name: &str| {
        registry
            .create_datasource(&Actor::SYSTEM, id.map(slug), name, ingest())
            .map(|(datasource, ..)| datasource.id.to_string())
    };
    assert_eq!(create(Some("press"), "Press 4").expect("free"), "press");
    let error = create(Some("press"), "another").expect_err("taken");
    assert!(matches!(&error, RegistryError::Exists(id) if id.as_str() == "press"), "{error}");
    assert_eq!(create(None, "Press").expect("made"), "press-2");
    assert_eq!(create(None, "PRESS!").expect("made"), "press-3");
    let long = "x".repeat(DATASOURCE_ID_BYTES_MAX);
    assert_eq!(create(None, &long).expect("made"), long);
    assert_eq!(create(None, &long).expect("made"), format!("{}-2", "x".repeat(DATASOURCE_ID_BYTES_MAX - 2)));
    assert_eq!(create(None, "温度").expect("made"), "wen-du");
    let error = create(None, "!?").expect_err("nothing to make an id from");
    assert!(matches!(&error, RegistryError::NoSlug(text) if text.contains("give an id")), "{error}");
    assert_eq!(create(Some("temperature"), "!?").expect("id given"), "temperature");
}

#[test]
fn names_labels_and_scopes_that_cannot_be_used_are_refused_with_the_rule() {
    let (_dir, registry) = empty();
    let refused = |error: Option<RegistryError>, rule: &str| {
        assert!(matches!(&error, Some(RegistryError::InvalidName(text)) if text.contains(rule)), "{error:?}");
    };
    let create = |name: &str| registry.create_datasource(&Actor::SYSTEM, None, name, ingest()).err();
    refused(create(" "), "needs a name");
    refused(create("a\nb"), "control");
    refused(create(&"a".repeat(NAME_BYTES_MAX + 1)), "200 bytes");
    assert!(create(&"a".repeat(NAME_BYTES_MAX)).is_none());
    assert!(create(&"a".repeat(NAME_BYTES_MAX - 1)).is_none());
    refused(
        registry.create_datasource(&Actor::SYSTEM, Some(DatasourceId::all()), "all", ingest()).err(),
        "'*'",
    );
    refused(registry.create_datasource(&Actor::SYSTEM, None, "a", Scopes::from_slice(&[])).err(), "scope");

    let all = DatasourceId::all();
    let label = |label: &str| registry.create_key(&Actor::SYSTEM, &all, label, ingest(), None).err();
    refused(label(&"a".repeat(NAME_BYTES_MAX + 1)), "200 bytes");
    refused(label("\u{1b}[2J"), "control");
    assert!(label(&"a".repeat(NAME_BYTES_MAX)).is_none());
    let error =
        registry.create_key(&Actor::SYSTEM, &slug("none"), "", ingest(), None).expect_err("no datasource");
    assert!(matches!(error, RegistryError::NoDatasource(_)), "{error}");
    assert_eq!(registry.datasources().len(), 2);
    assert_eq!(registry.key_count(), 3);
}

#[test]
fn all_is_no_datasource() {
    let (_dir, registry) = empty();
    registry.create_key(&Actor::SYSTEM, &DatasourceId::all(), "", ingest(), None).expect("created");
    assert!(!registry.has_datasource("*") && registry.datasource("*").is_none());
    let error = registry.delete_datasource(&Actor::SYSTEM, &DatasourceId::all()).expect_err("not one");
    assert!(matches!(error, RegistryError::NoDatasource(_)), "{error}");
    assert_eq!(registry.key_count(), 1);
}

#[test]
fn no_connection_outlives_its_key_however_lookup_and_deletion_race() {
    let (_dir, registry) = empty();
    let mut entered_in_all = 0;
    for _ in 0..30 {
        let (a, _, secret) =
            registry.create_datasource(&Actor::SYSTEM, None, "a", ingest()).expect("created");
        let digest = secret.digest();
        let has_entered = AtomicBool::new(false);
        let connections = thread::scope(|scope| {
            let connecting = scope.spawn(|| {
                let mut connections = Vec::new();
                while let Some(key) = registry.find(&digest) {
                    let control = Arc::new(ConnectionControl::default());
                    connections.push((key.connections().enter(Arc::clone(&control)), control));
                    has_entered.store(true, Ordering::Release);
                }
                connections
            });
            // The deletion holds in memory at once, so it could come before any connection.
            while !has_entered.load(Ordering::Acquire) {
                thread::yield_now();
            }
            registry.delete_datasource(&Actor::SYSTEM, &a.id).expect("deleted");
            connecting.join().expect("no panic")
        });
        entered_in_all += connections.len();
        for (_, control) in &connections {
            assert_eq!(control.closed(), Some(CloseReason::KeyDead));
        }
    }
    assert!(entered_in_all > 0, "some of them got in before the deletion");
}

#[test]
fn changes_at_the_same_time_do_not_take_each_others_place() {
    let (dir, registry) = empty();
    let created: Vec<_> = thread::scope(|scope| {
        let creating: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    (0..10)
                        .map(|_| {
                            registry
                                .create_datasource(&Actor::SYSTEM, None, "same", ingest())
                                .expect("created")
                        })
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        creating.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect()
    });
    let registry = reopened(&dir, registry);
    assert_eq!(registry.datasources().len(), 40);
    for (datasource, key, secret) in created {
        let found = registry.find(&secret.digest()).expect("kept");
        assert_eq!((found.id, &found.datasource), (key.id, &datasource.id));
    }
}

#[test]
fn debug_shows_no_part_of_a_digest_beyond_the_key_id() {
    let (_dir, registry) = empty();
    let (_, key, secret) = registry.create_datasource(&Actor::SYSTEM, None, "a", ingest()).expect("created");
    let shown = format!("{registry:?} {key:?}");
    assert!(shown.contains(&key.id.to_string()));
    let hex = blake3::Hash::from(secret.digest().0).to_hex();
    assert!(!shown.contains(&hex[12..24]) && !shown.contains(&secret.expose()[4..12]), "{shown}");
}

#[test]
fn a_registry_of_format_1_is_read_and_goes_on_as_format_2() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("registry.db");
    let frozen = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/registry-v1/registry.db");
    std::fs::copy(frozen, &path).expect("copied");
    let connection = rusqlite::Connection::open(&path).expect("opens");
    let mut select = connection.prepare("SELECT digest, revoked_at IS NOT NULL FROM keys").expect("format 1");
    let stored = select.query_map([], |row| Ok((Digest(row.get(0)?), row.get(1)?))).expect("read");
    let stored: Vec<(Digest, bool)> = stored.map(|row| row.expect("a row")).collect();
    drop(select);
    drop(connection);
    assert_eq!(stored.len(), 7);

    let check = |registry: &Registry| {
        let names: Vec<_> = registry.datasources().iter().map(told).collect();
        assert_eq!(names, [("press-4".to_owned(), "Press 4".to_owned(), 1_795_439_985_844_522)]);
        for (digest, revoked) in &stored {
            assert_eq!((registry.find(digest).is_none(), registry.was_revoked(digest)), (*revoked, *revoked));
        }
        let press = registry.keys(&slug("press-4"));
        let labels: Vec<_> = press.iter().map(|key| &*key.label).collect();
        assert_eq!(labels, ["", "line 2", "soon"]);
        assert_eq!(press[1].scopes, Scopes::from_slice(&[Scope::Ingest, Scope::Subscribe]));
        assert_eq!(press[2].expires_at(), Some(1_801_396_800_000_000));
        assert_eq!(registry.keys(&DatasourceId::all()).len(), 2);
    };
    let registry = Registry::open(dir.path()).expect("migrated");
    check(&registry);
    assert!(audited(&registry).is_empty());
    let limits = r#"{"messages_per_second": 5}"#;
    let id = slug("press-4");
    registry.set_datasource_limits(&Actor::SYSTEM, &id, Some(limits.to_owned())).expect("set");
    let registry = reopened(&dir, registry);
    check(&registry);
    let press = registry.datasource("press-4").expect("there");
    assert_eq!(press.limits.text().as_deref(), Some(limits));
    assert_eq!(audited(&registry).len(), 1);
}

#[test]
fn every_change_is_in_the_audit_with_who_from_where_and_what() {
    let (dir, registry) = empty();
    // That of another registry, so that this one's audit begins here.
    let (all, manage) = (DatasourceId::all(), Scopes::from_slice(&[Scope::Admin]));
    let admin = empty().1.create_key(&Actor::SYSTEM, &all, "", manage, None).expect("created").0;
    let actor = Actor::of_grant(&Grant::new(admin.clone()), Some([192, 0, 2, 1].into()));
    let (a, key, _) = registry.create_datasource(&actor, None, "a", ingest()).expect("created");
    let (second, _) = registry.create_key(&actor, &a.id, "line 2", ingest(), None).expect("created");
    registry.set_key_limits(&actor, &a.id, second.id, Some(r#"{"topics":1}"#.to_owned())).expect("set");
    registry.set_datasource_schemas(&actor, &a.id, Some("[]".to_owned())).expect("set");
    registry.revoke_key(&actor, &a.id, second.id).expect("revoked");
    assert!(registry.revoke_key(&actor, &a.id, second.id).expect("asked").is_none(), "changes nothing");
    registry.delete_datasource(&Actor::SYSTEM, &a.id).expect("deleted");

    let registry = reopened(&dir, registry);
    let entries = audited(&registry);
    let told: Vec<_> = entries.iter().map(|entry| (&*entry.action, entry.key_id.clone())).collect();
    let (first, second) = (Some(key.id.to_string()), Some(second.id.to_string()));
    assert_eq!(
        told,
        [
            ("datasource.created", first.clone()),
            ("key.created", second.clone()),
            ("key.limits_changed", second.clone()),
            ("datasource.schemas_changed", None),
            ("key.revoked", second),
            ("datasource.deleted", None),
        ]
    );
    for entry in &entries[..5] {
        assert_eq!((entry.who.clone(), entry.address.as_deref()), (admin.id.to_string(), Some("192.0.2.1")));
        assert_eq!(entry.datasource.as_deref(), Some("a"));
    }
    assert_eq!((&*entries[5].who, &entries[5].address), ("system", &None));
    assert_eq!(entries[2].what.get(), r#"{"limits":{"topics":1}}"#);
    let page = AuditQuery { from: Some(entries[1].at), to: None, after: entries[1].id, limit: 2 };
    let page: Vec<_> = registry.audit_entries(&page).expect("read").iter().map(|entry| entry.id).collect();
    assert_eq!(page, [entries[2].id, entries[3].id]);
}

#[test]
fn a_change_that_is_not_durable_is_not_in_the_audit_and_a_setting_keeps_its_text() {
    let (_dir, registry) = empty();
    let (a, ..) = registry.create_datasource(&Actor::SYSTEM, None, "a", ingest()).expect("created");
    let set = |text: &str| registry.set_datasource_limits(&Actor::SYSTEM, &a.id, Some(text.to_owned()));
    set("1").expect("set");
    break_disk(&registry, true);
    assert!(matches!(set("2"), Err(RegistryError::Database(_))));
    assert_eq!(a.limits.text().as_deref(), Some("1"));
    assert_eq!(audited(&registry).len(), 2);
}
