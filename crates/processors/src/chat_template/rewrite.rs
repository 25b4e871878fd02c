//! Small rewrites of a template's source, for what Jinja2 does and minijinja does not.
//!
//! - `{% generation %}…{% endgeneration %}` is a custom tag of Transformers, but nothing more than a call block:
//!   `{% call __generation__() %}…{% endcall %}`.
//! - `{% set ns.x = … %}` in a macro or call block does not capture `ns`: naming it in a tag before does.
//! - `{% for x in none %}` is an error in Python and an empty loop in minijinja: `none` is refused by a filter.
//!
//! Besides, all line ends become `\n`, as in Jinja2. Of the tags only the words change, which leaves whitespace
//! control and line numbers as they were.

use super::environment::ITERABLE;
use super::generation::FUNCTION;

/// Rewrites the tags and line ends of a template; everything else stays byte by byte.
pub(super) fn rewrite(source: &str) -> Result<String, String> {
    let source = &source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(at) = rest.find('{') {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let end = match tag.as_bytes().get(1) {
            Some(b'#') => tag.find("#}").map_or(tag.len(), |end| end + 2),
            Some(b'{') => tag_end(tag, "}}"),
            Some(b'%') => {
                let end = tag_end(tag, "%}");
                match Block::parse(&tag[..end]) {
                    Some(block) if block.word == "raw" => raw_end(tag, end),
                    Some(block) => {
                        out.push_str(&block.rewritten()?);
                        rest = &tag[end..];
                        continue;
                    }
                    None => end,
                }
            }
            _ => 1,
        };
        let (piece, tail) = tag.split_at(end);
        out.push_str(piece);
        rest = tail;
    }
    out.push_str(rest);
    Ok(out)
}

/// A `{% … %}` tag in its parts, which follow each other without gaps.
struct Block<'a> {
    /// `{%`, its whitespace control and the space before the word.
    open: &'a str,
    /// What kind of tag it is.
    word: &'a str,
    /// What follows the word.
    body: &'a str,
    /// The end mark with its whitespace control.
    close: &'a str,
}

impl<'a> Block<'a> {
    fn parse(tag: &'a str) -> Option<Self> {
        let inner = tag.strip_prefix("{%")?.strip_suffix("%}")?;
        let inner = inner.strip_suffix(['-', '+']).unwrap_or(inner);
        let start = tag.len() - tag[2..].trim_start_matches(['-', '+']).trim_start().len();
        let inner_end = 2 + inner.len();
        let inner = tag.get(start..inner_end)?;
        let word = inner
            .split(|c: char| !c.is_alphanumeric() && c != '_')
            .next()
            .unwrap_or_default();
        Some(Self {
            open: &tag[..start],
            word,
            body: &inner[word.len()..],
            close: &tag[inner_end..],
        })
    }

    fn rewritten(&self) -> Result<String, String> {
        let Self {
            open,
            word,
            body,
            close,
        } = self;
        Ok(match *word {
            "generation" => format!("{open}call {FUNCTION}(){body}{close}"),
            "endgeneration" => format!("{open}endcall{body}{close}"),
            "set" => match namespace_target(body)? {
                Some(name) => format!("{open}set __target__ = {name} %}}{{% set{body}{close}"),
                None => format!("{open}{word}{body}{close}"),
            },
            "for" => match loop_values(body) {
                Some((targets, values, rest)) => {
                    format!("{open}for{targets}({values})|{ITERABLE} {rest}{close}")
                }
                None => format!("{open}{word}{body}{close}"),
            },
            _ => format!("{open}{word}{body}{close}"),
        })
    }
}

/// The name before the dot of ` ns.attribute = …`; Transformers refuses attributes with a leading underscore.
fn namespace_target(body: &str) -> Result<Option<&str>, String> {
    let target = body.split('=').next().unwrap_or_default();
    let Some((name, attribute)) = target.split_once('.') else {
        return Ok(None);
    };
    if attribute.trim_start().starts_with('_') {
        return Err(format!(
            "a namespace takes no name with a leading underscore: set{target}"
        ));
    }
    let name = name.trim();
    let plain = !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || c == '_');
    Ok(plain.then_some(name))
}

