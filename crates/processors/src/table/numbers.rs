//! Numbers and dates in texts.

use std::collections::BTreeMap;

use chrono::{Datelike, NaiveDate};

/// A number or a date.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Number(f64),
    /// Year, month and day, those that the text says.
    Date([Option<u32>; 3]),
}

/// What values have in common, so that they can be compared.
pub(super) enum Key {
    Number,
    /// Which of year, month and day all of them have.
    Date([bool; 3]),
}

impl Value {
    /// What to compare by.
    pub fn key(&self, key: &Key) -> Vec<f64> {
        match (self, key) {
            (Self::Number(number), _) => vec![*number],
            (Self::Date(parts), Key::Date(wanted)) => parts
                .iter()
                .zip(wanted)
                .filter(|(_, wanted)| **wanted)
                .map(|(part, _)| f64::from(part.unwrap_or(0)))
                .collect(),
            (Self::Date(_), Key::Number) => Vec::new(),
        }
    }

    fn is_date(&self) -> bool {
        matches!(self, Self::Date(_))
    }
}

/// What these values can be compared by; none where there are no values, or they have nothing in common.
pub(super) fn common<'a>(values: impl Iterator<Item = &'a Value>) -> Option<Key> {
    let (mut numbers, mut dates) = (0, 0);
    let mut all = [true; 3];
    for value in values {
        match value {
            Value::Number(_) => numbers += 1,
            Value::Date(parts) => {
                dates += 1;
                for (all, part) in all.iter_mut().zip(parts) {
                    *all &= part.is_some();
                }
            }
        }
    }
    match (numbers, dates) {
        (1.., 0) => Some(Key::Number),
        (0, 1..) if all.contains(&true) => Some(Key::Date(all)),
        _ => None,
    }
}

/// The values of a column, by row: all numbers or all dates, whichever more cells have. None where that is less than
/// 7 in 10 cells.
pub(super) fn column_values<'a>(cells: impl Iterator<Item = &'a str>) -> Vec<(usize, Value)> {
    let cells: Vec<Vec<Value>> = cells.map(values_of).collect();
    let count = |dates: bool| {
        let has = |values: &&Vec<Value>| values.iter().any(|value| value.is_date() == dates);
        cells.iter().filter(has).count()
    };
    let (numbers, dates) = (count(false), count(true));
    if numbers.max(dates) == 0 || (numbers.max(dates) as f64) < cells.len() as f64 * 0.7 {
        return Vec::new();
    }
    let wanted = dates >= numbers;
    let first = |(row, values): (usize, Vec<Value>)| {
        let value = values.into_iter().find(|value| value.is_date() == wanted)?;
        Some((row, value))
    };
    cells.into_iter().enumerate().filter_map(first).collect()
}

/// All numbers and dates of a text that are not a part of longer ones, in order.
pub(super) fn values_of(text: &str) -> Vec<Value> {
    let words: Vec<String> = text
        .to_lowercase()
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    let text: Vec<char> = words.join(" ").chars().collect();
    let mut spans: BTreeMap<(usize, usize), Vec<Value>> = BTreeMap::new();
    let mut at = 0;
    while at < text.len() {
        match number_at(&text, at) {
            Some(end) => {
                let number = number(&text[at..end]);
                spans
                    .entry((at, end))
                    .or_default()
                    .extend(number.map(Value::Number));
                at = end;
            }
            None => at += 1,
        }
    }
    spans.retain(|_, values| !values.is_empty());
    for (start, end) in stretches(&text, 1) {
        if spans.contains_key(&(start, end)) {
            continue;
        }
        let span: String = text[start..end].iter().collect();
        let word = |words: &[&str]| words.iter().position(|word| *word == span);
        let numbers = number(&text[start..end])
            .into_iter()
            .chain(word(&NUMBERS).map(|number| number as f64))
            .chain(word(&ORDINALS).map(|number| number as f64));
        let numbers: Vec<Value> = numbers.map(Value::Number).collect();
        if !numbers.is_empty() {
            spans.insert((start, end), numbers);
        }
    }
    for (start, end) in stretches(&text, 5) {
        if let Some(date) = date(&text[start..end]) {
            spans.entry((start, end)).or_default().push(Value::Date(date));
        }
    }
    // Longer ones first, then earlier ones.
    let mut spans: Vec<((usize, usize), Vec<Value>)> = spans.into_iter().collect();
    spans.sort_by_key(|((start, end), _)| (std::cmp::Reverse(end - start), *start));
    let mut chosen: Vec<((usize, usize), Vec<Value>)> = Vec::new();
    for ((start, end), values) in spans {
        let within = |((from, to), _): &((usize, usize), Vec<Value>)| *from <= start && end <= *to;
        if !chosen.iter().any(within) {
            chosen.push(((start, end), values));
        }
    }
    chosen.sort_by_key(|((start, _), _)| *start);
    chosen.into_iter().flat_map(|(_, values)| values).collect()
}

