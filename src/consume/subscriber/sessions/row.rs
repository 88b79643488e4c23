//! The content of a cell in the sessions' bucket: one byte for the version of the format, then
//! [postcard](https://postcard.jamesmunns.com/wire-format).

use std::borrow::Cow;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize};

use super::{StoredFlights, StoredSession, StoredSubscription};
use crate::message::{DatasourceId, Offset, TimeMicros};

/// Version 1 had no flights, and no replays of subscriptions: [`EarlierSession`], [`EarlierCursorMove`].
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

/// The cursor and the flights of a session that have moved since its cell was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CursorMove<'a> {
    pub(super) uid: u64,
    /// The revision of the session's cell. The cursor is void if the cell has another.
    pub(super) revision: u64,
    pub(super) cursor: Offset,
    pub(super) flights: Cow<'a, StoredFlights>,
}

/// A client's cell in version 1.
#[derive(Deserialize)]
struct EarlierSessionRow {
    owner: String,
    moves: u64,
    session: Option<EarlierSession>,
}

/// A session in version 1.
#[derive(Deserialize)]
struct EarlierSession {
    uid: u64,
    #[serde(deserialize_with = "datasource")]
    datasource: DatasourceId,
    client_id: String,
    expiry_s: u32,
    ended_at: Option<TimeMicros>,
    cursor: Offset,
    subscriptions: Vec<EarlierSubscription>,
}

/// A subscription in version 1.
#[derive(Deserialize)]
struct EarlierSubscription {
    filter: String,
    qos: u8,
    no_local: bool,
    retain_as_published: bool,
    identifier: Option<u32>,
    from: Offset,
}

/// A moved cursor in version 1.
#[derive(Deserialize)]
struct EarlierCursorMove {
    uid: u64,
    revision: u64,
    cursor: Offset,
}

impl From<EarlierSession> for StoredSession {
    fn from(earlier: EarlierSession) -> Self {
        let subscriptions = earlier.subscriptions.into_iter().map(|of| StoredSubscription {
            filter: of.filter,
            qos: of.qos,
            no_local: of.no_local,
            retain_as_published: of.retain_as_published,
            identifier: of.identifier,
            from: of.from,
            replay: None,
        });
        Self {
            uid: earlier.uid,
            datasource: earlier.datasource,
            client_id: earlier.client_id,
            expiry_s: earlier.expiry_s,
            ended_at: earlier.ended_at,
            cursor: earlier.cursor,
            subscriptions: subscriptions.collect(),
            flights: StoredFlights::default(),
        }
    }
}

pub(super) fn encode<T: Serialize>(value: &T) -> Bytes {
    let bytes = postcard::to_extend(value, vec![SESSION_ROW_VERSION]);
    bytes.expect("plain values, into memory").into()
}

/// A client's cell. `None`: the bytes are damaged, or of a newer version.
pub(super) fn decode_session(bytes: &[u8]) -> Option<SessionRow<'_>> {
    match bytes.split_first()? {
        (&SESSION_ROW_VERSION, rest) => postcard::from_bytes(rest).ok(),
        (1, rest) => {
            let EarlierSessionRow { owner, moves, session } = postcard::from_bytes(rest).ok()?;
            let session = session.map(|session| Cow::Owned(session.into()));
            Some(SessionRow { owner: owner.into(), moves, session })
        }
        _ => None,
    }
}

/// A page of moved cursors, likewise.
pub(super) fn decode_moves(bytes: &[u8]) -> Option<Vec<CursorMove<'_>>> {
    match bytes.split_first()? {
        (&SESSION_ROW_VERSION, rest) => postcard::from_bytes(rest).ok(),
        (1, rest) => {
            let moves: Vec<EarlierCursorMove> = postcard::from_bytes(rest).ok()?;
            let moves = moves.into_iter().map(|EarlierCursorMove { uid, revision, cursor }| CursorMove {
                uid,
                revision,
                cursor,
                flights: Cow::default(),
            });
            Some(moves.collect())
        }
        _ => None,
    }
}

/// The scope of an incarnation of a datasource, or `*`.
pub(super) fn datasource<'de, D: Deserializer<'de>>(from: D) -> Result<DatasourceId, D::Error> {
    DatasourceId::parse_scope(&Cow::<str>::deserialize(from)?).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes as Headgate 0.1 wrote them.
    #[test]
    fn cells_and_pages_of_the_first_version_are_read() {
        let cell = [
            &[1, 4][..],
            b"node",
            &[3, 1, 7, 7],
            b"press-4",
            &[1],
            b"c",
            &[0x90, 0x1C, 0, 9, 1, 1],
            b"a",
            &[1, 0, 1, 0, 5],
        ];
        let cell = cell.concat();
        let row = decode_session(&cell).expect("a cell of version 1");
        let subscription = StoredSubscription {
            filter: "a".to_owned(),
            qos: 1,
            no_local: false,
            retain_as_published: true,
            identifier: None,
            from: 5,
            replay: None,
        };
        let session = StoredSession {
            uid: 7,
            datasource: DatasourceId::new("press-4").expect("slug"),
            client_id: "c".to_owned(),
            expiry_s: 3600,
            ended_at: None,
            cursor: 9,
            subscriptions: vec![subscription],
            flights: StoredFlights::default(),
        };
        let expected = SessionRow { owner: "node".into(), moves: 3, session: Some(Cow::Owned(session)) };
        assert_eq!(row, expected);
        assert_eq!(decode_session(&encode(&expected)), Some(expected));
        let moves = decode_moves(&[1, 1, 7, 8, 60]).expect("a page of version 1");
        assert_eq!(moves, [CursorMove { uid: 7, revision: 8, cursor: 60, flights: Cow::default() }]);
        assert_eq!(decode_moves(&[3, 0]), None, "a newer version");
    }
}
