//! Rows in the format of `COPY … WITH (FORMAT binary)`
//! (<https://www.postgresql.org/docs/current/sql-copy.html>, "Binary Format").
//!
//! A row is a number of fields, and each field its length and its bytes. Lengths are 32 bits: a field has less than 1 GiB
//! in any case, because PostgreSQL takes no longer one.

use bytes::{BufMut, Bytes, BytesMut};

use crate::time::timestamp_of;

/// What every copy begins with: the signature, no flags, no extension.
const COPY_HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
/// What every copy ends with: a row of -1 fields.
const COPY_TRAILER: i16 = -1;
/// About how many bytes are sent at once.
const COPY_PIECE_BYTES: usize = 256 << 10;
/// What an array of one dimension has before its elements.
const ARRAY_HEADER_BYTES: usize = 20;
/// The type `double precision`.
const FLOAT8_OID: u32 = 701;
/// The type `text`.
const TEXT_OID: u32 = 25;
/// The version of `jsonb`'s binary form.
const JSONB_VERSION: u8 = 1;

/// Rows that are to be copied into a table, encoded.
pub struct CopyRows {
    /// The bytes that are full pieces.
    pieces: Vec<Bytes>,
    open: BytesMut,
    rows: u64,
    /// Bytes of the full pieces.
    full_bytes: usize,
}

impl Default for CopyRows {
    fn default() -> Self {
        Self::new()
    }
}

impl CopyRows {
    /// No rows yet.
    pub fn new() -> Self {
        let mut open = BytesMut::with_capacity(COPY_PIECE_BYTES + 4096);
        open.put_slice(COPY_HEADER);
        Self { pieces: Vec::new(), open, rows: 0, full_bytes: 0 }
    }

    /// How many rows there are.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// How many bytes they take.
    pub fn size_bytes(&self) -> usize {
        self.full_bytes + self.open.len()
    }

    /// Begins the next row. As many fields have to follow.
    pub fn begin(&mut self, fields: i16) {
        if self.open.len() >= COPY_PIECE_BYTES {
            self.full_bytes += self.open.len();
            self.pieces.push(self.open.split().freeze());
            self.open.reserve(COPY_PIECE_BYTES + 4096);
        }
        self.open.put_i16(fields);
        self.rows += 1;
    }

    /// `NULL`.
    pub fn null(&mut self) {
        self.open.put_i32(-1);
    }

    /// `smallint`.
    pub fn int2(&mut self, value: i16) {
        self.open.put_i32(2);
        self.open.put_i16(value);
    }

    /// `integer`.
    pub fn int4(&mut self, value: i32) {
        self.open.put_i32(4);
        self.open.put_i32(value);
    }

    /// `bigint`.
    pub fn int8(&mut self, value: i64) {
        self.open.put_i32(8);
        self.open.put_i64(value);
    }

    /// `double precision`.
    pub fn float8(&mut self, value: f64) {
        self.open.put_i32(8);
        self.open.put_f64(value);
    }

    /// `double precision[]`, of one dimension.
    pub fn float8_array(&mut self, values: impl ExactSizeIterator<Item = f64>) {
        let count = values.len();
        self.array_header(FLOAT8_OID, count, 12 * count);
        for value in values {
            self.float8(value);
        }
    }

    /// `text[]`, of one dimension. No text may have a NUL.
    pub fn text_array<'t>(&mut self, values: impl ExactSizeIterator<Item = &'t str> + Clone) {
        let bytes = values.clone().map(|value| 4 + value.len()).sum();
        self.array_header(TEXT_OID, values.len(), bytes);
        for value in values {
            self.bytes(value.as_bytes());
        }
    }

    /// What an array has before its elements, which take `bytes` with their lengths.
    fn array_header(&mut self, element_oid: u32, count: usize, bytes: usize) {
        self.open.put_i32(length(ARRAY_HEADER_BYTES + bytes));
        // Dimensions, whether there is a NULL, the type of an element; how many there are, the number of the first.
        self.open.put_i32(1);
        self.open.put_i32(0);
        self.open.put_u32(element_oid);
        self.open.put_i32(length(count));
        self.open.put_i32(1);
    }

    /// `timestamptz`, from microseconds since the Unix epoch. One that is beyond PostgreSQL's calendar is its nearest.
    pub fn timestamptz(&mut self, unix_us: i64) {
        self.int8(timestamp_of(unix_us));
    }

    /// `bytea`, and the bytes of `text` and `json`, which may have no NUL.
    pub fn bytes(&mut self, value: &[u8]) {
        self.open.put_i32(length(value.len()));
        self.open.put_slice(value);
    }

    /// `jsonb`, from its text.
    pub fn jsonb(&mut self, text: &str) {
        self.open.put_i32(length(text.len() + 1));
        self.open.put_u8(JSONB_VERSION);
        self.open.put_slice(text.as_bytes());
    }

    /// All of it, with its end, in pieces that are sent one after the other.
    pub(crate) fn into_pieces(mut self) -> Vec<Bytes> {
        self.open.put_i16(COPY_TRAILER);
        self.pieces.push(self.open.freeze());
        self.pieces
    }
}

fn length(bytes: usize) -> i32 {
    // What is longer is refused by the server, which takes less than 1 GiB.
    i32::try_from(bytes).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_as_the_format_says() {
        let mut rows = CopyRows::new();
        rows.begin(3);
        rows.int8(7);
        rows.null();
        rows.jsonb("1");
        let bytes = rows.into_pieces().concat();
        let expected = [
            COPY_HEADER,
            &[0, 3, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 7, 255, 255, 255, 255, 0, 0, 0, 2, 1, b'1', 255, 255],
        ];
        assert_eq!(bytes, expected.concat());
    }

    #[test]
    fn an_array_has_its_shape_before_its_elements() {
        let mut rows = CopyRows::new();
        rows.begin(1);
        rows.float8_array([1.5, -0.0].into_iter());
        let bytes = rows.into_pieces().concat();
        let array = &bytes[COPY_HEADER.len() + 2..bytes.len() - 2];
        assert_eq!(array[..4], 44_i32.to_be_bytes());
        assert_eq!(array[4..24], [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 189, 0, 0, 0, 2, 0, 0, 0, 1]);
        assert_eq!(array[24..36], [&8_i32.to_be_bytes()[..], &1.5_f64.to_be_bytes()].concat());
        assert_eq!(array.len(), 48);
    }

    #[test]
    fn texts_of_an_array_have_their_lengths_before_them() {
        let mut rows = CopyRows::new();
        rows.begin(1);
        rows.text_array(["a", "rpm"].into_iter());
        let bytes = rows.into_pieces().concat();
        let array = &bytes[COPY_HEADER.len() + 2..bytes.len() - 2];
        assert_eq!(array[..4], 32_i32.to_be_bytes());
        assert_eq!(array[4..24], [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 25, 0, 0, 0, 2, 0, 0, 0, 1]);
        assert_eq!(array[24..], [0, 0, 0, 1, b'a', 0, 0, 0, 3, b'r', b'p', b'm']);
    }

    #[test]
    fn many_rows_come_in_pieces() {
        let mut rows = CopyRows::new();
        for _ in 0..10_000 {
            rows.begin(1);
            rows.bytes(&[b'x'; 100]);
        }
        assert_eq!(rows.rows(), 10_000);
        let size = rows.size_bytes();
        let pieces = rows.into_pieces();
        assert_eq!(pieces.iter().map(Bytes::len).sum::<usize>(), size + 2);
        assert!(pieces.len() > 3 && pieces.iter().all(|piece| piece.len() < COPY_PIECE_BYTES + 4096));
    }
}