const NUMBERS: [&str; 13] = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
];

const ORDINALS: [&str; 13] = [
    "zeroth", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
    "eleventh", "twelfth",
];

/// The end of a number in digits that begins here, with a sign at the beginning of a word.
fn number_at(text: &[char], start: usize) -> Option<usize> {
    let char = |at: usize| text.get(at).copied().unwrap_or('\0');
    let signed = |at: usize| {
        matches!(char(at), '+' | '-')
            .then(|| digits_at(text, at + 1))
            .flatten()
    };
    let spaced = || char(start).is_whitespace().then(|| signed(start + 1)).flatten();
    let first = || (start == 0).then(|| signed(0)).flatten();
    first().or_else(spaced).or_else(|| digits_at(text, start))
}

/// The end of digits that begin here: `.5`, `12`, `1,000.5`, `3.`.
fn digits_at(text: &[char], start: usize) -> Option<usize> {
    let run = |from: usize| {
        let digits = text.iter().skip(from).take_while(|char| char.is_ascii_digit());
        from + digits.count()
    };
    let is = |at: usize, wanted: char| text.get(at) == Some(&wanted);
    if is(start, '.') {
        let end = run(start + 1);
        return (end > start + 1).then_some(end);
    }
    let mut end = run(start);
    if end == start {
        return None;
    }
    while is(end, ',') && run(end + 1) >= end + 4 {
        end += 4;
    }
    if is(end, '.') {
        end = run(end + 1);
    }
    Some(end)
}

/// A number like `1,000` or `18th`.
fn number(text: &[char]) -> Option<f64> {
    let text: String = text.iter().collect();
    let bare = ["st", "nd", "rd", "th"]
        .iter()
        .find_map(|suffix| text.strip_suffix(suffix))
        .unwrap_or(&text);
    let number: f64 = bare.replace(',', "").trim().parse().ok()?;
    number.is_finite().then_some(number)
}

/// Where up to `most` words in a row begin and end.
fn stretches(text: &[char], most: usize) -> Vec<(usize, usize)> {
    let is_word = |at: usize| text.get(at).is_some_and(|char| char.is_alphanumeric());
    let mut starts = Vec::new();
    let mut stretches = Vec::new();
    for at in (0..text.len()).filter(|at| is_word(*at)) {
        if at == 0 || !is_word(at - 1) {
            starts.push(at);
        }
        if !is_word(at + 1) {
            let last = &starts[starts.len().saturating_sub(most)..];
            stretches.extend(last.iter().map(|start| (*start, at + 1)));
        }
    }
    stretches
}

/// Ways to write dates, as `strptime` has them, and whether they say year, month and day.
const FORMATS: [(&str, [bool; 3]); 19] = [
    ("%B", [false, true, false]),
    ("%Y", [true, false, false]),
    ("%Ys", [true, false, false]),
    ("%b %Y", [true, true, false]),
    ("%B %Y", [true, true, false]),
    ("%B %d", [false, true, true]),
    ("%b %d", [false, true, true]),
    ("%d %b", [false, true, true]),
    ("%d %B", [false, true, true]),
    ("%B %d, %Y", [true; 3]),
    ("%d %B %Y", [true; 3]),
    ("%m-%d-%Y", [true; 3]),
    ("%Y-%m-%d", [true; 3]),
    ("%Y-%m", [true, true, false]),
    ("%d %b %Y", [true; 3]),
    ("%b %d, %Y", [true; 3]),
    ("%d.%m.%Y", [true; 3]),
    ("%A, %b %d", [false, true, true]),
    ("%A, %B %d", [false, true, true]),
];

