//! Reads MQTT's data types (section 1.5) from a packet's body; reading past its end is an error.

use super::Violation;

/// A position in a packet's body.
#[derive(Clone)]
pub struct PacketReader<'a> {
    rest: &'a [u8],
}

const CUT_SHORT: Violation = Violation::malformed("the packet ends before its content does");

impl<'a> PacketReader<'a> {
    #[inline]
    pub fn new(body: &'a [u8]) -> Self {
        Self { rest: body }
    }

    #[inline]
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// The bytes that are left.
    #[inline]
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    #[inline]
    pub fn bytes(&mut self, n: usize) -> Result<&'a [u8], Violation> {
        let (bytes, rest) = self.rest.split_at_checked(n).ok_or(CUT_SHORT)?;
        self.rest = rest;
        Ok(bytes)
    }

    #[inline]
    pub fn u8(&mut self) -> Result<u8, Violation> {
        let (&byte, rest) = self.rest.split_first().ok_or(CUT_SHORT)?;
        self.rest = rest;
        Ok(byte)
    }

    #[inline]
    pub fn u16(&mut self) -> Result<u16, Violation> {
        let (bytes, rest) = self.rest.split_first_chunk().ok_or(CUT_SHORT)?;
        self.rest = rest;
        Ok(u16::from_be_bytes(*bytes))
    }

    pub fn u32(&mut self) -> Result<u32, Violation> {
        let (bytes, rest) = self.rest.split_first_chunk().ok_or(CUT_SHORT)?;
        self.rest = rest;
        Ok(u32::from_be_bytes(*bytes))
    }

    /// A packet identifier, which is never 0.
    #[inline]
    pub fn packet_id(&mut self) -> Result<u16, Violation> {
        match self.u16()? {
            0 => Err(Violation::malformed("a packet identifier cannot be 0")),
            id => Ok(id),
        }
    }

    /// A variable byte integer, which must take no more bytes than it needs (section 1.5.5).
    #[inline]
    pub fn varint(&mut self) -> Result<u32, Violation> {
        let mut value = 0;
        for i in 0..4 {
            let byte = self.u8()?;
            value |= u32::from(byte & 0x7f) << (7 * i);
            if byte & 0x80 == 0 {
                if byte == 0 && i > 0 {
                    return Err(Violation::malformed(
                        "a variable byte integer takes more bytes than it needs",
                    ));
                }
                return Ok(value);
            }
        }
        Err(Violation::malformed("a variable byte integer takes more than four bytes"))
    }

    /// Length-prefixed binary data.
    #[inline]
    pub fn binary(&mut self) -> Result<&'a [u8], Violation> {
        let n = self.u16()?;
        self.bytes(usize::from(n))
    }

    /// Length-prefixed text: UTF-8 without U+0000 (section 1.5.4).
    #[inline]
    pub fn text(&mut self) -> Result<&'a str, Violation> {
        let bytes = self.binary()?;
        if bytes.contains(&0) {
            return Err(Violation::malformed("a text holds the character U+0000"));
        }
        std::str::from_utf8(bytes).map_err(|_| Violation::malformed("a text is not UTF-8"))
    }

    /// Checks that the packet ends here.
    pub fn expect_end(&self) -> Result<(), Violation> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(Violation::malformed("the packet has bytes after its content"))
        }
    }
}
