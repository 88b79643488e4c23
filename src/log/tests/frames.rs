//! What the log may find where it looks for frames: frames that somebody else made, frames of its own that do
//! not count, and frames that are damaged.

use super::versions::copy_of;
use super::*;
use crate::limits::BATCH_BYTES_MAX;

fn segment_path(dir: &Path, first_offset: Offset) -> PathBuf {
    super::super::segment::Segment::path_of(&dir.join("log"), first_offset)
}

/// Without waiting for the disk: what is tried is what is in the files.
fn quick() -> config::LogConfig {
    config::LogConfig { durability: config::Durability::Os, ..config() }
}

fn accepting() -> config::LogConfig {
    config::LogConfig { accept_corruption: true, ..quick() }
}

/// [`killed_after`], with the file as short as it can be, and what is in it.
fn short_log(dir: &Path, records: u64) -> (PathBuf, Vec<u8>, Vec<usize>) {
    let path = killed_after(dir, records);
    let starts = frame_starts(&path);
    let mut bytes = fs::read(&path).expect("readable");
    bytes.truncate(starts[starts.len() - 1] + 512);
    (path, bytes, starts)
}

fn texts(range: impl IntoIterator<Item = u64>) -> Vec<(Offset, Vec<u8>)> {
    range.into_iter().map(|n| (n, n.to_string().into_bytes())).collect()
}

/// Ends a log as a kill does: without the frame that a clean shutdown writes.
fn kill(log: EmbeddedLog, path: &Path) -> Vec<u8> {
    let bytes = fs::read(path).expect("readable");
    drop(log);
    fs::write(path, &bytes).expect("writable");
    bytes
}

#[test]
fn without_syncs_a_hole_that_a_loss_of_power_left_is_cut_and_not_damage() {
    let dir = TempDir::new().expect("temporary directory");
    let path = segment_path(dir.path(), 0);
    let log = open(dir.path(), &quick()).expect("opens");
    (0..4).for_each(|n| _ = append(&log, &[n.to_string().as_bytes()]).expect("kept"));
    let whole = kill(log, &path);
    let starts = frame_starts(&path);
    let mut holed = whole.clone();
    holed[starts[1]..starts[2]].fill(0);
    fs::write(&path, &holed).expect("writable");
    let log = open(dir.path(), &quick()).expect("a torn write is no damage");
    assert_eq!(read_all(&log, 0).expect("readable"), texts(0..1));
    // What is in it now was synced, and so is what a clean end leaves.
    append(&log, &[b"1"]).expect("kept");
    drop(log);
    let mut closed = fs::read(&path).expect("readable");
    closed[starts[1]..starts[2]].fill(0);
    fs::write(&path, &closed).expect("writable");
    assert!(matches!(open(dir.path(), &quick()), Err(LogOpenError::Corrupt(_))));
}

/// A tenant with a copy of the file may send it: after a crash it is a payload, wherever it was torn.
#[test]
fn a_payload_made_of_frames_of_this_very_file_is_never_taken_for_frames() {
    let dir = TempDir::new().expect("temporary directory");
    let path = segment_path(dir.path(), 0);
    let log = open(dir.path(), &config()).expect("opens");
    (0..4).for_each(|n| _ = append(&log, &[n.to_string().as_bytes()]).expect("kept"));
    let used = frame_starts(&path);
    let copied = fs::read(&path).expect("readable")[..used[4]].to_vec();
    append(&log, &[&copied]).expect("kept");
    append(&log, &[b"5"]).expect("kept");
    let whole = kill(log, &path);
    let starts = frame_starts(&path);
    for cut in (starts[4]..starts[6]).step_by(97) {
        fs::write(&path, &whole[..cut]).expect("writable");
        let log = open(dir.path(), &config()).expect("a torn end is no damage");
        let records = if cut < starts[5] { 4 } else { 5 };
        assert_eq!(log.next_offset(), records, "cut at {cut}");
        assert_eq!(read_all(&log, 0).expect("readable").len() as u64, records);
        drop(log);
    }
    // Its header is gone, what it carried is there, and a frame behind it vouches for it.
    let mut damaged = whole.clone();
    damaged[starts[4]] ^= 1;
    fs::write(&path, &damaged).expect("writable");
    let log = open(dir.path(), &accepting()).expect("opens");
    assert_eq!(read_all(&log, 0).expect("readable"), texts([0, 1, 2, 3, 5]));
    assert_eq!(log.lost_records(), 1);
}

