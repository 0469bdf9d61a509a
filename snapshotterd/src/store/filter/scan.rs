//! The lexical level of the filter language.

use std::{iter::Peekable, str::CharIndices};

type Problem = (usize, String);

pub(super) struct Scanner<'a> {
    text: &'a str,
    rest: Peekable<CharIndices<'a>>,
}

impl<'a> Scanner<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self {
            text,
            rest: text.char_indices().peekable(),
        }
    }

    /// Where the next character is.
    pub(super) fn offset(&mut self) -> usize {
        self.rest
            .peek()
            .map_or(self.text.len(), |(offset, _)| *offset)
    }

    /// The next character that is not white space; white space before it is consumed.
    pub(super) fn peek(&mut self) -> Option<char> {
        while self.rest.next_if(|(_, c)| c.is_whitespace()).is_some() {}
        self.rest.peek().map(|(_, c)| *c)
    }

    pub(super) fn at_end(&mut self) -> bool {
        self.peek().is_none()
    }

    pub(super) fn eat(&mut self, wanted: char) -> bool {
        self.rest.next_if(|(_, c)| *c == wanted).is_some()
    }

    /// Consumes `wanted` or says where it is missing.
    pub(super) fn expect(&mut self, wanted: char) -> Result<(), usize> {
        if self.peek() == Some(wanted) && self.eat(wanted) {
            Ok(())
        } else {
            Err(self.offset())
        }
    }

    /// One element of a field path.
    pub(super) fn field(&mut self) -> Result<String, Problem> {
        match self.peek() {
            Some('"') => self.quoted('"'),
            Some(c) if is_field(c) => Ok(self.take_while(is_field).to_owned()),
            _ => Err((self.offset(), "expected a field name".to_owned())),
        }
    }

    /// The run of operator characters ahead, possibly empty.
    pub(super) fn operator(&mut self) -> &'a str {
        self.take_while(|c| matches!(c, '=' | '!' | '~'))
    }

    /// A value. `slashes`: whether `/…/` and `|…|` quote, as they do for patterns.
    pub(super) fn value(&mut self, slashes: bool) -> Result<String, Problem> {
        match self.peek() {
            Some('"') => self.quoted('"'),
            Some(quote @ ('/' | '|')) if slashes => self.quoted(quote),
            Some('/' | '|') => Err((
                self.offset(),
                "only patterns are quoted by slashes or bars".to_owned(),
            )),
            Some(c) if is_value(c) => {
                let value = self.take_while(is_value).to_owned();
                match self.rest.peek() {
                    // Ends in a control character: neither part of a value nor a separator.
                    Some((offset, c)) if *c != ',' && !c.is_whitespace() => {
                        Err((*offset, format!("unexpected {c:?}")))
                    }
                    _ => Ok(value),
                }
            }
            _ => Err((self.offset(), "expected a value".to_owned())),
        }
    }

    fn take_while(&mut self, accept: impl Fn(char) -> bool) -> &'a str {
        let start = self.offset();
        while self.rest.next_if(|(_, c)| accept(*c)).is_some() {}
        let end = self.offset();
        &self.text[start..end]
    }

    /// A Go string literal between `quote`s, the first of which is ahead.
    fn quoted(&mut self, quote: char) -> Result<String, Problem> {
        let start = self.offset();
        self.rest.next();
        let mut bytes = Vec::new();
        loop {
            let (offset, c) = self
                .rest
                .next()
                .ok_or_else(|| (start, "unterminated quote".to_owned()))?;
            match c {
                '\n' => return Err((start, "unterminated quote".to_owned())),
                '\\' => self.escape(offset, quote, &mut bytes)?,
                c if c == quote => break,
                c => push(&mut bytes, c),
            }
        }
        // \x and octal escapes write bytes; a field of ours is always text.
        String::from_utf8(bytes).map_err(|_| (start, "quoted text is not UTF-8".to_owned()))
    }

    fn escape(&mut self, at: usize, quote: char, out: &mut Vec<u8>) -> Result<(), Problem> {
        let bad = || (at, "illegal escape sequence".to_owned());
        let (_, c) = self.rest.next().ok_or_else(bad)?;
        let byte = match c {
            'a' => 0x07,
            'b' => 0x08,
            'f' => 0x0c,
            'n' => b'\n',
            'r' => b'\r',
            't' => b'\t',
            'v' => 0x0b,
            '\\' => b'\\',
            c if c == quote => {
                push(out, c);
                return Ok(());
            }
            '0'..='7' => {
                let value = self
                    .digits(c.to_digit(8).unwrap_or(0), 8, 2)
                    .ok_or_else(bad)?;
                u8::try_from(value).map_err(|_| bad())?
            }
            'x' => {
                let value = self.digits(0, 16, 2).ok_or_else(bad)?;
                u8::try_from(value).map_err(|_| bad())?
            }
            'u' | 'U' => {
                let count = if c == 'u' { 4 } else { 8 };
                let value = self.digits(0, 16, count).ok_or_else(bad)?;
                push(out, char::from_u32(value).ok_or_else(bad)?);
                return Ok(());
            }
            _ => return Err(bad()),
        };
        out.push(byte);
        Ok(())
    }

    /// Exactly `count` more digits behind `value`.
    fn digits(&mut self, value: u32, base: u32, count: u32) -> Option<u32> {
        (0..count).try_fold(value, |value, _| {
            let digit = self.rest.next()?.1.to_digit(base)?;
            value.checked_mul(base)?.checked_add(digit)
        })
    }
}

/// Writes a string so that [`Scanner`] reads it back.
pub(super) fn quote(text: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            c if c.is_control() => {
                // Writing to a String cannot fail.
                let _ = write!(out, "\\U{:08x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn push(bytes: &mut Vec<u8>, c: char) {
    bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

fn is_field(c: char) -> bool {
    c == '_' || c.is_ascii_alphanumeric()
}

fn is_value(c: char) -> bool {
    c != ',' && !c.is_whitespace() && !c.is_control()
}
