//! The versions of the format: older ones are read for ever, newer ones are refused and left alone.

use super::*;

#[test]
fn a_format_of_the_future_is_refused_and_left_alone() {
    let dir = TempDir::new().expect("temporary directory");
    let path = killed_after(dir.path(), 1);
    let mut bytes = fs::read(&path).expect("readable");
    let copies = [0, super::super::segment::SEGMENT_HEADER_BYTES / 2];
    copies.iter().for_each(|at| bytes[at + 8] = 4);
    fs::write(&path, &bytes).expect("writable");
    // Also when it has no frame yet.
    for bytes in [&bytes[..], &bytes[..super::super::segment::SEGMENT_HEADER_BYTES]] {
        fs::write(&path, bytes).expect("writable");
        let Err(LogOpenError::Corrupt(text)) = open(dir.path(), &config()) else { panic!("opened") };
        assert!(text.contains("format"), "{text}");
        assert_eq!(fs::read(&path).expect("readable"), bytes);
    }
}

/// A copy of a frozen log of one segment.
pub(super) fn copy_of(fixture: &str) -> TempDir {
    let frozen = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(fixture);
    let dir = TempDir::new().expect("temporary directory");
    fs::create_dir(dir.path().join("log")).expect("made");
    let name = "log/00000000000000000000.log";
    fs::copy(frozen.join(name), dir.path().join(name)).expect("copied");
    dir
}

/// Version 1, written on 2026-11-23: three records, sealed. Every later version has to read it.
#[test]
fn a_log_of_version_1_is_still_read() {
    let dir = copy_of("log-v1");
    let log = open(dir.path(), &config()).expect("opens");
    let batches = log.read(0, 1 << 20).expect("readable");
    let records: Vec<_> = batches
        .iter()
        .flat_map(|batch| batch.records())
        .map(|r| (r.offset, r.datasource, r.topic, r.payload, r.content_type, r.transport))
        .collect();
    assert_eq!(
        records,
        [
            (0, "press-4", "spindle/temp", &b"{\"value\": 21.5}"[..], "application/json", Transport::Http),
            (1, "press-4", "spindle/temp", &b"21.6"[..], "", Transport::Mqtt),
            (2, "press-4", "camera", &b"\xff\xd8"[..], "image/jpeg", Transport::Http),
        ]
    );
    assert!(batches.iter().all(|batch| batch.has_retained()), "version 1 does not say which");
}

/// Version 2, written on 2026-11-23: a commit of two sections, one of a QoS 2 message, its release,
/// and the seal. Every later version has to read it.
#[test]
fn a_log_of_version_2_is_still_read() {
    let dir = copy_of("log-v2");
    let log = open(dir.path(), &config()).expect("opens");
    let batches = log.read(0, 1 << 20).expect("readable");
    let json = "application/json";
    let records: Vec<_> = batches
        .iter()
        .flat_map(|batch| batch.records())
        .map(|r| (r.offset, r.datasource, r.topic, r.payload, r.content_type, r.publisher, r.flags))
        .collect();
    let plain = RecordFlags::default();
    assert_eq!(
        records,
        [
            (0, "press-4", "spindle/temp", &b"{\"value\": 21.5}"[..], json, 0, plain),
            (1, "press-4", "spindle/temp", &b"{\"value\": 21.6}"[..], json, 0, plain),
            (2, "oven", "camera", &b"\xff\xd8"[..], "image/jpeg", 77, RecordFlags::RETAIN),
            (3, "press-4", "count", &b"1"[..], "", u64::MAX, RecordFlags::WILL),
        ]
    );
    let last = batches.iter().flat_map(|batch| batch.records()).last().expect("records");
    assert_eq!((last.properties, last.transport), (&[1, 1][..], Transport::Mqtt));
    assert_eq!((last.key_id, last.received_at), (KeyId([9; 6]), 1_795_426_119_000_002));
    assert_eq!(batches.iter().map(Batch::has_retained).collect::<Vec<_>>(), [true, false]);

    // Its once part, whose ids may have expired.
    let message = |id| OnceId::of_message(&DatasourceId::new("press-4").expect("slug"), id);
    let (mut kept, mut released) = (Vec::new(), Vec::new());
    let path = super::super::segment::Segment::path_of(&dir.path().join("log"), 0);
    let segment = super::super::segment::Segment::open(&FileSystem, &path).expect("opens");
    let mut frames = 0;
    let mut entered = Vec::new();
    let visit = &mut |frame: Option<Batch>| {
        let batch = frame.expect("nothing is missing");
        let once = batch.once().expect("a frame that has a once part");
        assert_eq!(once.open().map(Iterator::count), (frames == 0).then_some(0));
        kept.extend(batch.sections().flat_map(|section| section.once()));
        released.extend(once.releases());
        entered.push(once.stamp.entered);
        frames += 1;
        true
    };
    segment.visit_once(visit).expect("readable");
    assert_eq!(frames, 4);
    assert_eq!(entered, [0, 1, 2, 2]);
    assert_eq!(kept, [message("1"), OnceId::of_exchange(1, 1), message("2")]);
    assert_eq!(released, [(0, OnceId::of_exchange(1, 1))]);
}

