//! How good a model is: the metrics that its task is judged by.

use std::collections::{BTreeMap, BTreeSet};

use oxiformers_data::tasks::{Batch, IGNORED, Targets};

use crate::task::{Answers, Metrics};

fn named<const N: usize>(metrics: [(&str, f64); N]) -> BTreeMap<String, f64> {
    metrics
        .into_iter()
        .map(|(name, value)| (name.to_string(), value))
        .collect()
}

fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

/// Twice the product of precision and recall over their sum.
fn f1(hits: u64, answered: u64, true_ones: u64) -> f64 {
    2.0 * hits as f64 / (answered + true_ones).max(1) as f64
}

/// What is to be answered, token by token, as the metrics see it.
type Expected = fn(&Batch, &[Vec<i64>]) -> Vec<Vec<i64>>;

/// The share of tokens that were right.
pub struct TokenAccuracy {
    expected: Expected,
    right: u64,
    all: u64,
    right_rows: u64,
    rows: u64,
}

impl TokenAccuracy {
    /// With what is to be answered.
    pub fn of(expected: Expected) -> Self {
        Self {
            expected,
            right: 0,
            all: 0,
            right_rows: 0,
            rows: 0,
        }
    }
}

impl Metrics<Batch> for TokenAccuracy {
    fn add(&mut self, answers: &Answers, batch: &Batch) {
        let (Answers::Tokens(answers), Targets::Tokens(labels)) = (answers, &batch.labels) else {
            return;
        };
        for (answers, labels) in answers.iter().zip((self.expected)(batch, labels)) {
            let learned = answers
                .iter()
                .zip(&labels)
                .filter(|(_, label)| **label != IGNORED);
            let (mut right, mut all) = (0, 0);
            for (answer, label) in learned {
                right += u64::from(answer == label);
                all += 1;
            }
            self.right += right;
            self.all += all;
            self.right_rows += u64::from(right == all && all > 0);
            self.rows += u64::from(all > 0);
        }
    }

    fn finish(&self) -> BTreeMap<String, f64> {
        named([
            ("accuracy", share(self.right, self.all)),
            ("exact_match", share(self.right_rows, self.rows)),
        ])
    }
}

/// One class of several: accuracy, F1 as the mean over classes and weighted by them, Matthews' correlation.
#[derive(Debug)]
pub struct Classes {
    /// How often a class (first) was answered as another (second).
    counts: BTreeMap<(i64, i64), u64>,
    classes: usize,
}

impl Classes {
    /// With the number of classes, or 0 where that differs from row to row.
    pub fn new(classes: usize) -> Self {
        Self {
            counts: BTreeMap::new(),
            classes,
        }
    }
}

fn argmax(row: &[f32]) -> i64 {
    let best = row
        .iter()
        .enumerate()
        .max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
    best.map_or(0, |(class, _)| class as i64)
}

impl Metrics<Batch> for Classes {
    fn add(&mut self, answers: &Answers, batch: &Batch) {
        let (Answers::Rows(rows), Targets::Classes(labels)) = (answers, &batch.labels) else {
            return;
        };
        for (row, label) in rows.iter().zip(labels).filter(|(_, label)| **label != IGNORED) {
            *self.counts.entry((*label, argmax(row))).or_default() += 1;
        }
    }

    fn finish(&self) -> BTreeMap<String, f64> {
        let all: u64 = self.counts.values().sum();
        let sum = |keep: &dyn Fn(&(i64, i64)) -> bool| -> u64 {
            self.counts
                .iter()
                .filter(|(key, _)| keep(key))
                .map(|(_, count)| count)
                .sum()
        };
        let right = sum(&|(label, answer)| label == answer);
        let mut metrics = named([("accuracy", share(right, all))]);
        if self.classes == 0 {
            return metrics;
        }
        let seen: BTreeSet<i64> = self
            .counts
            .keys()
            .flat_map(|(label, answer)| [*label, *answer])
            .collect();
        let (mut macro_f1, mut weighted, mut cross) = (0.0, 0.0, 0.0);
        let (mut labels_squared, mut answers_squared) = (0.0, 0.0);
        for class in &seen {
            let hits = sum(&|key| *key == (*class, *class));
            let (labels, answers) = (
                sum(&|(label, _)| label == class),
                sum(&|(_, answer)| answer == class),
            );
            let score = f1(hits, answers, labels);
            macro_f1 += score / seen.len() as f64;
            weighted += score * share(labels, all);
            cross += labels as f64 * answers as f64;
            labels_squared += (labels as f64).powi(2);
            answers_squared += (answers as f64).powi(2);
        }
        let n = all as f64;
        let spread = ((n * n - labels_squared) * (n * n - answers_squared)).sqrt();
        let matthews = if spread > 0.0 {
            (right as f64 * n - cross) / spread
        } else {
            0.0
        };
        metrics.extend(named([
            ("f1", macro_f1),
            ("f1_weighted", weighted),
            ("matthews_correlation", matthews),
        ]));
        metrics
    }
}

