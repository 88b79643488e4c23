//! The comparison of what the servers have with what a gateway has followed.

use std::path::Path;

use headgate_bridge_nats::stream::StreamExtent;
use headgate_bridge_nats::{Nats, StreamError};

use super::comparison::is_same_record;
use super::{ClusterHistory, FollowedHistory, HistoryFindings, registry_stream};
use crate::consume::sink::record_copy::RecordCopy;
use crate::time::Rfc3339;

/// What the comparison says.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::gateway) enum HistoryVerdict {
    /// There is nothing yet: this is a new cluster.
    New,
    /// An earlier Headgate has made all of it, and marked none of it.
    Unmarked,
    /// It is what was followed, or goes on from that.
    Same,
    /// It goes on from another state, and somebody has decided so.
    Adopted,
    /// It is something else. The text says what, for an operator.
    Broken(String),
}

/// How to go on.
const WAYS_OUT: &str = "No gateway that knows of it takes a message until that is decided: put back what was there, and they go on by \
     themselves; or `headgate cluster adopt` lets the cluster go on from what it has now, and what gateways have beyond \
     that is set aside; or `headgate cluster restore` does that, and publishes the registry again as this gateway has it. \
     Both only say what they would do, until they are told --yes";

fn broken(what: &str) -> HistoryVerdict {
    HistoryVerdict::Broken(format!("{what}. {WAYS_OUT}"))
}

/// Compares what the servers have with all that this gateway knows of it: what it has noted in its data directory `dir`, and
/// what its `records.db` has, which may be more.
///
/// # Errors
/// [`StreamError::Away`].
pub(super) async fn judge_all(
    nats: &Nats,
    found: &HistoryFindings,
    known: Option<&FollowedHistory>,
    dir: &Path,
) -> Result<HistoryVerdict, StreamError> {
    let verdict = judge(found, known);
    if verdict != HistoryVerdict::Same {
        return Ok(verdict);
    }
    if let Some(known) = known
        && let Some(broken) = judge_anchor(nats, found, known).await?
    {
        return Ok(broken);
    }
    Ok(judge_copy(nats, found, dir).await?.unwrap_or(verdict))
}

/// Compares the newest record of `records.db` in `dir`. Returns what is wrong. A file that cannot be read tells nothing.
async fn judge_copy(
    nats: &Nats,
    found: &HistoryFindings,
    dir: &Path,
) -> Result<Option<HistoryVerdict>, StreamError> {
    let Some((stream, Some(report))) = found.streams.first() else { return Ok(None) };
    let Some(copy) = RecordCopy::in_dir(dir) else { return Ok(None) };
    let is = report.extent();
    let Ok(cursor) = copy.cursor() else { return Ok(None) };
    if cursor > is.last + 1 {
        return Ok(Some(broken(&format!(
            "the {stream} ends at {}, and records.db of this gateway has it up to {}: it was put back to an earlier state, or a \
             server has lost what it had not yet written to its disk",
            is.last,
            cursor - 1
        ))));
    }
    let Ok(Some(newest)) = copy.newest() else { return Ok(None) };
    if newest.offset < is.first {
        return Ok(None);
    }
    let stored = stream.message_at(nats, newest.offset).await?;
    // It may have been removed, by retention or because its key had ended.
    Ok(stored.filter(|stored| !is_same_record(Some(&newest), Some(stored))).map(|_| {
        broken(&format!(
            "the {stream} has another message at {} than records.db of this gateway: it was put back to an earlier state, and \
             has grown since",
            newest.offset
        ))
    }))
}

/// Compares what the servers have with what was followed; `None`: nothing was, so far.
pub(in crate::gateway) fn judge(found: &HistoryFindings, known: Option<&FollowedHistory>) -> HistoryVerdict {
    let Some(history) = &found.history else { return judge_without_row(found, known) };
    if let Some(known) = known {
        if known.id != history.id {
            return broken(&format!(
                "the log on these servers is another one: its identity is {}, and this gateway has followed {}",
                history.id, known.id
            ));
        }
        if history.epoch < known.epoch {
            return broken(&format!(
                "the bucket of the registry was put back to an earlier state: it is of epoch {}, and this gateway has \
                 followed epoch {}",
                history.epoch, known.epoch
            ));
        }
    }
    if let Some(text) = misfit(found, history) {
        return broken(&text);
    }
    match known {
        Some(known) if history.epoch > known.epoch => HistoryVerdict::Adopted,
        Some(known) => shortfall(found, known).map_or(HistoryVerdict::Same, |text| broken(&text)),
        None => HistoryVerdict::Same,
    }
}