/// Version 3, written on 2026-11-29: what version 2 has, and a topic that records share. Every later version
/// has to read it.
#[test]
fn a_log_of_version_3_is_still_read() {
    let dir = copy_of("log-v3");
    let log = open(dir.path(), &config()).expect("opens");
    let batches = log.read(0, 1 << 20).expect("readable");
    let json = "application/json";
    let records: Vec<_> = batches
        .iter()
        .flat_map(|batch| batch.records())
        .map(|r| (r.offset, r.datasource, r.topic, r.payload, r.content_type, r.publisher, r.flags))
        .collect();
    let plain = RecordFlags::default();
    assert_eq!(
        records,
        [
            (0, "press-4", "spindle/temp", &b"{\"value\": 21.5}"[..], json, 0, plain),
            (1, "press-4", "spindle/temp", &b"{\"value\": 21.6}"[..], json, 0, plain),
            (2, "press-4", "spindle/temp", &b"21.7"[..], "", 0, plain),
            (3, "oven", "camera", &b"\xff\xd8"[..], "image/jpeg", 77, RecordFlags::RETAIN),
            (4, "press-4", "count", &b"x"[..], "", 0, RecordFlags::QUARANTINED),
            (5, "press-4", "count", &b"1"[..], "", u64::MAX, RecordFlags::WILL),
        ]
    );
    let notes: Vec<_> = batches.iter().flat_map(|batch| batch.records()).map(|r| r.note.len()).collect();
    assert_eq!(notes, [0, 0, 0, 0, 21, 0]);
    let last = batches.iter().flat_map(|batch| batch.records()).last().expect("records");
    assert_eq!((last.properties, last.transport), (&[1, 1][..], Transport::Mqtt));
    assert_eq!((last.key_id, last.received_at), (KeyId([9; 6]), 1_795_900_000_000_002));
    assert_eq!(batches.iter().map(Batch::has_retained).collect::<Vec<_>>(), [true, false]);
    let path = super::super::segment::Segment::path_of(&dir.path().join("log"), 0);
    assert_eq!(frame_starts(&path).len(), 5, "two commits, a release and the seal");
}

#[test]
fn a_log_of_version_1_goes_on_in_a_segment_of_the_newest_version() {
    let dir = copy_of("log-v1");
    let path = |first_offset| super::super::segment::Segment::path_of(&dir.path().join("log"), first_offset);
    let frozen = fs::read(path(0)).expect("readable");
    for opened in 0..2 {
        let log = open(dir.path(), &config()).expect("opens");
        assert_eq!(append(&log, &[b"new"]).expect("kept").outcomes, [kept(3 + opened, 1)]);
        let read = read_all(&log, 0).expect("readable");
        let last = read.last().expect("records");
        assert_eq!((read.len() as u64, last), (4 + opened, &(3 + opened, b"new".to_vec())));
    }
    assert_eq!(fs::read(path(0)).expect("readable"), frozen, "what is of version 1 is left alone");
    assert_eq!(fs::read(path(3)).expect("readable")[8..10], [3, 0]);
}

#[test]
fn a_segment_of_version_1_without_records_becomes_one_of_the_newest() {
    let dir = copy_of("log-v1");
    let path = super::super::segment::Segment::path_of(&dir.path().join("log"), 0);
    // Only a header, as a kill leaves a segment right after it was made.
    let frozen = fs::read(&path).expect("readable");
    fs::write(&path, &frozen[..32]).expect("writable");
    let log = open(dir.path(), &config()).expect("opens");
    assert_eq!(append(&log, &[b"0"]).expect("kept").outcomes, [kept(0, 1)]);
    drop(log);
    assert_eq!(fs::read(&path).expect("readable")[8..10], [3, 0]);
    let log = open(dir.path(), &config()).expect("opens");
    assert_eq!(read_all(&log, 0).expect("readable"), numbered(0..1));
}

#[test]
fn a_frame_with_a_flag_of_the_future_is_refused_also_at_the_end_and_left_alone() {
    let dir = TempDir::new().expect("temporary directory");
    let path = killed_after(dir.path(), 2);
    let starts = frame_starts(&path);
    let whole = fs::read(&path).expect("readable");
    let format = FrameFormat::of_segment(&SegmentHeader::decode(&whole).expect("a segment"));
    for frame in [starts[0]..starts[1], starts[1]..starts[2]] {
        let mut newer = whole.clone();
        let position = frame.start as u64;
        let mut header = format.decode(&newer[frame.clone()], position).expect("a frame");
        header.flags = header.flags.with(FrameFlags::from_bits(1 << 20));
        format.key().expect("keyed").seal(&mut newer[frame], &header, position);
        fs::write(&path, &newer).expect("writable");
        for accept_corruption in [false, true] {
            let config = config::LogConfig { accept_corruption, ..config() };
            let Err(LogOpenError::Corrupt(text)) = open(dir.path(), &config) else { panic!("opened") };
            assert!(text.contains("does not know"), "{text}");
        }
        assert_eq!(fs::read(&path).expect("readable"), newer);
        fs::write(&path, &whole).expect("writable");
    }
}