#[test]
fn a_write_torn_at_any_byte_of_the_last_two_frames_loses_what_nobody_was_told_of_or_is_damage() {
    let dir = TempDir::new().expect("temporary directory");
    let (path, whole, starts) = short_log(dir.path(), 5);
    for cut in starts[3]..starts[4] {
        // Zeros from there on, or up to the frame behind, or up to the body of the frame behind.
        for end in [starts[5], starts[4], starts[4] + 64] {
            let mut torn = whole.clone();
            torn[cut..end].fill(0);
            if end == starts[4] + 64 {
                // The header behind is there, and its body is not.
                torn[starts[4]..end].copy_from_slice(&whole[starts[4]..end]);
                torn[end..starts[5]].fill(0);
            }
            fs::write(&path, &torn).expect("writable");
            let opened = open(dir.path(), &quick());
            if end == starts[5] {
                let log = opened.expect("a torn end is no damage");
                assert_eq!(read_all(&log, 0).expect("readable"), numbered(0..3), "cut at {cut}");
                continue;
            }
            assert!(
                matches!(opened, Err(LogOpenError::Corrupt(_))),
                "cut at {cut}: the frame behind vouches"
            );
            if cut % 8 > 0 {
                continue;
            }
            let log = open(dir.path(), &accepting()).expect("opens");
            let last = (end == starts[4]).then_some(4);
            assert_eq!(read_all(&log, 0).expect("readable"), texts((0..3).chain(last)), "cut at {cut}");
            assert_eq!((log.next_offset(), log.lost_records()), (if last.is_some() { 5 } else { 4 }, 1));
        }
    }
}

/// Of two commits that are under way when the power goes, the later may be whole and the earlier not.
#[test]
fn whatever_is_torn_of_two_commits_under_way_is_cut_and_nothing_else() {
    let dir = TempDir::new().expect("temporary directory");
    let (path, mut bytes, starts) = short_log(dir.path(), 5);
    let format = FrameFormat::of_segment(&SegmentHeader::decode(&bytes).expect("a segment"));
    let position = starts[4] as u64;
    let mut header = format.decode(&bytes[starts[4]..], position).expect("a frame");
    header.settled_position = starts[3] as u64;
    format.key().expect("keyed").seal(&mut bytes[starts[4]..starts[5]], &header, position);
    for torn in starts[3]..starts[5] {
        // All from there on is missing, or all from there to the end of its frame, or one bit is another.
        for case in 0..3 {
            let end = if case == 0 || torn >= starts[4] { starts[5] } else { starts[4] };
            let mut left = bytes.clone();
            match case {
                2 => left[torn] ^= 1 << (torn % 8),
                _ => left[torn..end].fill(0),
            }
            let is_whole =
                |nth: usize| left[starts[nth]..starts[nth + 1]] == bytes[starts[nth]..starts[nth + 1]];
            let records = 3 + (3..5).take_while(|nth| is_whole(*nth)).count() as u64;
            fs::write(&path, &left).expect("writable");
            let log = open(dir.path(), &quick()).expect("nobody was told of it: no damage");
            assert_eq!(
                read_all(&log, 0).expect("readable"),
                numbered(0..records),
                "torn at {torn}, case {case}"
            );
            assert_eq!(log.lost_records(), 0);
        }
    }
}

#[test]
fn what_an_abandoned_write_left_behind_is_not_taken_for_a_frame() {
    let dir = TempDir::new().expect("temporary directory");
    let (path, mut bytes, starts) = short_log(dir.path(), 4);
    let format = FrameFormat::of_segment(&SegmentHeader::decode(&bytes).expect("a segment"));
    // The frame before it was written later, and ends where this one begins.
    let position = starts[2] as u64;
    let mut header = format.decode(&bytes[starts[2]..], position).expect("a frame");
    header.write_number = 7;
    format.key().expect("keyed").seal(&mut bytes[starts[2]..starts[3]], &header, position);
    fs::write(&path, &bytes).expect("writable");
    let log = open(dir.path(), &config()).expect("opens");
    assert_eq!(read_all(&log, 0).expect("readable"), numbered(0..3));
    assert_eq!(append(&log, &[b"3"]).expect("kept").outcomes, [kept(3, 1)]);
    assert_eq!(read_all(&log, 0).expect("readable"), numbered(0..4));
}

