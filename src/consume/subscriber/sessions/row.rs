//! The content of a cell in the sessions' bucket: one byte for the version of the format, then
//! [postcard](https://postcard.jamesmunns.com/wire-format).
//!
//! | version | |
//! |---|---|
//! | 1 | subscriptions do not say whether their messages come with metadata |
//! | 2 | as written now |

use std::borrow::Cow;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize};

use super::{StoredSession, StoredSubscription};
use crate::message::{DatasourceId, Offset, TimeMicros};

const SESSION_ROW_VERSION: u8 = 2;

/// A client's cell.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SessionRow<'a> {
    /// The node that wrote the cell. It has the session until another node writes the cell.
    pub(super) owner: Cow<'a, str>,
    /// How often the session has moved to another node.
    pub(super) moves: u64,
    /// `None`: the session has ended.
    pub(super) session: Option<Cow<'a, StoredSession>>,
}

/// The cursor of a session that has moved since its cell was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CursorMove {
    pub(super) uid: u64,
    /// The revision of the session's cell. The cursor is void if the cell has another.
    pub(super) revision: u64,
    pub(super) cursor: Offset,
}

pub(super) fn encode<T: Serialize>(value: &T) -> Bytes {
    let bytes = postcard::to_extend(value, vec![SESSION_ROW_VERSION]);
    bytes.expect("plain values, into memory").into()
}

/// A client's cell. `None`: the bytes are damaged, or of a newer version.
pub(super) fn decode_session(bytes: &[u8]) -> Option<SessionRow<'_>> {
    match bytes.split_first()? {
        (1, rest) => postcard::from_bytes::<SessionRowV1<'_>>(rest).ok().map(SessionRow::from),
        (&SESSION_ROW_VERSION, rest) => postcard::from_bytes(rest).ok(),
        _ => None,
    }
}

/// A page of cursors, which is the same in all versions. `None` as for [`decode_session`].
pub(super) fn decode_cursors(bytes: &[u8]) -> Option<Vec<CursorMove>> {
    match bytes.split_first()? {
        (1..=SESSION_ROW_VERSION, rest) => postcard::from_bytes(rest).ok(),
        _ => None,
    }
}

/// A [`SessionRow`] of version 1.
#[derive(Deserialize)]
struct SessionRowV1<'a> {
    owner: Cow<'a, str>,
    moves: u64,
    session: Option<StoredSessionV1>,
}

/// A [`StoredSession`] of version 1.
#[derive(Deserialize)]
struct StoredSessionV1 {
    uid: u64,
    #[serde(deserialize_with = "datasource")]
    datasource: DatasourceId,
    client_id: String,
    expiry_s: u32,
    ended_at: Option<TimeMicros>,
    cursor: Offset,
    subscriptions: Vec<StoredSubscriptionV1>,
}

/// A [`StoredSubscription`] of version 1.
#[derive(Deserialize)]
struct StoredSubscriptionV1 {
    filter: String,
    qos: u8,
    no_local: bool,
    retain_as_published: bool,
    identifier: Option<u32>,
    from: Offset,
}

impl<'a> From<SessionRowV1<'a>> for SessionRow<'a> {
    fn from(row: SessionRowV1<'a>) -> Self {
        let SessionRowV1 { owner, moves, session } = row;
        Self { owner, moves, session: session.map(|session| Cow::Owned(session.into())) }
    }
}

impl From<StoredSessionV1> for StoredSession {
    fn from(session: StoredSessionV1) -> Self {
        let StoredSessionV1 { uid, datasource, client_id, expiry_s, ended_at, cursor, subscriptions } =
            session;
        let subscriptions = subscriptions.into_iter().map(StoredSubscription::from).collect();
        Self { uid, datasource, client_id, expiry_s, ended_at, cursor, subscriptions }
    }
}

impl From<StoredSubscriptionV1> for StoredSubscription {
    fn from(subscription: StoredSubscriptionV1) -> Self {
        let StoredSubscriptionV1 { filter, qos, no_local, retain_as_published, identifier, from } =
            subscription;
        Self { filter, qos, no_local, retain_as_published, identifier, from, metadata: false }
    }
}

/// The scope of an incarnation of a datasource, or `*`.
pub(super) fn datasource<'de, D: Deserializer<'de>>(from: D) -> Result<DatasourceId, D::Error> {
    DatasourceId::parse_scope(&Cow::<str>::deserialize(from)?).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_of_the_first_version_is_read_and_its_subscriptions_ask_for_no_metadata() {
        // As version 1 has written it.
        let subscription = ("a/#", 1_u8, true, false, Some(7_u32), 12_u64);
        let session = (5_u64, "press-4", "c", 60_u32, Some(-3_i64), 11_u64, vec![subscription]);
        let cell = postcard::to_extend(&("node", 2_u64, Some(session)), vec![1]).expect("plain values");
        let SessionRow { owner, moves, session } = decode_session(&cell).expect("it is read");
        let session = session.expect("a session").into_owned();
        assert_eq!((&*owner, moves, session.uid, session.cursor), ("node", 2, 5, 11));
        let [subscription] = &session.subscriptions[..] else { panic!("one") };
        assert_eq!((&*subscription.filter, subscription.from, subscription.metadata), ("a/#", 12, false));
        let mut again = session.clone();
        again.subscriptions[0].metadata = true;
        let row = SessionRow { owner, moves, session: Some(Cow::Borrowed(&again)) };
        assert_eq!(decode_session(&encode(&row)), Some(row));
        let mut newer = cell.clone();
        newer[0] = SESSION_ROW_VERSION + 1;
        assert_eq!(decode_session(&newer), None);
    }

    #[test]
    fn a_page_of_cursors_is_read_in_both_versions() {
        let page = vec![CursorMove { uid: 1, revision: 2, cursor: 3 }];
        let mut cell = encode(&page).to_vec();
        assert_eq!(decode_cursors(&cell).as_ref(), Some(&page));
        cell[0] = 1;
        assert_eq!(decode_cursors(&cell), Some(page));
        cell[0] = SESSION_ROW_VERSION + 1;
        assert_eq!(decode_cursors(&cell), None);
    }
}