/// Any number of classes: F1 over all of them together, and the share of rows that are right as a whole.
#[derive(Debug, Default)]
pub struct MultiLabel {
    hits: u64,
    answered: u64,
    true_ones: u64,
    right_rows: u64,
    rows: u64,
}

impl Metrics<Batch> for MultiLabel {
    fn add(&mut self, answers: &Answers, batch: &Batch) {
        let (Answers::Rows(rows), Targets::Numbers(labels)) = (answers, &batch.labels) else {
            return;
        };
        for (row, labels) in rows.iter().zip(labels) {
            let pairs = || row.iter().map(|x| *x > 0.0).zip(labels.iter().map(|y| *y > 0.5));
            self.hits += pairs().filter(|(x, y)| *x && *y).count() as u64;
            self.answered += pairs().filter(|(x, _)| *x).count() as u64;
            self.true_ones += pairs().filter(|(_, y)| *y).count() as u64;
            self.right_rows += u64::from(pairs().all(|(x, y)| x == y));
            self.rows += 1;
        }
    }

    fn finish(&self) -> BTreeMap<String, f64> {
        named([
            ("accuracy", share(self.right_rows, self.rows)),
            ("f1", f1(self.hits, self.answered, self.true_ones)),
            ("precision", share(self.hits, self.answered)),
            ("recall", share(self.hits, self.true_ones)),
        ])
    }
}

/// Numbers: squared and absolute error, and the correlations of Pearson and Spearman.
#[derive(Debug, Default)]
pub struct Regression {
    pairs: Vec<(f64, f64)>,
}

impl Metrics<Batch> for Regression {
    fn add(&mut self, answers: &Answers, batch: &Batch) {
        let (Answers::Rows(rows), Targets::Numbers(labels)) = (answers, &batch.labels) else {
            return;
        };
        for (row, labels) in rows.iter().zip(labels) {
            self.pairs.extend(
                row.iter()
                    .zip(labels)
                    .map(|(x, y)| (f64::from(*x), f64::from(*y))),
            );
        }
    }

    fn finish(&self) -> BTreeMap<String, f64> {
        let n = self.pairs.len().max(1) as f64;
        let mean = |of: &dyn Fn(&(f64, f64)) -> f64| self.pairs.iter().map(of).sum::<f64>() / n;
        let ranks = |of: &dyn Fn(&(f64, f64)) -> f64| ranks(&self.pairs.iter().map(of).collect::<Vec<_>>());
        let ranked: Vec<(f64, f64)> = ranks(&|pair| pair.0)
            .into_iter()
            .zip(ranks(&|pair| pair.1))
            .collect();
        named([
            ("mse", mean(&|(x, y)| (x - y).powi(2))),
            ("mae", mean(&|(x, y)| (x - y).abs())),
            ("pearson", correlation(&self.pairs)),
            ("spearman", correlation(&ranked)),
        ])
    }
}

fn correlation(pairs: &[(f64, f64)]) -> f64 {
    let n = pairs.len().max(1) as f64;
    let (mx, my) = (
        pairs.iter().map(|p| p.0).sum::<f64>() / n,
        pairs.iter().map(|p| p.1).sum::<f64>() / n,
    );
    let sum = |of: &dyn Fn(f64, f64) -> f64| pairs.iter().map(|(x, y)| of(x - mx, y - my)).sum::<f64>();
    let spread = (sum(&|x, _| x * x) * sum(&|_, y| y * y)).sqrt();
    if spread > 0.0 {
        sum(&|x, y| x * y) / spread
    } else {
        0.0
    }
}

