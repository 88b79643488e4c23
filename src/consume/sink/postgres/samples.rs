//! The samples of new records in PostgreSQL: a row for those of a record that are of one time, which is mostly all of them.
//! A row for each number would cost several times what the record itself does, with the indexes that a chart needs. What
//! the numbers stand for is in `key_sets`: records of one topic mostly have the same keys in the same order. Where they have not,
//! the topic gets no further set after some, and its rows have their keys themselves: names are the devices' to choose, and
//! what they invent goes with their records.

use std::borrow::Cow;
use std::collections::HashSet;

use headgate_bridge_postgres::CopyRows;

use super::ids::{KeySetDigest, text_of};
use super::{PostgresError, PostgresSink};
use crate::consume::sink::schema::sql_offset;
use crate::message::{RecordRef, TimeMicros};
use crate::values::samples::{JsonMember, Sample};

/// The `key_set_id` of a row that has its keys itself. No set has this id.
const NO_KEY_SET: i64 = 0;

/// Where the rows of samples are added.
pub(super) struct SampleRows<'r> {
    pub(super) samples: &'r mut CopyRows,
    /// The sets of keys that they bring.
    pub(super) key_sets: &'r mut CopyRows,
}

impl PostgresSink {
    /// Adds the rows of a record's samples. `text` is its payload if that is text, `members` are those of the JSON object
    /// that it is, if they are known.
    pub(super) fn add_samples(
        &mut self,
        mut rows: SampleRows<'_>,
        record: &RecordRef<'_>,
        topic: i64,
        text: Option<&str>,
        members: Option<&[JsonMember<'_>]>,
    ) -> Result<(), PostgresError> {
        if !self.has_samples {
            return Ok(());
        }
        let mut reader = std::mem::take(&mut self.reader);
        let found: Vec<_> = reader
            .read_parsed(record.topic, record.content_type, text, members, record.received_at)
            .collect();
        let of_record = record.event_at.unwrap_or(record.received_at);
        let time_of = |sample: &Sample<'_>| sample.at.unwrap_or(of_record);
        let added = match found.first() {
            None => Ok(()),
            Some(first) if found.iter().all(|sample| sample.at == first.at) => {
                self.add_row(&mut rows, record, topic, time_of(first), &found)
            }
            Some(_) => by_time(&found, time_of)
                .into_iter()
                .try_for_each(|(at, samples)| self.add_row(&mut rows, record, topic, at, &samples)),
        };
        drop(found);
        self.reader = reader;
        added
    }

    /// Adds the row of samples of one time; more than one if a key comes twice.
    fn add_row(
        &mut self,
        rows: &mut SampleRows<'_>,
        record: &RecordRef<'_>,
        topic: i64,
        at: TimeMicros,
        samples: &[Sample<'_>],
    ) -> Result<(), PostgresError> {
        let digest = KeySetDigest::of(samples.iter().map(|sample| sample.key));
        if let Some(id) = self.known_key_set(topic, digest) {
            self.add_numbers(rows.samples, record, (topic, Some(id)), at, samples);
            return Ok(());
        }
        let mut seen = HashSet::new();
        let (first, again): (Vec<_>, Vec<_>) =
            samples.iter().copied().partition(|sample| seen.insert(text_of(sample.key)));
        if again.is_empty() {
            let keys = samples.iter().map(|sample| sample.key);
            let id = self.learn_key_set(rows.key_sets, topic, digest, keys)?;
            self.add_numbers(rows.samples, record, (topic, id), at, samples);
            return Ok(());
        }
        self.add_row(rows, record, topic, at, &first)?;
        self.add_row(rows, record, topic, at, &again)
    }

    fn add_numbers(
        &self,
        rows: &mut CopyRows,
        record: &RecordRef<'_>,
        (topic, key_set): (i64, Option<i64>),
        at: TimeMicros,
        samples: &[Sample<'_>],
    ) {
        rows.begin(6);
        rows.timestamptz(at);
        rows.int8(sql_offset(record.offset));
        self.put_id(rows, topic);
        self.put_id(rows, key_set.unwrap_or(NO_KEY_SET));
        rows.float8_array(samples.iter().map(|sample| sample.value));
        match key_set {
            Some(_) => rows.null(),
            None => {
                let keys: Vec<Cow<'_, str>> = samples.iter().map(|sample| text_of(sample.key)).collect();
                rows.text_array(keys.iter().map(|key| &**key));
            }
        }
    }
}

/// The samples of each time, in the order in which the times come first.
fn by_time<'s, 'a>(
    samples: &'s [Sample<'a>],
    time_of: impl Fn(&Sample<'a>) -> TimeMicros,
) -> Vec<(TimeMicros, Vec<Sample<'a>>)> {
    let mut groups: Vec<(TimeMicros, Vec<Sample<'a>>)> = Vec::new();
    for sample in samples {
        let at = time_of(sample);
        match groups.iter_mut().find(|(of, _)| *of == at) {
            Some((_, group)) => group.push(*sample),
            None => groups.push((at, vec![*sample])),
        }
    }
    groups
}
