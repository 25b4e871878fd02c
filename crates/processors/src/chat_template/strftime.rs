//! Python's `datetime.strftime` over `chrono`.

use std::fmt::Write;

use chrono::NaiveDateTime;

/// Longest text that one call may produce.
const MAX_LEN: usize = 64 * 1024;

/// Formats a naive time as Python (on glibc) does: unknown directives stay as they are.
pub(super) fn strftime(now: NaiveDateTime, format: &str) -> Option<String> {
    let mut out = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let flags = rest[1..].find(|c| !"-_0^#".contains(c)).unwrap_or(rest.len() - 1);
        let end = match rest[1 + flags..].chars().next() {
            Some(c) => 1 + flags + c.len_utf8(),
            None => rest.len(),
        };
        let (directive, tail) = rest.split_at(end);
        let upper = directive.contains('^');
        let directive_plain: String = directive.chars().filter(|c| !"^#".contains(*c)).collect();
        match directive_plain.as_str() {
            "%f" => write!(out, "{:06}", now.and_utc().timestamp_subsec_micros()).ok()?,
            // A naive time has no zone: Python writes nothing.
            "%z" | "%Z" => {}
            plain => {
                let mut piece = String::new();
                match write!(piece, "{}", now.format(plain)) {
                    Ok(()) if upper => out.push_str(&piece.to_uppercase()),
                    Ok(()) => out.push_str(&piece),
                    Err(_) => out.push_str(directive),
                }
            }
        }
        if out.len() > MAX_LEN {
            return None;
        }
        rest = tail;
    }
    out.push_str(rest);
    (out.len() <= MAX_LEN).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directives_are_pythons() {
        let now = chrono::DateTime::from_timestamp(1_720_000_005, 123_456_789)
            .unwrap()
            .naive_utc();
        let at = |format: &str| strftime(now, format).unwrap();
        assert_eq!(at("%Y-%m-%d %H:%M:%S.%f%z"), "2024-07-03 09:46:45.123456");
        assert_eq!(
            at("%d %b %Y|%-d|%B|%A|%j|%%|%^a"),
            "03 Jul 2024|3|July|Wednesday|185|%|WED"
        );
        assert_eq!(at("100%"), "100%");
        assert_eq!(at("%Ö %q"), "%Ö %q");
        assert_eq!(at("%-"), "%-");
    }
}