#[test]
fn whatever_bit_flips_what_can_be_read_is_read_from_every_offset_and_the_rest_is_counted() {
    let dir = TempDir::new().expect("temporary directory");
    let (path, whole, starts) = short_log(dir.path(), 6);
    let bits = (0..64 * 8).chain(starts[0] * 8..starts[6] * 8);
    for bit in bits.step_by(11) {
        let (at, mut flipped) = (bit / 8, whole.clone());
        flipped[at] ^= 1 << (bit % 8);
        fs::write(&path, &flipped).expect("writable");
        let log = open(dir.path(), &accepting()).expect("opens");
        let frame = (0..6).find(|n| (starts[*n]..starts[n + 1]).contains(&at));
        for from in 0..log.next_offset() {
            let expected = texts((from..log.next_offset()).filter(|n| Some(*n) != frame.map(|n| n as u64)));
            assert_eq!(read_all(&log, from).expect("readable"), expected, "bit {bit} from {from}");
        }
        let cut = frame == Some(5);
        assert_eq!(log.next_offset(), if cut { 5 } else { 6 }, "bit {bit}");
        assert_eq!(log.lost_records(), u64::from(frame.is_some() && !cut), "bit {bit}");
        drop(log);
    }
}

/// Damage that appears while the log is open, so that no recovery has seen it.
#[test]
fn damage_that_a_reader_meets_first_stops_nobody_who_accepts_it() {
    let dir = TempDir::new().expect("temporary directory");
    let path = segment_path(dir.path(), 0);
    let log = open(dir.path(), &accepting()).expect("opens");
    let filler = vec![7; 1 << 20];
    (0..20).for_each(|_| _ = append(&log, &[&filler]).expect("kept"));
    let starts = frame_starts(&path);
    let mut bytes = fs::read(&path).expect("readable");
    bytes[starts[2] + 50] ^= 1;
    bytes[starts[3] + 500] ^= 1;
    fs::write(&path, &bytes).expect("writable");
    for from in 0..5 {
        let read: Vec<_> = read_all(&log, from).expect("readable").into_iter().map(|(n, _)| n).collect();
        assert_eq!(read, (from..20).filter(|n| ![2, 3].contains(n)).collect::<Vec<_>>(), "from {from}");
    }
    assert_eq!(log.lost_records(), 2);
}

#[test]
fn a_commit_of_many_frames_is_kept_whole_or_not_at_all() {
    let dir = TempDir::new().expect("temporary directory");
    let path = segment_path(dir.path(), 0);
    let log = open(dir.path(), &config()).expect("opens");
    append(&log, &[b"0"]).expect("kept");
    let large = vec![7; BATCH_BYTES_MAX / 3];
    let release = OnceId::of_exchange(1, 1);
    let mut first = section(&[b"1"], &Lease::new());
    first.keep_once(release);
    let sections = vec![first, section(&[&large[..]; 8], &Lease::new()), section(&[b"10"], &Lease::new())];
    let committed = log.append(sections, later()).blocking_recv().expect("answered").expect("kept");
    assert_eq!(committed.outcomes, [kept(1, 1), kept(2, 8), kept(10, 1)]);
    let read = |log: &EmbeddedLog| -> Vec<_> {
        read_all(log, 0).expect("readable").into_iter().map(|(n, payload)| (n, payload.len())).collect()
    };
    let all = read(&log);
    assert_eq!(all.iter().map(|(n, _)| *n).collect::<Vec<_>>(), (0..11).collect::<Vec<_>>());
    let whole = kill(log, &path);
    let starts = frame_starts(&path);
    assert!(starts.len() > 4, "several frames: {starts:?}");
    let log = open(dir.path(), &config()).expect("opens");
    assert_eq!(read(&log), all);
    drop(log);
    for cut in [
        starts[2] - 1,
        starts[2],
        starts[2] + 1,
        starts[starts.len() - 2],
        whole.len().min(starts[starts.len() - 1] - 1),
    ] {
        fs::write(&path, &whole[..cut]).expect("writable");
        let log = open(dir.path(), &config()).expect("a torn commit is no damage");
        assert_eq!(read_all(&log, 0).expect("readable"), numbered(0..1), "cut at {cut}");
        assert_eq!(append(&log, &[b"1"]).expect("kept").outcomes, [kept(1, 1)]);
        assert_eq!(read_all(&log, 0).expect("readable"), numbered(0..2));
        drop(log);
    }
}

