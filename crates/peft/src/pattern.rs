//! Which modules a configuration means.

use fancy_regex::Regex;

/// Whether Python's `re.fullmatch` finds the pattern in `name`.
///
/// # Errors
/// What is wrong with the pattern.
pub(crate) fn full_match(pattern: &str, name: &str) -> Result<bool, String> {
    matches(&format!("^(?:{pattern})$"), name)
}

/// Whether `name` is `key`, or ends with it after a point; `key` may be a pattern, as PEFT's `rank_pattern` has them.
///
/// # Errors
/// What is wrong with the pattern.
pub(crate) fn ends_with_pattern(key: &str, name: &str) -> Result<bool, String> {
    matches(&format!(r"^(.*\.)?(?:{key})$"), name)
}

/// Whether `name` is `part`, or ends with it after a point.
pub(crate) fn ends_with(name: &str, part: &str) -> bool {
    name.strip_suffix(part)
        .is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// Whether `part` is a component of `name`, or several of them.
pub(crate) fn is_within(name: &str, part: &str) -> bool {
    format!(".{name}.").contains(&format!(".{part}."))
}

/// The index of the layer that a module belongs to: the first number after one of the components `lists`, or after any
/// where there are none.
pub(crate) fn layer_index(name: &str, lists: &[String]) -> Option<usize> {
    let parts: Vec<&str> = name.split('.').collect();
    // Something stands before the list where it may be any.
    let first = usize::from(lists.is_empty());
    (first..parts.len().saturating_sub(2)).find_map(|at| {
        let index = parts[at + 1].parse().ok()?;
        (lists.is_empty() || lists.iter().any(|list| ends_with(&parts[..=at].join("."), list)))
            .then_some(index)
    })
}

fn matches(pattern: &str, name: &str) -> Result<bool, String> {
    let wrong = |error: fancy_regex::Error| format!("the pattern `{pattern}`: {error}");
    Regex::new(pattern).map_err(wrong)?.is_match(name).map_err(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn like_pythons() {
        assert_eq!(full_match(r".*\.(q|v)_proj", "a.0.q_proj"), Ok(true));
        assert_eq!(full_match("q_proj|v_proj", "a.q_proj"), Ok(false));
        assert_eq!(full_match(r"(?!.*\.1\.).*q", "a.0.q"), Ok(true));
        assert!(full_match("(", "a").is_err());
        assert_eq!(
            ends_with_pattern("layers.1.q_proj", "model.layers.1.q_proj"),
            Ok(true)
        );
        assert_eq!(ends_with_pattern("q_proj", "model.mq_proj"), Ok(false));
        assert!(ends_with("a.b.c", "b.c") && ends_with("c", "c") && !ends_with("a.bc", "c"));
        assert!(is_within("a.classifier.dense", "classifier") && !is_within("a.classifier2", "classifier"));
    }

    #[test]
    fn layers() {
        assert_eq!(layer_index("model.layers.3.experts.5.up", &[]), Some(3));
        assert_eq!(layer_index("layers.3.up", &[]), None);
        assert_eq!(layer_index("model.layers.3.up", &["layers".to_string()]), Some(3));
        assert_eq!(layer_index("layers.3.up", &["layers".to_string()]), Some(3));
        assert_eq!(layer_index("model.h.3.up", &["layers".to_string()]), None);
    }
}