const MONTHS: [&str; 12] = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
];

const DAYS: [&str; 7] = [
    "monday",
    "tuesday",
    "wednesday",
    "thursday",
    "friday",
    "saturday",
    "sunday",
];

/// A date between 1700 and 2016.
fn date(text: &[char]) -> Option<[Option<u32>; 3]> {
    // Far longer than any date.
    if text.len() > 64 {
        return None;
    }
    let text: String = text.iter().collect();
    FORMATS.iter().find_map(|(format, says)| {
        let date = parse(&text, format)?;
        if !(1700..=2016).contains(&date.year()) {
            return None;
        }
        let parts = [date.year().unsigned_abs(), date.month(), date.day()];
        let part = |at: usize| says[at].then_some(parts[at]);
        Some([part(0), part(1), part(2)])
    })
}

/// Reads a lower-case text as a format says; what it does not say is that of the first day of 1900.
fn parse(text: &str, format: &str) -> Option<NaiveDate> {
    let (mut year, mut month, mut day) = (1900, 1, 1);
    let mut rest = text;
    let mut format = format.chars();
    let run = |text: &str, most: usize, is: fn(char) -> bool| -> usize {
        let run = text.chars().take(most).take_while(|char| is(*char));
        run.map(char::len_utf8).sum()
    };
    while let Some(char) = format.next() {
        if char == ' ' {
            let trimmed = rest.trim_start();
            if trimmed.len() == rest.len() {
                return None;
            }
            rest = trimmed;
            continue;
        }
        if char != '%' {
            rest = rest.strip_prefix(char)?;
            continue;
        }
        let digits = |most| rest.split_at(run(rest, most, |char| char.is_ascii_digit()));
        let letters = || rest.split_at(run(rest, 16, char::is_alphabetic));
        let (field, after) = match format.next()? {
            'Y' => {
                let (field, after) = digits(4);
                year = field.parse().ok().filter(|_| field.len() == 4)?;
                (field, after)
            }
            'm' => {
                let (field, after) = digits(2);
                month = field.parse().ok()?;
                (field, after)
            }
            'd' => {
                let (field, after) = digits(2);
                day = field.parse().ok()?;
                (field, after)
            }
            'B' => {
                let (field, after) = letters();
                month = MONTHS.iter().position(|name| *name == field)? as u32 + 1;
                (field, after)
            }
            'b' => {
                let (field, after) = letters();
                month = MONTHS.iter().position(|name| name.get(..3) == Some(field))? as u32 + 1;
                (field, after)
            }
            _ => {
                let (field, after) = letters();
                DAYS.iter().find(|name| **name == field)?;
                (field, after)
            }
        };
        if field.is_empty() {
            return None;
        }
        rest = after;
    }
    match rest.is_empty() {
        true => NaiveDate::from_ymd_opt(year, month, day),
        false => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_dates() {
        let number = |number: f64| Value::Number(number);
        assert_eq!(
            values_of("1,000.5 or -3, the 18th of TWELVE"),
            [number(1000.5), number(-3.0), number(18.0), number(12.0)]
        );
        assert_eq!(
            values_of("On 5 May 2010"),
            [Value::Date([Some(2010), Some(5), Some(5)])]
        );
        assert_eq!(
            values_of("1999"),
            [number(1999.0), Value::Date([Some(1999), None, None])]
        );
        // There is no such day.
        assert_eq!(
            values_of("february 30"),
            [Value::Date([None, Some(2), None]), number(30.0)]
        );
        assert_eq!(values_of("no numbers, infinity or nan"), []);
    }
}
