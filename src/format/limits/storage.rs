//! What stores write at a time, and their retention.

use std::time::Duration;

/// What the remembered row ids of datasources, topics and origins take in memory, about. Beyond that, all are forgotten and
/// read again: clients may invent topics without end.
pub const REMEMBERED_NAMES_BYTES_MAX: usize = 32 << 20;
/// What one of them takes beside its text.
pub const REMEMBERED_NAME_BYTES: usize = 64;
/// Sets of keys that the samples of a topic have in PostgreSQL; beyond that, each row of samples has its keys itself, which go
/// with it.
pub const POSTGRES_KEY_SETS_PER_TOPIC_MAX: i64 = 64;
/// Bytes of rows that are made while those before them are copied into PostgreSQL, ...
pub const POSTGRES_COPY_BYTES: usize = 2 << 20;
/// ... how many records they are of, ...
pub const POSTGRES_COPY_RECORDS_MAX: usize = 4096;
/// ... and how many times that may be on its way.
pub const POSTGRES_COPIES_UNDER_WAY_MAX: usize = 2;
/// What records that wait for their commit in a Delta lake take in memory, about: so much is collected while as much is made
/// into files.
pub const LAKE_LOT_BYTES: usize = 32 << 20;
/// Columns of values in a Delta lake, for all datasources.
pub const LAKE_VALUE_COLUMNS_MAX: usize = 1_000;
/// Columns of values that one datasource brings into a Delta lake.
pub const LAKE_VALUE_COLUMNS_OF_ONE_MAX: usize = 100;
/// The name of a member that gets a column in a Delta lake.
pub const LAKE_VALUE_NAME_BYTES_MAX: usize = 128;
/// A string that stands in a column of a Delta lake.
pub const LAKE_VALUE_BYTES_MAX: usize = 256;
/// Stored records that one transaction of retention removes: storage goes on in between.
pub const PRUNE_RECORDS_PER_TRANSACTION: usize = 2_000;
/// The same in PostgreSQL, ...
pub const POSTGRES_PRUNE_RECORDS_PER_TRANSACTION: usize = 5_000;
/// ... where what a datasource takes is counted so many records at a time.
pub const POSTGRES_COUNT_RECORDS_PER_STEP: i64 = 50_000;
/// Topics whose samples one transaction of retention takes out of what they share with later ones.
pub const TRIM_TOPICS_PER_TRANSACTION: u32 = 64;
/// How often that is done: samples may outlive their records by so much.
pub const TRIM_INTERVAL: Duration = Duration::from_secs(30);
/// Free pages of `records.db` that are given back to the file system at a time.
pub const PRUNE_PAGES_PER_TRANSACTION: i64 = 256;
/// Free pages of `records.db` that stay for later records, of 4 KiB each; of a large one, a sixteenth of its pages.
pub const FREE_PAGES_KEPT: i64 = 1024;
/// What a stored record takes beside its payload, approximately, as the limit `stored_bytes` counts it.
pub const STORED_RECORD_BYTES: u64 = 64;
/// What a stored topic or media type takes beside twice its text: it is in a table and in an index. ...
pub const STORED_NAME_BYTES: u64 = 64;
/// ... So much of all of a datasource's is not counted: what records of a few hundred topics share.
pub const STORED_NAMES_FREE_BYTES: u64 = 64 << 10;
/// Offsets for which a second use of an origin is noted: it goes when so many more are gone that it cannot have been used in.
pub const ORIGIN_USE_OFFSETS: u64 = 64 << 10;
/// Origins without a datasource that are removed at a time.
pub const PRUNE_ORIGINS_PER_TRANSACTION: i64 = 10_000;
/// How often is looked at what is over the limits of what is stored, ...
pub const RETENTION_INTERVAL: Duration = Duration::from_secs(1);
/// ... and how long that may take at a time while storage has nothing else to do.
pub const RETENTION_TURN_MAX: Duration = Duration::from_millis(20);
/// JSON keys that `latest` stores per topic.
pub const LATEST_KEYS_PER_TOPIC_MAX: usize = 256;
/// One JSON key that `latest` stores.
pub const LATEST_KEY_BYTES_MAX: usize = 256;
/// Numbers of one payload that become samples. Enough for a wide reading; more would make one message cost what hundreds do.
pub const SAMPLES_PER_RECORD_MAX: usize = 256;
/// Bytes of a sample's key, with the names of the objects that it is in.
pub const SAMPLE_KEY_BYTES_MAX: usize = LATEST_KEY_BYTES_MAX;
/// Topics and keys whose samples or newest values one transaction of storage gathers before it writes them: what clients
/// invent must not take more memory than that.
pub const GATHERED_KEYS_MAX: usize = 32 << 10;
/// Objects inside of the outermost one whose numbers become samples.
pub const SAMPLE_DEPTH_MAX: usize = 8;
/// Bytes of the JSON pointer to an event time.
pub const EVENT_TIME_POINTER_BYTES_MAX: usize = 256;
/// Bytes of an event time that is said with a request.
pub const EVENT_TIME_TEXT_BYTES_MAX: usize = 64;
/// Parts of the JSON pointer to an event time: each is a scan of what it is in.
pub const EVENT_TIME_POINTER_PARTS_MAX: usize = 8;
/// The largest distance between event time and receipt that a datasource may ask for, in seconds: 100 years.
pub const EVENT_TIME_SKEW_S_MAX: u64 = 100 * 366 * 24 * 3_600;