/// Places in the order of values; equal ones share the mean of their places.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut begin = 0;
    while begin < order.len() {
        let value = values[order[begin]];
        let end = (begin..order.len())
            .find(|at| values[order[*at]] != value)
            .unwrap_or(order.len());
        for at in begin..end {
            ranks[order[at]] = (begin + end - 1) as f64 / 2.0;
        }
        begin = end;
    }
    ranks
}

/// Classes of tokens: accuracy, and where they are named as `B-…` and `I-…`, precision, recall and F1 of whole entities as
/// `seqeval` counts them.
#[derive(Debug)]
pub struct Tags {
    labels: Vec<String>,
    right: u64,
    all: u64,
    hits: u64,
    answered: u64,
    true_ones: u64,
}

impl Tags {
    /// With the names of classes.
    pub fn new(labels: &[String]) -> Self {
        Self {
            labels: labels.to_vec(),
            right: 0,
            all: 0,
            hits: 0,
            answered: 0,
            true_ones: 0,
        }
    }

    /// The entities of a row: their kinds, and where they begin and end.
    fn entities(&self, tags: &[i64]) -> BTreeSet<(String, usize, usize)> {
        let mut entities = BTreeSet::new();
        let mut open: Option<(String, usize)> = None;
        for at in 0..=tags.len() {
            let tag = tags
                .get(at)
                .and_then(|tag| self.labels.get(usize::try_from(*tag).ok()?));
            let (begins, kind) = match tag.and_then(|tag| tag.split_once('-')) {
                Some(("B" | "S" | "U", kind)) => (true, Some(kind)),
                Some((_, kind)) => (false, Some(kind)),
                None => (false, None),
            };
            let goes_on = !begins && open.as_ref().is_some_and(|(of, _)| Some(of.as_str()) == kind);
            if !goes_on {
                if let Some((of, start)) = open.take() {
                    entities.insert((of, start, at));
                }
                open = kind.map(|kind| (kind.to_string(), at));
            }
        }
        entities
    }
}

impl Metrics<Batch> for Tags {
    fn add(&mut self, answers: &Answers, batch: &Batch) {
        let (Answers::Tokens(answers), Targets::Tokens(labels)) = (answers, &batch.labels) else {
            return;
        };
        for (answers, labels) in answers.iter().zip(labels) {
            let learned = answers.iter().zip(labels).filter(|(_, label)| **label != IGNORED);
            let (answers, labels): (Vec<i64>, Vec<i64>) =
                learned.map(|(answer, label)| (*answer, *label)).unzip();
            self.right += answers.iter().zip(&labels).filter(|(a, b)| a == b).count() as u64;
            self.all += labels.len() as u64;
            let (ours, theirs) = (self.entities(&answers), self.entities(&labels));
            self.hits += ours.intersection(&theirs).count() as u64;
            self.answered += ours.len() as u64;
            self.true_ones += theirs.len() as u64;
        }
    }

    fn finish(&self) -> BTreeMap<String, f64> {
        let mut metrics = named([("accuracy", share(self.right, self.all))]);
        if self.labels.iter().any(|label| label.contains('-')) {
            metrics.extend(named([
                ("precision", share(self.hits, self.answered)),
                ("recall", share(self.hits, self.true_ones)),
                ("f1", f1(self.hits, self.answered, self.true_ones)),
            ]));
        }
        metrics
    }
}

/// Answers as places in a text: whether they are the same, and how far they overlap, in tokens.
#[derive(Debug, Default)]
pub struct Spans {
    exact: u64,
    overlap: f64,
    all: u64,
}

impl Metrics<Batch> for Spans {
    fn add(&mut self, answers: &Answers, batch: &Batch) {
        let (
            Answers::Spans { start, end },
            Targets::Spans {
                start: true_start,
                end: true_end,
            },
        ) = (answers, &batch.labels)
        else {
            return;
        };
        for (((start, end), true_start), true_end) in start.iter().zip(end).zip(true_start).zip(true_end) {
            let length = |start: i64, end: i64| (end - start + 1).max(0);
            let common = length(*start.max(true_start), *end.min(true_end));
            let both = length(*start, *end) + length(*true_start, *true_end);
            self.exact += u64::from(start == true_start && end == true_end);
            self.overlap += if both > 0 {
                2.0 * common as f64 / both as f64
            } else {
                0.0
            };
            self.all += 1;
        }
    }

