//! Small rewrites of a template's source, for what Jinja2 does and minijinja does not.
//!
//! - `{% generation %}…{% endgeneration %}` is a custom tag of Transformers, but nothing more than a call block:
//!   `{% call __generation__() %}…{% endcall %}`.
//! - `{% set ns.x = … %}` in a macro or call block does not capture `ns`: naming it in a tag before does.
//! - `{% for x in none %}` is an error in Python and an empty loop in minijinja: `none` is refused by a filter.
//!
//! - Values that are kept in a variable or namespace go through the filters of `bounds`; tags so long that
//!   compiling them would use up the stack are refused.
//!
//! Besides, all line ends become `\n`, as in Jinja2. Of the tags only the words change, which leaves whitespace
//! control and line numbers as they were.

use super::bounds::{BOUNDED, DATA};
use super::environment::ITERABLE;
use super::generation::FUNCTION;

/// Operators, calls and subscripts in one tag, and `elif`s and macros in a template: these chain, and the parser
/// recurses over chains. Published templates have up to 30, 22 and 8.
const MAX_CHAIN: usize = 250;
/// Brackets within brackets in one tag.
const MAX_BRACKETS: usize = 32;

/// Rewrites the tags and line ends of a template; everything else stays byte by byte.
pub(super) fn rewrite(source: &str) -> Result<String, String> {
    let source = &source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    let mut chained = 0;
    while let Some(at) = rest.find('{') {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let end = match tag.as_bytes().get(1) {
            Some(b'#') => tag.find("#}").map_or(tag.len(), |end| end + 2),
            Some(b'{') => {
                let end = tag_end(tag, "}}");
                check_length(&tag[..end])?;
                end
            }
            Some(b'%') => {
                let end = tag_end(tag, "%}");
                check_length(&tag[..end])?;
                match Block::parse(&tag[..end]) {
                    Some(block) if block.word == "raw" => raw_end(tag, end),
                    Some(block) => {
                        if matches!(block.word, "elif" | "macro") {
                            chained += 1;
                        }
                        if chained > MAX_CHAIN {
                            return Err(format!("more than {MAX_CHAIN} elif branches and macros"));
                        }
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
        // What a tag brings into scope goes through a filter in a tag of its own behind it.
        let guarded = |tag: String, names: Vec<&str>| {
            let guards: String = names
                .iter()
                .map(|name| format!(" %}}{{% set {name} = {name}|{BOUNDED} "))
                .collect();
            format!("{open}{tag}{guards}{close}")
        };
        Ok(match *word {
            "generation" => format!("{open}call {FUNCTION}(){body}{close}"),
            "endgeneration" => format!("{open}endcall{body}{close}"),
            "set" => match assignment(body) {
                Some((target, value)) => match namespace_target(target)? {
                    Some(name) => {
                        format!("{open}set __target__ = {name} %}}{{% set{target}=({value})|{DATA} {close}")
                    }
                    None if nests(value) => format!("{open}set{target}=({value})|{BOUNDED} {close}"),
                    None => format!("{open}set{body}{close}"),
                },
                None => {
                    namespace_target(body)?;
                    format!("{open}set{body}{close}")
                }
            },
            "for" => match loop_values(body) {
                Some((targets, values, rest)) => {
                    let names = match nests(values) || rest.contains("recursive") {
                        true => names(targets.strip_suffix("in").unwrap_or(targets)),
                        false => Vec::new(),
                    };
                    guarded(format!("for{targets}({values})|{ITERABLE} {rest}"), names)
                }
                None => format!("{open}for{body}{close}"),
            },
            "macro" => guarded(format!("macro{body}"), parameters(body)),
            "call" if body.trim_start().starts_with('(') => guarded(format!("call{body}"), parameters(body)),
            "with" => guarded(format!("with{body}"), assigned(body)),
            _ => format!("{open}{word}{body}{close}"),
        })
    }
}

/// Refuses a tag that the parser would recurse over too far.
fn check_length(tag: &str) -> Result<(), String> {
    let bytes = tag.as_bytes();
    let (mut at, mut depth, mut operators) = (0, 0, 0);
    while let Some(&byte) = bytes.get(at) {
        let next = past(bytes, at, &mut depth);
        match byte {
            b'.' | b'[' | b'(' | b'|' | b'~' | b'+' | b'-' | b'*' | b'/' | b'%' | b'<' | b'>' | b'='
            | b'!' => {
                operators += 1;
            }
            b'a'..=b'z' => {
                let start = at == 0 || !is_word(bytes[at - 1]);
                let end = (at..bytes.len())
                    .find(|at| !is_word(bytes[*at]))
                    .unwrap_or(bytes.len());
                if start && matches!(&tag[at..end], "not" | "and" | "or" | "if" | "is" | "in") {
                    operators += 1;
                }
                at = end;
                continue;
            }
            _ => {}
        }
        if operators > MAX_CHAIN || depth > MAX_BRACKETS + 2 {
            let start: String = tag.chars().take(60).collect();
            return Err(format!(
                "a tag has more than {MAX_CHAIN} operators or {MAX_BRACKETS} nested brackets: {start}…"
            ));
        }
        at = next;
    }
    Ok(())
}

/// Can the value of this expression be nested deeper than those in it?
fn nests(expression: &str) -> bool {
    expression.contains(['[', '(', '{', '|'])
}

/// Splits ` target = value` of a set tag; a block of text (`{% set x %}`) has no value.
fn assignment(body: &str) -> Option<(&str, &str)> {
    let (target, value) = body.split_once('=')?;
    (!target.contains(['|', '(']) && !value.trim().is_empty()).then_some((target, value))
}

/// Plain names in a list of targets.
fn names(targets: &str) -> Vec<&str> {
    targets
        .split([',', '(', ')'])
        .map(str::trim)
        .filter(|name| is_name(name))
        .collect()
}

/// Names of the parameters of ` f(a, b=[1])`.
fn parameters(body: &str) -> Vec<&str> {
    let inner = body.split_once('(').map_or("", |(_, inner)| inner);
    let mut end = 0;
    words(inner)
        .filter(|(at, word)| {
            // A parameter stands at the start or behind a comma, everything else belongs to a default.
            let between = inner[end..*at].trim();
            end = at + word.len();
            (between.is_empty() || between.ends_with(',')) && is_name(word)
        })
        .map(|(_, word)| word)
        .collect()
}

/// Names that ` a = 1, b = x` assigns.
fn assigned(body: &str) -> Vec<&str> {
    words(body)
        .filter(|(at, word)| {
            let rest = body[at + word.len()..].trim_start();
            rest.starts_with('=') && !rest.starts_with("==") && is_name(word)
        })
        .map(|(_, word)| word)
        .collect()
}

fn is_name(text: &str) -> bool {
    !text.starts_with(|c: char| c.is_ascii_digit()) && !text.is_empty() && text.bytes().all(is_word)
}

fn is_word(byte: u8) -> bool {
    byte == b'_' || byte.is_ascii_alphanumeric()
}

/// The name before the dot of ` ns.attribute`; Transformers refuses attributes with a leading underscore.
fn namespace_target(target: &str) -> Result<Option<&str>, String> {
    let Some((name, attribute)) = target.split_once('.') else {
        return Ok(None);
    };
    if attribute.trim_start().starts_with('_') {
        return Err(format!(
            "a namespace takes no name with a leading underscore: set{target}"
        ));
    }
    let name = name.trim();
    Ok(is_name(name).then_some(name))
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
            if is_word(byte) {
                while bytes.get(at).copied().is_some_and(is_word) {
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
            "{%- set __target__ = ns %}{% set ns.x =( a._x )|__data__ -%}"
        );
    }

    #[test]
    fn loops_refuse_none() {
        for (from, to) in [
            ("{%- for x in xs -%}", "{%- for x in( xs )|__iterable__ -%}"),
            (
                "{% for k, v in d['in if'].items() if k in v recursive %}",
                "{% for k, v in( d['in if'].items() )|__iterable__ if k in v recursive  %}{% set k = k|__bounded__  %}\
                 {% set v = v|__bounded__ %}",
            ),
            ("{% for x in 1, 2 %}", "{% for x in( 1, 2 )|__iterable__ %}"),
            ("{% for x in %}", "{% for x in %}"),
            ("{% for %}", "{% for %}"),
        ] {
            assert_eq!(rewrite(from).unwrap(), to);
        }
    }

    #[test]
    fn scopes_are_guarded() {
        for (from, to) in [
            ("{% macro f() -%}", "{% macro f() -%}"),
            (
                "{%- macro f(a, b=g(c, d), e='x, y') -%}",
                "{%- macro f(a, b=g(c, d), e='x, y')  %}{% set a = a|__bounded__  %}{% set b = b|__bounded__  %}\
                 {% set e = e|__bounded__ -%}",
            ),
            (
                "{% with a = [b], c = d == e %}",
                "{% with a = [b], c = d == e  %}{% set a = a|__bounded__  %}{% set c = c|__bounded__ %}",
            ),
            ("{% set x = [x] %}", "{% set x =( [x] )|__bounded__ %}"),
        ] {
            assert_eq!(rewrite(from).unwrap(), to);
        }
        assert!(rewrite(&format!("{{{{ 1{} }}}}", " + 1".repeat(251))).is_err());
        assert!(rewrite(&format!("{{{{ {}1 }}}}", "not ".repeat(251))).is_err());
        assert!(rewrite(&format!("{{{{ {} }}}}", "[".repeat(40))).is_err());
        assert!(rewrite(&"{% elif x %}".repeat(251)).is_err());
        assert!(rewrite(&format!("{{{{ '{}' }}}}", "+".repeat(1000))).is_ok());
    }
}