fn judge_without_row(found: &HistoryFindings, known: Option<&FollowedHistory>) -> HistoryVerdict {
    let (log, registry) = (found.log(), found.registry());
    let has_records = log.is_some_and(|log| log.last > 0);
    if known.is_none() && found.marks().next().is_none() {
        match registry {
            Some(registry) if registry.messages > 0 => return HistoryVerdict::Unmarked,
            _ if !has_records => return HistoryVerdict::New,
            _ => {}
        }
    }
    let beside = if has_records { ", beside a log that has records" } else { "" };
    broken(&match registry {
        None => format!("the bucket of the registry (headgate-registry) is gone{beside}: without it no key is known"),
        Some(registry) if registry.messages == 0 => {
            format!("the bucket of the registry (headgate-registry) is empty{beside}: without it no key is known")
        }
        Some(_) => {
            "the bucket of the registry (headgate-registry) has lost the row that says whose it is: rows were removed, or \
             another bucket is in its place"
                .to_owned()
        }
    })
}

/// What of the streams and buckets is not that of the row.
fn misfit(found: &HistoryFindings, history: &ClusterHistory) -> Option<String> {
    found.streams.iter().find_map(|(stream, report)| {
        let created = history.streams.get(stream.name())?;
        let Some(report) = report else { return Some(format!("the {stream} is gone")) };
        (report.extent().created != *created).then(|| {
            format!(
                "the {stream} was made anew at {}: the one that this cluster had is of {}",
                Rfc3339(report.extent().created / 1_000),
                Rfc3339(created / 1_000)
            )
        })
    })
}

/// What of the streams and buckets is less than was followed.
fn shortfall(found: &HistoryFindings, known: &FollowedHistory) -> Option<String> {
    found.streams.iter().find_map(|(stream, report)| {
        let (known, is) = (known.streams.get(stream.name())?, report.as_ref()?.extent());
        let StreamExtent { created, last, messages, .. } = is;
        if created != known.created {
            return Some(format!("the {stream} was made anew at {}", Rfc3339(created / 1_000)));
        }
        if last < known.last {
            return Some(format!(
                "the {stream} ends at {last}, and this gateway has followed it up to {}: it was put back to an earlier \
                 state, or a server has lost what it had not yet written to its disk",
                known.last
            ));
        }
        (stream.name() == registry_stream() && messages < known.messages).then(|| {
            format!(
                "the {stream} has {messages} rows, and this gateway has seen {}: rows were purged",
                known.messages
            )
        })
    })
}

/// Compares the message at which the log's stream ended when it was last looked at: one that was put back may have
/// grown beyond that again. Returns what is wrong.
///
/// # Errors
/// [`StreamError::Away`].
pub(in crate::gateway) async fn judge_anchor(
    nats: &Nats,
    found: &HistoryFindings,
    known: &FollowedHistory,
) -> Result<Option<HistoryVerdict>, StreamError> {
    let Some((stream, Some(report))) = found.streams.first() else { return Ok(None) };
    let (Some(known), is) = (known.streams.get(stream.name()), report.extent()) else { return Ok(None) };
    if known.last == 0 || known.last_at == 0 || is.first > known.last {
        return Ok(None);
    }
    // It may have been removed, by retention or because its key had ended.
    let at = stream.stored_at(nats, known.last).await?;
    Ok(at.filter(|at| *at != known.last_at).map(|at| {
        broken(&format!(
            "the {stream} has another message at {} than this gateway has followed, stored at {}: it was put back to an \
             earlier state, and has grown since",
            known.last,
            Rfc3339(at / 1_000)
        ))
    }))
}