/// Splits ` x in values if …` around the values.
fn loop_values(body: &str) -> Option<(&str, &str, &str)> {
    let mut words = words(body);
    let start = words.find(|(_, word)| *word == "in")?.0 + 2;
    let end = words
        .find(|(_, word)| matches!(*word, "if" | "recursive"))
        .map_or(body.len(), |(at, _)| at);
    let values = body.get(start..end)?;
    (!values.trim().is_empty()).then(|| (&body[..start], values, &body[end..]))
}

/// The words of a tag outside of strings and brackets, with their byte positions.
fn words(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let bytes = text.as_bytes();
    let (mut at, mut depth) = (0, 0usize);
    std::iter::from_fn(move || {
        while let Some(&byte) = bytes.get(at) {
            let start = at;
            at = past(bytes, at, &mut depth);
            if byte == b'_' || byte.is_ascii_alphanumeric() {
                while bytes
                    .get(at)
                    .is_some_and(|b| *b == b'_' || b.is_ascii_alphanumeric())
                {
                    at += 1;
                }
                if depth == 0 {
                    return Some((start, text.get(start..at)?));
                }
            }
        }
        None
    })
}

/// The position after the byte or the whole string at `at`; keeps count of open brackets.
fn past(bytes: &[u8], mut at: usize, depth: &mut usize) -> usize {
    match bytes[at] {
        quote @ (b'"' | b'\'') => {
            at += 1;
            while bytes.get(at).is_some_and(|b| *b != quote) {
                at += if bytes[at] == b'\\' { 2 } else { 1 };
            }
        }
        b'(' | b'[' | b'{' => *depth += 1,
        b')' | b']' | b'}' => *depth = depth.saturating_sub(1),
        _ => {}
    }
    at + 1
}

/// Length of the tag that opens `text`, its end mark included; strings and brackets inside are skipped.
fn tag_end(text: &str, mark: &str) -> usize {
    let bytes = text.as_bytes();
    let (mut at, mut depth) = (2, 0);
    while at < bytes.len() {
        if depth == 0 && bytes[at..].starts_with(mark.as_bytes()) {
            return at + 2;
        }
        at = past(bytes, at, &mut depth);
    }
    text.len()
}

/// Where the raw block that opens `text` ends, `{% endraw %}` included.
fn raw_end(text: &str, body: usize) -> usize {
    let mut from = body;
    while let Some(at) = text[from..].find("{%") {
        let tag = &text[from + at..];
        let end = tag.find("%}").map_or(tag.len(), |end| end + 2);
        if tag[2..end]
            .trim_start_matches(['-', '+'])
            .trim_start()
            .starts_with("endraw")
        {
            return from + at + end;
        }
        from += at + 2;
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tags_are_rewritten() {
        let source = "{# {% generation %} #}{{ '{% generation %}' }}{%- generation -%}x{%+ endgeneration %}\
                      {% raw %}{% generation %}{% endraw %}{% generations %} { {{ {'a': {}} }}";
        let expected = "{# {% generation %} #}{{ '{% generation %}' }}{%- call __generation__() -%}x{%+ endcall %}\
                        {% raw %}{% generation %}{% endraw %}{% generations %} { {{ {'a': {}} }}";
        assert_eq!(rewrite(source).unwrap(), expected);
    }

    #[test]
    fn namespaces_are_named() {
        assert!(rewrite("{% set ns._x = 1 %}").is_err());
        for same in [
            "{% set ns = a._x %}",
            "{% set a, b = ns.x %}",
            "{% set a[0] = ns.x %}",
            "{% set",
        ] {
            assert_eq!(rewrite(same).unwrap(), same);
        }
        assert_eq!(
            rewrite("{%- set ns.x = a._x -%}").unwrap(),
            "{%- set __target__ = ns %}{% set ns.x = a._x -%}"
        );
    }

    #[test]
    fn loops_refuse_none() {
        for (from, to) in [
            ("{%- for x in xs -%}", "{%- for x in( xs )|__iterable__ -%}"),
            (
                "{% for k, v in d['in if'].items() if k in v recursive %}",
                "{% for k, v in( d['in if'].items() )|__iterable__ if k in v recursive %}",
            ),
            ("{% for x in 1, 2 %}", "{% for x in( 1, 2 )|__iterable__ %}"),
            ("{% for x in %}", "{% for x in %}"),
            ("{% for %}", "{% for %}"),
        ] {
            assert_eq!(rewrite(from).unwrap(), to);
        }
    }
}
