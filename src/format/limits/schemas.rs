//! JSON Schemas, those that are inferred, and quarantine.

/// One JSON Schema, as compact JSON.
pub const SCHEMA_BYTES_MAX: usize = 32 << 10;
/// How deep a JSON Schema nests.
pub const SCHEMA_DEPTH_MAX: usize = 32;
/// Nodes of a JSON Schema with all its references expanded: what one value is checked against at
/// most.
pub const SCHEMA_NODES_MAX: usize = 20_000;
/// The compiled size of one pattern of a JSON Schema.
pub const SCHEMA_REGEX_BYTES_MAX: usize = 1 << 20;
/// Schemas of one datasource, each for a topic filter.
pub const SCHEMA_RULES_MAX: usize = 64;
/// The reason text of a quarantined message, and its JSON pointer.
pub const REASON_BYTES_MAX: usize = 512;
/// Invalid messages that an HTTP answer names; it counts all of them.
pub const VALIDATION_ERRORS_MAX: usize = 100;
/// Leaked-key quarantines and their reversals, in all.
pub const LEAK_CHANGES_MAX: u64 = 10_000;
/// Records, the newest ones, that a schema is inferred from.
pub const INFERENCE_RECORDS_MAX: usize = 5_000;
/// Approximate payload bytes of those records.
pub const INFERENCE_BYTES_MAX: usize = 8 << 20;
/// Topics that each get their own inferred schema.
pub const INFERENCE_TOPICS_MAX: usize = 50;
/// How deep an inferred schema nests.
pub const INFERENCE_DEPTH_MAX: usize = 8;
/// Members of objects that an inferred schema names.
pub const INFERENCE_PARTS_MAX: usize = 1_000;
/// An object member's name in an inferred schema.
pub const INFERENCE_KEY_BYTES_MAX: usize = 128;
/// A payload shown as an example.
pub const INFERENCE_EXAMPLE_BYTES_MAX: usize = 16 << 10;
/// Quarantined messages that are redriven in one draft.
pub const REDRIVE_PAGE_RECORDS: usize = 500;
/// Quarantined messages that one redrive request handles, approximately.
pub const REDRIVE_RECORDS_MAX: u64 = 100_000;
/// A request that sets the schemas of a datasource.
pub const HTTP_SCHEMAS_BYTES_MAX: usize = 1 << 20;
