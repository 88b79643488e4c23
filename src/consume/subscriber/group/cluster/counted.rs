//! The groups that sessions on this gateway are in, each counted once for its datasource.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;

use crate::message::DatasourceId;
use crate::shares::{ShareCharge, ShareCount, ShareExceeded, TenantShares};

/// A group's place in the count, shared by the sessions on this gateway that are in it.
pub type GroupCount = Arc<ShareCharge>;

/// The counted groups.
#[derive(Default)]
pub(super) struct CountedGroups {
    /// Set once, before there are clients.
    shares: OnceLock<Arc<TenantShares>>,
    by_name: Mutex<HashMap<String, Weak<ShareCharge>>>,
}

impl CountedGroups {
    pub(super) fn count_in(&self, shares: Arc<TenantShares>) {
        let _ = self.shares.set(shares);
    }

    /// Counts a group that a client asks for.
    pub(super) fn try_count(&self, scope: &DatasourceId, name: &str) -> Result<GroupCount, ShareExceeded> {
        self.find_or_add(scope, name, |charge| charge.try_take(ShareCount::ShareGroups, 1))
    }

    /// Counts a group that a session is in already, however many there are.
    pub(super) fn count(&self, scope: &DatasourceId, name: &str) -> GroupCount {
        let add = |charge: &mut ShareCharge| {
            charge.add(ShareCount::ShareGroups, 1);
            Ok(())
        };
        self.find_or_add(scope, name, add).expect("it is not limited")
    }

    fn find_or_add(
        &self,
        scope: &DatasourceId,
        name: &str,
        take: impl FnOnce(&mut ShareCharge) -> Result<(), ShareExceeded>,
    ) -> Result<GroupCount, ShareExceeded> {
        let mut by_name = self.by_name.lock();
        if let Some(counted) = by_name.get(name).and_then(Weak::upgrade) {
            return Ok(counted);
        }
        let (datasource, _) = scope.of_scope();
        let mut charge = self.shares.get_or_init(Arc::default).share(&datasource).charge();
        take(&mut charge)?;
        if by_name.len() == by_name.capacity() {
            by_name.retain(|_, counted| counted.strong_count() > 0);
        }
        let counted = Arc::new(charge);
        by_name.insert(name.to_owned(), Arc::downgrade(&counted));
        Ok(counted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_counts_once_as_long_as_a_session_is_in_it_and_one_too_many_is_refused() {
        let (groups, scope) = (CountedGroups::default(), DatasourceId::new("press-4").expect("a slug"));
        let shares = Arc::new(TenantShares::default());
        groups.count_in(shares.clone());
        let share = shares.share(&scope);
        share.set_max(ShareCount::ShareGroups, 2);
        let first = groups.try_count(&scope, "a").expect("there is room");
        let again = groups.try_count(&scope, "a").expect("it is there");
        let second = groups.try_count(&scope, "b").expect("at the bound");
        let over = groups.try_count(&scope, "c").err();
        assert_eq!(
            (over, share.count(ShareCount::ShareGroups)),
            (Some(ShareExceeded(ShareCount::ShareGroups)), 2)
        );
        let present = groups.count(&scope, "d");
        assert_eq!(share.count(ShareCount::ShareGroups), 3, "what is there already stays");
        drop((first, second, present));
        assert_eq!(share.count(ShareCount::ShareGroups), 1);
        drop(again);
        for n in 0..1_000 {
            drop(groups.try_count(&scope, &n.to_string()).expect("the others are over"));
        }
        assert!(groups.by_name.lock().len() < 100);
    }
}
