//! Python's `datetime.strftime` over `chrono`.

use std::fmt::Write;

use chrono::NaiveDateTime;

/// Longest text that one call may produce.
const MAX_LEN: usize = 64 * 1024;
/// Directives whose padding the flags `-`, `_` and `0` change.
const NUMBERS: &str = "CGHIMSUVWYdegjklmsuwy";
/// Directives of words and of whole dates.
const TEXTS: &str = "ABDFPRTXabchnprtx%";

/// Formats a naive time as Python does on glibc in the C locale; unknown directives stay as they are.
pub(super) fn strftime(now: NaiveDateTime, format: &str) -> Option<String> {
    let mut out = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let letter_at = rest[1..].find(|c| !"-_0^#".contains(c)).map(|flags| 1 + flags);
        let Some((letter_at, letter)) = letter_at.and_then(|at| Some((at, rest[at..].chars().next()?)))
        else {
            break;
        };
        let flags = &rest[1..letter_at];
        let (directive, tail) = rest.split_at(letter_at + letter.len_utf8());
        let piece = match letter {
            'f' if flags.is_empty() => format!("{:06}", now.and_utc().timestamp_subsec_micros()),
            // A naive time has no zone: Python writes nothing.
            'z' | 'Z' => String::new(),
            letter if NUMBERS.contains(letter) => {
                let padding = flags.chars().rfind(|flag| "-_0".contains(*flag));
                let plain = [
                    "%".into(),
                    padding.map_or(String::new(), String::from),
                    letter.into(),
                ];
                written(now, &plain.concat())?
            }
            letter if TEXTS.contains(letter) => written(now, &format!("%{letter}"))?,
            _ => directive.to_string(),
        };
        match letter {
            _ if flags.contains('^') => out.push_str(&piece.to_uppercase()),
            'p' if flags.contains('#') => out.push_str(&piece.to_lowercase()),
            'A' | 'B' | 'a' | 'b' | 'h' if flags.contains('#') => out.push_str(&piece.to_uppercase()),
            _ => out.push_str(&piece),
        }
        if out.len() > MAX_LEN {
            return None;
        }
        rest = tail;
    }
    out.push_str(rest);
    (out.len() <= MAX_LEN).then_some(out)
}

/// What `chrono` makes of one directive.
fn written(now: NaiveDateTime, directive: &str) -> Option<String> {
    let mut text = String::new();
    write!(text, "{}", now.format(directive)).ok()?;
    Some(text)
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
        assert_eq!(at("%Y-%m-%d %H:%M:%S.%f%z%Z"), "2024-07-03 09:46:45.123456");
        assert_eq!(
            at("%d %b %Y|%-d|%B|%A|%j|%%|%^a"),
            "03 Jul 2024|3|July|Wednesday|185|%|WED"
        );
        assert_eq!(
            at("%c|%D|%F|%G|%I|%P|%#p|%R|%T|%U|%V|%W|%X|%e|%-e|%g|%k|%l|%_m|%r|%s|%u|%w|%x|%C|%n|%t|%h"),
            "Wed Jul  3 09:46:45 2024|07/03/24|2024-07-03|2024|09|am|am|09:46|09:46:45|26|27|27|09:46:45| 3|3|24|\
             \u{20}9| 9| 7|09:46:45 AM|1720000005|3|3|07/03/24|20|\n|\t|Jul"
        );
        assert_eq!(at("100%"), "100%");
        assert_eq!(at("%Ö %q %v %+ %-f %:z"), "%Ö %q %v %+ %-f %:z");
        assert_eq!(at("%-"), "%-");
    }

    #[test]
    fn no_directive_panics() {
        let now = chrono::NaiveDateTime::MAX;
        for letter in (' '..='~').chain(['é']) {
            for flag in ["", "-", "_", "0", "^", "#", "-^#"] {
                assert!(strftime(now, &format!("%{flag}{letter}")).is_some());
            }
        }
        assert!(strftime(now, &"%c".repeat(5000)).is_none());
    }
}
