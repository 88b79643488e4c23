//! A look at a store before a table is in it: whether it can be reached and written, and whether it keeps the one promise
//! that a table stands on, that of two who create an object only the first one does.

use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};

/// Why a store cannot hold a table.
#[derive(Debug, thiserror::Error)]
pub enum StoreProbeError {
    /// It does not answer, or lets nobody in.
    #[error("it cannot be read: {0}")]
    Unreadable(object_store::Error),
    /// Nothing can be put there.
    #[error("nothing can be written there: {0}")]
    Unwritable(object_store::Error),
    /// What is there was created again.
    #[error("it creates an object that is there already: two writers would overwrite each other's commits")]
    Overwrites,
    /// It does not say that an object is there already, but something else.
    #[error("it does not tell that an object is there already: {0}")]
    Unconditional(object_store::Error),
    /// What is there cannot be removed.
    #[error("nothing can be removed there: {0}")]
    Unremovable(object_store::Error),
}

/// Puts an object into a store, puts it again, which has to fail, and removes it. Readers of tables pass over its name.
///
/// # Errors
/// [`StoreProbeError`], at the first thing that does not work. What was put may be left if it cannot be removed.
pub async fn probe_store(store: &dyn ObjectStore) -> Result<(), StoreProbeError> {
    let first = store.list(Some(&Path::from("_delta_log"))).try_next().await;
    first.map_err(StoreProbeError::Unreadable)?;
    let path = Path::from(format!("_headgate_doctor.{:016x}", rand::random::<u64>()));
    let create = || {
        let payload = PutPayload::from(Bytes::from_static(b"headgate doctor"));
        store.put_opts(&path, payload, PutOptions { mode: PutMode::Create, ..PutOptions::default() })
    };
    create().await.map_err(StoreProbeError::Unwritable)?;
    let again = create().await;
    store.delete(&path).await.map_err(StoreProbeError::Unremovable)?;
    match again {
        Err(object_store::Error::AlreadyExists { .. }) => Ok(()),
        Err(error) => Err(StoreProbeError::Unconditional(error)),
        Ok(_) => Err(StoreProbeError::Overwrites),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BucketAccess, LakePlace};

    #[tokio::test]
    async fn a_directory_is_tried_and_left_as_it_was() {
        let dir = tempfile::tempdir().expect("a directory");
        let place = LakePlace::parse(dir.path().to_str().expect("a path"), BucketAccess::default());
        let store = place.expect("a place").open().expect("opens");
        probe_store(&*store).await.expect("it works");
        let left: Vec<_> = std::fs::read_dir(dir.path()).expect("readable").collect();
        assert!(left.is_empty(), "{left:?}");
    }

    #[tokio::test]
    async fn a_store_that_cannot_be_reached_says_so() {
        let access = BucketAccess {
            endpoint: Some("http://127.0.0.1:1".to_owned()),
            access_key_id: Some("x".to_owned()),
            secret_access_key: Some("y".to_owned()),
            ..BucketAccess::default()
        };
        let store = LakePlace::parse("s3://plant/records", access).expect("a place").open().expect("opens");
        let fault = probe_store(&*store).await.expect_err("nobody is there");
        assert!(matches!(fault, StoreProbeError::Unreadable(_)), "{fault}");
    }
}