/// One request of a hundred thousand lines under a long topic, each with a note, was a frame of 140 MB, which
/// no later start could read.
#[test]
fn a_request_of_many_noted_messages_under_a_long_topic_can_be_read_again() {
    let dir = TempDir::new().expect("temporary directory");
    let topic = ["x"; 512].join("/");
    let reason = QuarantineReason {
        keyword: "type".into(),
        pointer: "/value".into(),
        words: "w".repeat(400).into(),
        schema_version: 1,
    };
    let note = RecordNote::Quarantined(reason).encode();
    let mut noted = section(&[], &Lease::new());
    for _ in 0..100_000 {
        noted.push_noted(&topic, &[b'v'; 160], "application/x-ndjson", &[], RecordFlags::QUARANTINED, &note);
    }
    assert!(noted.weight() < 100_000 * (160 + note.len() + 20), "the topic is there once");
    let log = open(dir.path(), &config()).expect("opens");
    append(&log, &[b"before"]).expect("kept");
    let committed = log.append(vec![noted], later()).blocking_recv().expect("answered").expect("kept");
    assert_eq!(committed.outcomes, [kept(1, 100_000)]);
    drop(log);
    let log = open(dir.path(), &config()).expect("opens");
    let (mut next, mut records) = (0, 0);
    while next < log.next_offset() {
        let batches = log.read(next, 1 << 20).expect("readable");
        records += batches.iter().flat_map(Batch::records).filter(|record| record.topic == topic).count();
        next = batches.last().expect("there is more").next_offset();
    }
    assert_eq!((next, records), (100_001, 100_000));
}

#[test]
fn what_belongs_together_and_is_larger_than_a_frame_is_refused_before_it_is_kept() {
    let dir = TempDir::new().expect("temporary directory");
    let log = open(dir.path(), &config()).expect("opens");
    let large = vec![0; crate::limits::FRAME_PART_BYTES_MAX];
    let refused = log.append(vec![section(&[&large], &Lease::new())], later()).blocking_recv();
    assert!(matches!(refused, Ok(Err(AppendError::TooLarge { .. }))), "{refused:?}");
    assert_eq!(append(&log, &[b"0"]).expect("kept").outcomes, [kept(0, 1)]);
}

