//! A training in a terminal: curves of the loss and the learning rate, speed, and the time that is left.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use oxiformers_train::{Callback, Event, Result, TrainerState, TrainingArguments};

use super::line;

/// Columns and rows of the curve.
const WIDTH: usize = 64;
const HEIGHT: usize = 8;

/// Steps that the speed is a mean over.
const RECENT: usize = 20;

/// Redrawn in place.
pub struct Dashboard {
    all: MultiProgress,
    chart: Vec<ProgressBar>,
    bar: ProgressBar,
    losses: Vec<f64>,
    rates: Vec<f64>,
    recent: VecDeque<(u64, Duration)>,
    drawn: Option<Instant>,
}

impl Dashboard {
    pub fn new() -> Self {
        let all = MultiProgress::new();
        let text =
            || ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_spinner());
        let chart = (0..HEIGHT + 2)
            .map(|_| all.add(ProgressBar::new_spinner().with_style(text())))
            .collect();
        let style = ProgressStyle::with_template("{bar:40} {pos}/{len} steps  {msg}");
        let bar =
            all.add(ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())));
        Self {
            all,
            chart,
            bar,
            losses: Vec::new(),
            rates: Vec::new(),
            recent: VecDeque::new(),
            drawn: None,
        }
    }

    fn draw(&mut self, state: &TrainerState) {
        for (row, line) in self.chart.iter().zip(curve(&self.losses, WIDTH, HEIGHT)) {
            row.set_message(line);
        }
        if let Some(row) = self.chart.get(HEIGHT) {
            row.set_message(format!(
                "  learning rate {:.3e}  {}",
                self.rates.last().unwrap_or(&0.0),
                sparkline(&self.rates, WIDTH / 2)
            ));
        }
        let took: Duration = self.recent.iter().map(|(_, took)| *took).sum();
        let tokens: u64 = self.recent.iter().map(|(tokens, _)| *tokens).sum();
        let per_step = took.as_secs_f64() / self.recent.len().max(1) as f64;
        let left = per_step * state.max_steps.saturating_sub(state.global_step) as f64;
        self.bar.set_position(state.global_step);
        self.bar.set_message(format!(
            "{:.1} steps/s, {:.0} tokens/s, {} left, epoch {:.2}",
            1.0 / per_step.max(1e-9),
            tokens as f64 / took.as_secs_f64().max(1e-9),
            super::duration(left),
            state.epoch
        ));
        self.drawn = Some(Instant::now());
    }
}

impl Callback for Dashboard {
    fn on_event(&mut self, event: &Event, state: &TrainerState, _: &TrainingArguments) -> Result<()> {
        match event {
            Event::Begin(plan) => {
                self.bar.set_length(plan.max_steps);
                self.losses.extend(
                    state
                        .log_history
                        .iter()
                        .filter_map(|log| log.get("loss")?.as_f64()),
                );
                self.draw(state);
            }
            Event::Step {
                loss,
                learning_rate,
                tokens,
                took,
                ..
            } => {
                self.losses.push(*loss);
                self.rates.push(*learning_rate);
                self.recent.push_back((*tokens, *took));
                if self.recent.len() > RECENT {
                    self.recent.pop_front();
                }
                if self
                    .drawn
                    .is_none_or(|drawn| drawn.elapsed() > Duration::from_millis(200))
                {
                    self.draw(state);
                }
            }
            Event::Log(log) if log.contains_key("eval_loss") => {
                let _ = self.all.println(line(log));
            }
            Event::Skipped(message) => {
                let _ = self.all.println(format!("left out: {message}"));
            }
            Event::Evaluating { done, all } => {
                self.bar
                    .set_message(format!("evaluating: {done} of {all} batches"));
            }
            Event::Saved(path) => {
                let _ = self.all.println(format!("saved {}", path.display()));
            }
            Event::End { .. } => {
                self.draw(state);
                self.chart.iter().for_each(ProgressBar::finish);
                self.bar.finish();
            }
            _ => {}
        }
        Ok(())
    }
}

/// Means over as many parts as there are columns.
fn columns(values: &[f64], width: usize) -> Vec<f64> {
    let finite: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
    let width = width.min(finite.len());
    let part = |column: usize| {
        let part = &finite[column * finite.len() / width..(column + 1) * finite.len() / width];
        part.iter().sum::<f64>() / part.len().max(1) as f64
    };
    (0..width).map(part).collect()
}

/// A curve as rows of text, the largest value above, with the range beside it.
fn curve(values: &[f64], width: usize, height: usize) -> Vec<String> {
    const EIGHTHS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let columns = columns(values, width);
    let low = columns.iter().copied().fold(f64::INFINITY, f64::min);
    let high = columns.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if columns.is_empty() {
        return vec![String::new(); height];
    }
    let level =
        |value: f64| ((value - low) / (high - low).max(1e-12) * (8 * height - 1) as f64).round() as usize + 1;
    let row = |row: usize| {
        let below = 8 * (height - 1 - row);
        let line: String = columns
            .iter()
            .map(|value| EIGHTHS[level(*value).saturating_sub(below).min(8)])
            .collect();
        let label = match row {
            0 => format!("{high:9.4}"),
            last if last + 1 == height => format!("{low:9.4}"),
            _ => " ".repeat(9),
        };
        format!("{label} │{line}")
    };
    (0..height).map(row).collect()
}

/// A curve in one row.
fn sparkline(values: &[f64], width: usize) -> String {
    curve(values, width, 1)
        .pop()
        .and_then(|row| Some(row.split_once('│')?.1.to_string()))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_fall_from_left_to_right() {
        let values: Vec<f64> = (0..100).map(|x| 10.0 - f64::from(x) / 10.0).collect();
        let rows = curve(&values, 10, 4);
        assert_eq!(rows.len(), 4);
        assert!(rows[0].starts_with("   9.5500 │█"), "{rows:?}");
        assert!(rows[0].ends_with(' ') && rows[3].ends_with('▁'), "{rows:?}");
        assert_eq!(curve(&[], 10, 2), ["", ""]);
        assert_eq!(sparkline(&[1.0, 2.0], 9).chars().count(), 2);
        assert_eq!(curve(&[f64::NAN, 1.0], 5, 1).len(), 1);
    }
}
