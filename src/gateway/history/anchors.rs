//! Where the log ended when it was looked at, now and then: what tells up to where a stream that was put back, and has grown
//! since, is still the one that was followed.

use headgate_bridge_nats::{Nats, StreamError};
use serde::{Deserialize, Serialize};

use super::{FollowedHistory, HistoryFindings};
use crate::message::Offset;

/// How many are kept.
const LOG_ANCHORS_MAX: usize = 256;
/// An anchor is as far from the next newer one as this part of its age: the older, the further apart.
const ANCHOR_AGE_SHARE: i64 = 16;

/// Offsets of messages and when JetStream stored them, in nanoseconds since the Unix epoch; oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(in crate::gateway) struct LogAnchors(Vec<(Offset, i64)>);

impl LogAnchors {
    /// Notes where the log ends.
    pub(super) fn note(&mut self, last: Offset, last_at: i64) {
        if last == 0 || self.0.last().is_some_and(|(known, _)| *known >= last) {
            return;
        }
        self.0.push((last, last_at));
        if self.0.len() > LOG_ANCHORS_MAX {
            self.thin_out(last_at);
        }
    }

    fn thin_out(&mut self, now: i64) {
        let mut kept: Vec<(Offset, i64)> = Vec::with_capacity(LOG_ANCHORS_MAX);
        for (offset, at) in self.0.iter().rev().copied() {
            let is_far = |(_, newer): &(Offset, i64)| {
                newer.saturating_sub(at) >= now.saturating_sub(at) / ANCHOR_AGE_SHARE
            };
            if kept.last().is_none_or(is_far) {
                kept.push((offset, at));
            }
        }
        kept.truncate(LOG_ANCHORS_MAX * 3 / 4);
        kept.reverse();
        self.0 = kept;
    }

    /// Those of a log that goes on at `end` from an earlier state.
    pub(super) fn below(mut self, end: Offset) -> Self {
        self.0.retain(|(offset, _)| *offset < end);
        self
    }
}

/// Up to where the log on the servers is the one that this gateway has followed.
#[derive(Debug, Clone, Copy)]
pub(super) struct FollowedEnd {
    /// Below that it is, without doubt.
    pub(super) sure: Offset,
    /// The first offset at which it may have another record.
    pub(super) end: Offset,
}

/// Compares the log on the servers with what this gateway has noted of it.
///
/// # Errors
/// [`StreamError::Away`].
pub(super) async fn end_of_followed(
    nats: &Nats,
    found: &HistoryFindings,
    known: Option<&FollowedHistory>,
) -> Result<FollowedEnd, StreamError> {
    let at = |offset| FollowedEnd { sure: offset, end: offset };
    let Some((stream, Some(report))) = found.streams.first() else { return Ok(at(1)) };
    let is = report.extent();
    let end = is.last + 1;
    let Some((known, log)) = known.and_then(|known| Some((known, known.streams.get(stream.name())?))) else {
        return Ok(FollowedEnd { sure: is.first.max(1), end });
    };
    let mut is_another = log.created != is.created;
    let newest = (log.last, log.last_at);
    for (offset, stored) in std::iter::once(newest).chain(known.anchors.0.iter().rev().copied()) {
        if offset > is.last {
            is_another = true;
            continue;
        }
        if offset < is.first.max(1) {
            break;
        }
        match stream.stored_at(nats, offset).await? {
            Some(is) if is == stored => {
                let sure = offset + 1;
                return Ok(FollowedEnd { sure, end: if is_another { sure } else { end } });
            }
            Some(_) => is_another = true,
            // Removed, by retention or because its key had ended.
            None => {}
        }
    }
    let sure = is.first.max(1);
    Ok(FollowedEnd { sure, end: if is_another { sure } else { end } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anchors_are_few_and_the_newest_are_close_together() {
        let mut anchors = LogAnchors::default();
        for second in 0..100_000_u64 {
            anchors.note(second * 10, second.cast_signed());
        }
        anchors.note(5, 5);
        assert!(anchors.0.len() <= LOG_ANCHORS_MAX, "{}", anchors.0.len());
        assert!(anchors.0.is_sorted());
        assert_eq!(anchors.0.last(), Some(&(999_990, 99_999)));
        assert_eq!(anchors.0[anchors.0.len() - 10].0, 999_900);
        assert!(anchors.0[0].0 < 500_000, "{:?}", anchors.0[0]);
        assert!(anchors.clone().below(999_800).0.iter().all(|(offset, _)| *offset < 999_800));
    }
}
