//! JSON as Go's `encoding/json` writes it: no blanks, and `<`, `>`, `&`, U+2028 and U+2029 escaped.

use serde::Serialize;
use serde_json::ser::{CharEscape, CompactFormatter, Formatter};
use std::io;

struct GoFormatter;

impl Formatter for GoFormatter {
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let mut plain = 0;
        for (at, c) in fragment.char_indices() {
            if matches!(c, '<' | '>' | '&' | '\u{2028}' | '\u{2029}') {
                writer.write_all(&fragment.as_bytes()[plain..at])?;
                write!(writer, "\\u{:04x}", c as u32)?;
                plain = at + c.len_utf8();
            }
        }
        writer.write_all(&fragment.as_bytes()[plain..])
    }

    fn write_char_escape<W: ?Sized + io::Write>(&mut self, writer: &mut W, escape: CharEscape) -> io::Result<()> {
        CompactFormatter.write_char_escape(writer, escape)
    }
}

/// The canonical bytes of `value`. Key order is the order of the struct's fields; maps must be sorted (`BTreeMap`).
pub fn to_canonical_json<T: Serialize>(value: &T) -> Vec<u8> {
    let mut out = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, GoFormatter);
    // Writing to memory cannot fail, and the types of this module have string keys only.
    value.serialize(&mut serializer).expect("OCI documents serialise to JSON");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_those_of_go() {
        let got = to_canonical_json(&"a<b>&\u{2028}\u{2029}\"\\/\n\t\u{8}\u{c}\r\u{1}\u{7f}é");
        assert_eq!(
            String::from_utf8(got).unwrap(),
            "\"a\\u003cb\\u003e\\u0026\\u2028\\u2029\\\"\\\\/\\n\\t\\b\\f\\r\\u0001\u{7f}é\""
        );
    }
}