/// What the second version's headers say was trusted before their checksums were checked: one changed bit in
/// a length hid everything behind it from a reader that began there.
#[test]
fn whatever_bit_flips_in_a_log_of_version_2_the_rest_is_read_from_every_offset() {
    let frozen = copy_of("log-v2");
    let whole = fs::read(segment_path(frozen.path(), 0)).expect("readable");
    let format = FrameFormat::of_segment(&SegmentHeader::decode(&whole).expect("a segment"));
    let mut frames = Vec::new();
    let mut at = 32;
    while let Some(header) = format.decode(&whole[at..], at as u64) {
        let end = at + usize::try_from(header.frame_bytes()).expect("short");
        frames.push((at..end, header.first_offset..header.next_offset()));
        at = end;
    }
    let (seal, _) = frames.pop().expect("the frame of a clean shutdown");
    assert_eq!((frames.len(), at), (3, whole.len()));
    for bit in (32 * 8..seal.start * 8).step_by(7) {
        let dir = copy_of("log-v2");
        let mut flipped = whole.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        fs::write(segment_path(dir.path(), 0), &flipped).expect("writable");
        assert!(matches!(open(dir.path(), &quick()), Err(LogOpenError::Corrupt(_))), "bit {bit}");
        let log = open(dir.path(), &accepting()).expect("opens");
        let (_, lost) = frames.iter().find(|(bytes, _)| bytes.contains(&(bit / 8))).expect("in a frame");
        for from in 0..4 {
            let read: Vec<_> = read_all(&log, from).expect("readable").into_iter().map(|(n, _)| n).collect();
            let expected: Vec<_> = (from..4).filter(|n| !lost.contains(n)).collect();
            assert_eq!(read, expected, "bit {bit} from {from}");
        }
        assert_eq!((log.next_offset(), log.lost_records()), (4, lost.end - lost.start), "bit {bit}");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Append(Vec<Vec<u8>>),
    Reopen,
    /// A kill in the middle of an append, of which so much is on the disk.
    Torn(Vec<Vec<u8>>, prop::sample::Index),
    /// A changed bit in a copy of the log.
    Flip(prop::sample::Index, u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let payloads = || prop::collection::vec(prop::collection::vec(any::<u8>(), 0..1500), 1..4);
    let step = prop_oneof![
        6 => payloads().prop_map(Step::Append),
        1 => Just(Step::Reopen),
        2 => (payloads(), any::<prop::sample::Index>()).prop_map(|(p, at)| Step::Torn(p, at)),
        3 => (any::<prop::sample::Index>(), 0..8_u8).prop_map(|(at, bit)| Step::Flip(at, bit)),
    ];
    prop::collection::vec(step, 1..24)
}

fn append_all(log: &EmbeddedLog, payloads: &[Vec<u8>]) {
    append(log, &payloads.iter().map(Vec::as_slice).collect::<Vec<_>>()).expect("kept");
}

/// The newest segment and its bytes, without the room behind them.
fn newest(dir: &Path) -> (PathBuf, Vec<u8>) {
    let files = fs::read_dir(dir.join("log")).expect("listable").map(|entry| entry.expect("an entry").path());
    let segments = files.filter(|path| path.extension().is_some_and(|name| name == "log"));
    let path = segments.max().expect("a segment");
    let mut bytes = fs::read(&path).expect("readable");
    let starts = frame_starts(&path);
    bytes.truncate(starts[starts.len() - 1]);
    (path, bytes)
}

/// A changed bit in the newest segment takes the records of its frame, and no other.
fn check_flip(dir: &Path, model: &[Vec<u8>], at: prop::sample::Index, bit: u8) {
    let (path, mut bytes) = newest(dir);
    let header = SegmentHeader::decode(&bytes).expect("a segment");
    let format = FrameFormat::of_segment(&header);
    if bytes.len() == header.header_bytes() {
        return;
    }
    let at = header.header_bytes() + at.index(bytes.len() - header.header_bytes());
    let starts = frame_starts(&path);
    let hit = starts.partition_point(|start| *start <= at) - 1;
    let frame = format.decode(&bytes[starts[hit]..], starts[hit] as u64).expect("a frame");
    bytes[at] ^= 1 << bit;
    let copy = TempDir::new().expect("temporary directory");
    fs::create_dir(copy.path().join("log")).expect("made");
    for entry in fs::read_dir(dir.join("log")).expect("listable") {
        let name = entry.expect("an entry").file_name();
        fs::copy(dir.join("log").join(&name), copy.path().join("log").join(&name)).expect("copied");
    }
    fs::write(copy.path().join("log").join(path.file_name().expect("a name")), &bytes).expect("written");
    let is_last = starts.len() == hit + 2;
    assert_eq!(open(copy.path(), &small()).is_ok(), is_last, "damage is refused, a torn end is not");
    let log = open(copy.path(), &config::LogConfig { accept_corruption: true, ..small() }).expect("opens");
    let lost = frame.first_offset..frame.next_offset();
    let end = if is_last { lost.start } else { model.len() as u64 };
    assert_eq!(log.next_offset(), end);
    for from in [0, lost.start.saturating_sub(1), lost.start, lost.end.min(end), end] {
        let expected: Vec<_> = (from..end)
            .filter(|n| !lost.contains(n))
            .map(|n| (n, model[usize::try_from(n).expect("few")].clone()))
            .collect();
        assert!(read_all(&log, from).expect("readable") == expected, "from {from}, without {lost:?}");
    }
    assert_eq!(log.lost_records(), if is_last { 0 } else { lost.end - lost.start });
}

fn small() -> config::LogConfig {
    config::LogConfig { segment_bytes: 16 << 10, retention_bytes: 1 << 30, ..config() }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn the_log_behaves_as_a_vector_whatever_is_torn_and_whatever_bit_flips(steps in steps()) {
        let dir = TempDir::new().expect("temporary directory");
        let mut log = open(dir.path(), &small()).expect("opens");
        let mut model: Vec<Vec<u8>> = Vec::new();
        for step in steps {
            match step {
                Step::Append(payloads) => {
                    append_all(&log, &payloads);
                    model.extend(payloads);
                }
                Step::Reopen => {
                    drop(log);
                    log = open(dir.path(), &small()).expect("opens");
                }
                Step::Torn(payloads, at) => {
                    let (path, before) = newest(dir.path());
                    append_all(&log, &payloads);
                    let (torn, mut after) = newest(dir.path());
                    drop(log);
                    let written = if torn == path { before.len() } else { super::super::segment::SEGMENT_HEADER_BYTES };
                    after.truncate(written + at.index(after.len() - written));
                    fs::write(&torn, after).expect("writable");
                    // Where the clean end found no room, it has begun another segment.
                    let (last, _) = newest(dir.path());
                    if last != torn {
                        fs::remove_file(last).expect("removable");
                    }
                    log = open(dir.path(), &small()).expect("a torn end is no damage");
                }
                Step::Flip(at, bit) => check_flip(dir.path(), &model, at, bit),
            }
            let expected: Vec<_> = (0..).zip(&model).map(|(n, payload)| (n, payload.clone())).collect();
            prop_assert!(read_all(&log, 0).expect("readable") == expected);
        }
    }
}
