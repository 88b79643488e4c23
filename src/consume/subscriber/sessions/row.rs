//! The content of a cell in the sessions' bucket: one byte for the version of the format, then
//! [postcard](https://postcard.jamesmunns.com/wire-format).

use std::borrow::Cow;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize};

use super::StoredSession;
use crate::message::{DatasourceId, Offset};

const SESSION_ROW_VERSION: u8 = 1;

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

/// `None`: the bytes are damaged, or of a newer version.
pub(super) fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Option<T> {
    match bytes.split_first()? {
        (&SESSION_ROW_VERSION, rest) => postcard::from_bytes(rest).ok(),
        _ => None,
    }
}

/// The scope of an incarnation of a datasource, or `*`.
pub(super) fn datasource<'de, D: Deserializer<'de>>(from: D) -> Result<DatasourceId, D::Error> {
    DatasourceId::parse_scope(&Cow::<str>::deserialize(from)?).map_err(serde::de::Error::custom)
}