    fn finish(&self) -> BTreeMap<String, f64> {
        named([
            ("exact_match", share(self.exact, self.all)),
            ("f1", self.overlap / self.all.max(1) as f64),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(labels: Targets) -> Batch {
        Batch {
            input_ids: Vec::new(),
            lengths: Vec::new(),
            token_type_ids: Vec::new(),
            segments: Vec::new(),
            num_choices: 0,
            labels,
        }
    }

    fn close(metrics: &BTreeMap<String, f64>, name: &str, expected: f64) {
        assert!((metrics[name] - expected).abs() < 1e-9, "{name}: {metrics:?}");
    }

    /// The expected numbers are scikit-learn's (`f1_score`, `matthews_corrcoef`).
    #[test]
    fn classes() {
        let mut metrics = Classes::new(3);
        let row = |class: usize| {
            (0..3)
                .map(|at| f32::from(u8::from(at == class)))
                .collect::<Vec<f32>>()
        };
        let answers = Answers::Rows([0, 1, 2, 2, 0, 1].map(row).to_vec());
        metrics.add(&answers, &batch(Targets::Classes(vec![0, 1, 1, 2, 0, IGNORED])));
        let metrics = metrics.finish();
        close(&metrics, "accuracy", 0.8);
        close(&metrics, "f1", (1.0 + 2.0 / 3.0 + 2.0 / 3.0) / 3.0);
        close(&metrics, "f1_weighted", 0.8);
        close(
            &metrics,
            "matthews_correlation",
            (4.0 * 5.0 - 8.0) / (16.0f64 * 16.0).sqrt(),
        );
    }

    #[test]
    fn several_labels_and_numbers() {
        let mut metrics = MultiLabel::default();
        let answers = Answers::Rows(vec![vec![1.0, -1.0, 2.0], vec![-1.0, -1.0, 1.0]]);
        metrics.add(
            &answers,
            &batch(Targets::Numbers(vec![vec![1.0, 0.0, 0.0], vec![0.0, 0.0, 1.0]])),
        );
        let found = metrics.finish();
        close(&found, "accuracy", 0.5);
        close(&found, "f1", 0.8);
        let mut metrics = Regression::default();
        let answers = Answers::Rows(vec![vec![1.0], vec![2.0], vec![4.0]]);
        metrics.add(
            &answers,
            &batch(Targets::Numbers(vec![vec![1.0], vec![3.0], vec![9.0]])),
        );
        let found = metrics.finish();
        close(&found, "mse", 26.0 / 3.0);
        close(&found, "spearman", 1.0);
        assert_eq!(ranks(&[3.0, 1.0, 3.0]), [1.5, 0.0, 1.5]);
    }

    #[test]
    fn entities_as_seqeval_counts_them() {
        let labels = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"].map(str::to_string);
        let mut metrics = Tags::new(&labels);
        // PER(0..2), LOC(3..4) against PER(0..2), LOC(3..5); the ignored token counts nowhere.
        let answers = Answers::Tokens(vec![vec![1, 2, 4, 0, 3, 0]]);
        metrics.add(
            &answers,
            &batch(Targets::Tokens(vec![vec![1, 2, IGNORED, 0, 3, 4]])),
        );
        let found = metrics.finish();
        close(&found, "accuracy", 0.8);
        close(&found, "f1", 0.5);
        // A kind that changes begins an entity, whatever it is called.
        let found = metrics.entities(&[2, 4, 4, 3]);
        let found: Vec<_> = found
            .iter()
            .map(|(kind, start, end)| (kind.as_str(), *start, *end))
            .collect();
        assert_eq!(found, [("LOC", 1, 3), ("LOC", 3, 4), ("PER", 0, 1)]);
    }

    #[test]
    fn spans() {
        let mut metrics = Spans::default();
        let answers = Answers::Spans {
            start: vec![2, 5],
            end: vec![4, 4],
        };
        metrics.add(
            &answers,
            &batch(Targets::Spans {
                start: vec![3, 1],
                end: vec![4, 2],
            }),
        );
        let found = metrics.finish();
        close(&found, "exact_match", 0.0);
        close(&found, "f1", 0.4);
    }
}
